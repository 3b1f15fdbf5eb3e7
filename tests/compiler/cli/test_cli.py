"""Every command on a small model: figures for machines, tables for people, and one helpful line for every mistake."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from hocket.compiler.cli.main import main
from hocket.compiler.cli.tactics import parse_tactics
from hocket.compiler.plan.tactics import DataParallel, Zero

MODEL = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 4)

    def forward(self, x):
        return self.down(torch.relu(self.up(x)))

class Sized(nn.Module):
    def __init__(self, width):
        super().__init__()

def make():
    return Net(), (torch.randn(4, 8),)

def broken():
    return 7

number = 7
"""


@pytest.fixture
def model(tmp_path: Path) -> str:
    path = tmp_path / "little_model.py"
    path.write_text(MODEL)
    return str(path)


def facts(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, Any]:
    """(exit code, the JSON object printed)."""
    code = main([*argv, "--json"])
    return code, json.loads(capsys.readouterr().out)


@pytest.mark.parametrize(("name", "inputs"), [("Net", ["--input", "4x8"]), ("make", [])])
def test_plan_tells_where_parameters_go(model: str, capsys: pytest.CaptureFixture[str], name: str, inputs: list[str]) -> None:
    code, plan = facts(capsys, "plan", f"{model}:{name}", "--mesh", "tp=2", "--tactic", "TensorParallel(tp)", *inputs)
    assert code == 0
    assert {row["name"]: row["layout"] for row in plan["parameters"]}["up.weight"] == "S(0)"
    assert plan["sizes"]["B"] == 4
    assert plan["predicted"]["bytes_on_wire"] > 0


