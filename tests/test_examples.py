"""Every example in docs/examples runs and prints what it promises."""

import itertools
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

EXAMPLES = Path(__file__).parents[1] / "docs" / "examples"
PRINTS = {
    "checkpoint": ("plain model after loading differs by", "parallel model after loading differs by"),
    "compile_backend": ("0.weight", "2.bias", "gradient differs by"),
    "constraints": ("S(0) on", "PlanError: param:0.weight on axis dp: constraint"),
    "decode": ("the same tokens: True", "tokens a sweep, the same: True"),
    "decorator": ("loss",),
    "link": ("collectives as they are:", "loops where they pay:"),
    "own_pass": ("split-silu: ", "applied | silu written as a product | own_pass.py:", "refused: the result of pass split-silu"),
    "packed_inference": ("of 512 tokens (25%)",),
    "pipeline": ("step 4: loss", "gradients equal to the plain model's to the last bit: True"),
    "pipeline_train": ("step 4: loss", "the next step is that of one process, but for rounding: True"),
    "pipeline_schedule": ("1F1B takes", "no schedule of these stages is faster than"),
    "quickstart": ("step 4  loss", "up.weight: S(0) on tp"),
    "sample": ("the same samples: True", "InputError: cond's parameters of position"),
    "sample_groups": ("144 positions in no more sweeps than groups: True", "the same samples: True"),
    "sequential": ("a chain of 64 steps of", "gradients like the loop's: True"),
    "time_ranks": ("each rank runs a segment of the steps: True", "but for rounding: True"),
    "swaps": ("the factors of mm_2 gathered", "collectives that were looked at: 3"),
    "tiles": ("largest difference from the plain model:", "kinds of tile loops:"),
    "vocabulary": ("1 tactics: loss", "2 tactics: loss", "bytes on the wire and"),
    "train_step": ("next rate 0.00000", "moments kept for 4 parameters"),
}
LOSS_FALLS = ("decorator", "quickstart", "train_step", "torchrun_attach", "torchrun_pipeline")


def losses(printed: str) -> list[float]:
    words = printed.split()
    return [float(after) for word, after in itertools.pairwise(words) if word == "loss"]


def check(name: str, printed: str) -> None:
    flat = " ".join(printed.split())
    for expected in PRINTS.get(name, ()):
        assert " ".join(expected.split()) in flat
    if name in LOSS_FALLS:
        found = losses(printed)
        assert len(found) >= 4
        assert found == sorted(found, reverse=True)


def test_every_example_is_tested() -> None:
    assert {file.stem for file in EXAMPLES.glob("*.py")} == {*PRINTS, "torchrun_attach", "torchrun_pipeline"}


@pytest.mark.parametrize("name", sorted(PRINTS))
def test_the_example_runs(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """In this process, which spares the imports; ``test_the_example_runs_from_a_shell`` is the same from outside."""
    state = torch.random.get_rng_state()
    try:
        runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    finally:
        torch.random.set_rng_state(state)
        torch.compiler.reset()
    check(name, capsys.readouterr().out)


@pytest.mark.parametrize(
    "name", ["decorator", *(pytest.param(n, marks=pytest.mark.slow) for n in sorted(PRINTS) if n != "decorator")]
)
def test_the_example_runs_from_a_shell(name: str, tmp_path: Path) -> None:
    """Without a ``__main__`` guard, from any folder."""
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / f"{name}.py")], capture_output=True, text=True, timeout=280, check=False, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr[-4000:]
    check(name, done.stdout)


def test_the_example_in_the_readme_runs() -> None:
    readme = (EXAMPLES.parents[1] / "README.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", readme, flags=re.DOTALL)
    names: dict[str, Any] = {}
    exec(code, names)
    names["model"].close()
    assert names["loss"].item() > 0


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("torchrun_attach", "up.weight is (64, 32), this rank holds (32, 32) (S(0))"),
        pytest.param("torchrun_pipeline", "rank 1 holds layers.3.0.bias .. layers.3.0.weight", marks=pytest.mark.slow),
    ],
)
def test_the_attach_examples_run_under_torchrun(name: str, expected: str, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*command, str(EXAMPLES / f"{name}.py")],
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-4000:]
    check(name, done.stdout)
    assert "Warning" not in done.stderr, done.stderr
    assert expected in done.stdout