def test_plan_prints_a_table_for_people(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", f"{model}:make", "--mesh", "dp=2", "--tactic", "DataParallel(dp)", "--inference"]) == 0
    printed = capsys.readouterr().out
    assert "plan for mesh dp=2" in printed
    assert "time: capture " in printed
    assert "up.weight" in printed


def test_explain_gives_decisions_with_lines_of_the_model(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, told = facts(capsys, "explain", f"{model}:make", "--mesh", "tp=2", "--tactic", "TensorParallel(tp)")
    assert code == 0
    reduces = [row for row in told["decisions"] if row["by"] == "shard" and "all_reduce" in row["reason"]]
    assert any("little_model.py:" in row["source"] for row in reduces)


def test_explain_prints_the_code_of_the_ranks(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", f"{model}:make", "up.weight", "--mesh", "tp=2", "--tactic", "TensorParallel(tp)", "--code"]) == 0
    assert "_c10d_functional.all_reduce" in capsys.readouterr().out


@pytest.mark.parametrize("level", ["types", "float", "ring"])
def test_verify_reports_equality_and_its_level(model: str, capsys: pytest.CaptureFixture[str], level: str) -> None:
    code, told = facts(capsys, "verify", f"{model}:make", "--mesh", "tp=2", "--level", level)
    (verdict,) = told["verdicts"]
    shown = {row["level"]: row["outcome"] for row in verdict["levels"]}
    assert shown["types"] == "passed"
    assert (code, told["ok"]) == (0, True)
    if level == "types":  # a distribution that holds is not yet a proof of equality, and the conclusion says so
        assert verdict["status"] == "not-checked"
        assert told["shown"].startswith("the distribution is right on all ranks")
        assert told["not_shown"].startswith("that the values are the same: nothing was computed")
    else:
        assert (verdict["status"], shown[level]) == ("equal", "proved")
        assert "equal" in told["shown"] or "agree" in told["shown"]


def test_doctor_finds_what_engines_need(capsys: pytest.CaptureFixture[str]) -> None:
    code, told = facts(capsys, "doctor")
    assert code == 0
    states = {row["topic"]: row["state"] for row in told["findings"]}
    assert states["torch"] == "ok"
    assert states["gloo"] == "ok"


def test_run_trains_beside_plain_torch(model: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    trace = tmp_path / "trace.json"
    code, told = facts(capsys, "run", f"{model}:make", "--mesh", "dp=2", "--steps", "3", "--trace", str(trace))
    assert code == 0
    assert len(told["losses_ranks"]) == 3
    assert told["worst_loss_difference"] < 1e-4
    assert json.loads(trace.read_text())


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_demo_as_it_is_run_by_make_meets_its_own_checks(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    code, told = facts(capsys, "demo", "--out", str(tmp_path))
    assert code == 0
    assert told["wire_exact"]
    assert told["worst_loss_difference"] < 1e-4
    assert told["loss_ranks"] < 3.3
    assert {Path(name).name for name in told["artefacts"]} == {"program.json", "program.py", "trace.json"}
    assert all(Path(name).is_file() for name in told["artefacts"])


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["{model}"], "expected FILE:NAME"),
        (["{model}:Nett"], "has no 'Nett'; it has"),
        (["{model}:Sized"], "needs arguments (width)"),
        (["{model}:broken"], "made int; expected an nn.Module"),
        (["{model}:number"], "found int"),
        (["nowhere.py:Net"], "no file 'nowhere.py'"),
        (["no_such_package_here:Net"], "no module named 'no_such_package_here'"),
        (["{model}:Net"], "no example inputs"),
        (["{model}:Net", "--input", "4,8"], "expected [NAME=]SHAPE[:DTYPE[:HIGH]]"),
        (["{model}:Net", "--input", "4x8:float99"], "no dtype 'float99'"),
        (["{model}:Net", "--input", "4x8:float32:3"], "an upper bound is for integers"),
        (["{model}:make", "--mesh", "tp"], "NAME=SIZE"),
        (["{model}:make", "--mesh", "tp=0"], "sizes >= 1"),
        (["{model}:make", "--tactic", "Fast(tp)"], "expected one of"),
        (["{model}:make", "--tactic", "DataParallel(d, 3)"], "only Zero has stages"),
        (["{model}:make", "--tactic", "DataParallel(dp)"], "mesh d=2 has no axis 'dp'"),
        (["{model}:make", "--tactic", "Zero(d, 9)"], "stages 1, 2 and 3"),
        (["{model}:Net", "--input", "4x9"], "little_model.py:"),
    ],
)
def test_a_mistake_gives_exit_code_2_and_says_what_to_do(
    model: str, capsys: pytest.CaptureFixture[str], argv: list[str], words: str
) -> None:
    assert main(["plan", *(word.format(model=model) for word in argv)]) == 2
    captured = capsys.readouterr()
    assert words in captured.err
    assert "Traceback" not in captured.err
    assert not captured.out.strip()


@pytest.mark.parametrize("argv", [["plant"], ["plan"], [], ["verify", "m.py:N", "--level", "gut-feeling"]])
def test_an_unknown_command_or_option_is_refused_by_the_parser(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(argv)
    assert stopped.value.code == 2
    assert "usage: hocket" in capsys.readouterr().err


def test_the_command_and_the_module_are_the_same_program() -> None:
    help_texts = [
        subprocess.run(command, capture_output=True, text=True, timeout=240, check=True).stdout
        for command in ([str(Path(sys.executable).with_name("hocket")), "--help"], [sys.executable, "-m", "hocket", "--help"])
    ]
    assert help_texts[0] == help_texts[1]
    assert "doctor" in help_texts[0]


USERS = """
from torch import nn

class Looped(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(4))

    def forward(self, x):
        for layer in self.layers:
            x = layer(x).relu()
        return x.square().mean()

class Fixed(nn.Module):
    def forward(self, x):
        return x * 2

def fails():
    raise KeyError("no such width")
"""


@pytest.fixture
def users(tmp_path: Path) -> str:
    path = tmp_path / "users_model.py"
    path.write_text(USERS)
    (tmp_path / "broken_import.py").write_text("import nothing_of_that_name\n")
    return str(path)


def test_a_mesh_of_stages_is_planned_and_proven_in_stages(users: str, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [f"{users}:Looped", "--mesh", "pp=2", "--input", "4x8"]
    code, plan = facts(capsys, "plan", *arguments)
    assert code == 0
    assert sum(plan["micro_batches"]) == 4
    code, proof = facts(capsys, "verify", *arguments, "--level", "ring")
    assert (code, proof["ok"]) == (0, True)
    assert main(["explain", *arguments]) == 0
    assert "stage" in capsys.readouterr().out
    assert main(["run", *arguments]) == 2
    assert "hocket run trains without stages" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["plan", "{users}:fails", "--input", "4x8"], "KeyError: 'no such width' (users_model.py:"),
        (["plan", "{folder}/broken_import.py:Net", "--input", "4x8"], "No module named 'nothing_of_that_name' (broken_import.py:1"),
        (["plan", "{users}:Looped", "--input", "4x8:int64:0"], "HIGH is at least 1"),
        (["run", "{users}:Fixed", "--input", "4x8"], "has no parameters to train"),
        (["run", "{users}:Looped", "--input", "4x8", "--trace", "{folder}/none/trace.json"], "there is no folder"),
        (["run", "{users}:Looped", "--input", "4x8", "--mesh", "d=4000"], "4000 ranks"),
        (["plan", "{users}:Looped", "--input", "4x8", "--input", "4x8"], "do not fit Looped(x): too many positional arguments"),
    ],
)
def test_mistakes_of_the_users_are_one_line_each(
    users: str, argv: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([one.format(users=users, folder=Path(users).parent) for one in argv]) == 2
    printed = capsys.readouterr().err
    assert words in printed
    assert printed.count("\n") == 1


@pytest.mark.parametrize("argv", [["--steps", "0"], ["--steps", "-1"], ["--lr", "-1"], ["--lr", "nan"]], ids=" ".join)
def test_numbers_that_make_no_sense_are_refused_as_usage(users: str, argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["run", f"{users}:Looped", "--input", "4x8", *argv])
    assert "at least" in capsys.readouterr().err


def test_quotes_around_the_axis_of_a_tactic_are_as_good_as_none() -> None:
    assert parse_tactics(["Zero('dp', stage=2)", ' DataParallel("tp")']) == [Zero("dp", stage=2), DataParallel("tp")]
