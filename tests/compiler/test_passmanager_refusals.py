"""The pass manager returns what is proven and refuses the rest, naming the pass and the node."""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from torch import nn

from hocket.compiler.capture import capture
from hocket.compiler.contract import Approx, Context, Contract, Equal, EqualAfter, Spec
from hocket.compiler.errors import HocketError, InputError, VerificationError
from hocket.compiler.passmanager import run_passes
from hocket.compiler.program import Decision, Program, copy_program
from hocket.compiler.verify import levels
from hocket.compiler.verify.levels import types_level
from hocket.compiler.verify.report import Outcome, Status
from hocket.runtime.mesh import Mesh

aten = torch.ops.aten
CONTEXT = Context(Mesh.parse("tp=2"), rules=None, cluster=None)  # type: ignore[arg-type]


def program(rows: int = 3) -> Program:
    torch.manual_seed(0)
    return capture(nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2)), (torch.randn(rows, 4),))


@dataclass(frozen=True)
class Swap:
    """Replace one op by another."""

    name: ClassVar[str] = "swap"
    old: object = aten.tanh.default
    new: object = aten.sin.default
    contract: Contract = Equal()  # noqa: RUF009

    def __call__(self, program: Program, context: Context) -> Program:
        copied, _ = copy_program(program)
        for node in copied.nodes:
            if node.target is self.old:
                node.target = self.new
                copied = copied.decided(Decision(self.name, node.name, applied=True, reason="asked to"))
        return copied


@dataclass(frozen=True)
class Same:
    """Change nothing."""

    name: ClassVar[str] = "same"
    contract: ClassVar[Contract] = Equal()
    option: int = 3

    def __call__(self, program: Program, context: Context) -> Program:
        return copy_program(program)[0]


@pytest.mark.parametrize("level", ["float", "ring", "full"])
def test_a_pass_that_changes_the_function_is_refused_with_its_name_and_node(level: str) -> None:
    with pytest.raises(VerificationError, match="swap does not compute the same function") as caught:
        run_passes(program(), (Same(), Swap()), CONTEXT, level=level)
    assert "tanh" in str(caught.value)
    assert "first divergence" in str(caught.value)


@pytest.mark.parametrize("level", ["float", "ring", "full"])
def test_what_a_pass_did_is_recorded(level: str) -> None:
    result, (first, second) = run_passes(program(), (Same(), Swap(new=aten.tanh.default)), CONTEXT, level=level)
    assert first.verdict.status is second.verdict.status is Status.EQUAL
    assert (first.name, first.options, first.decisions) == ("same", {"option": 3}, 0)
    assert (second.decisions, second.applied) == (1, 1)
    assert second.nodes[0] == second.nodes[1] == sum(n.op == "call_function" for n in result.nodes)
    assert "same" in str(first)


def test_level_off_asks_nothing_and_says_so() -> None:
    _, (record,) = run_passes(program(), (Swap(),), CONTEXT, level="off")
    assert record.verdict.status is Status.NOT_CHECKED


def test_the_environment_chooses_the_level(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOCKET_VERIFY", "off")
    run_passes(program(), (Swap(),), CONTEXT)
    monkeypatch.setenv("HOCKET_VERIFY", "ring")
    with pytest.raises(VerificationError):
        run_passes(program(), (Swap(),), CONTEXT)
    monkeypatch.setenv("HOCKET_VERIFY", "perhaps")
    with pytest.raises(InputError, match=r"off, types, float, ring, full; found 'perhaps'"):
        run_passes(program(), (Swap(),), CONTEXT)


def test_contracts_decide_what_the_result_is_compared_with() -> None:
    reference = Swap()
    specified = Swap(contract=Spec(lambda before: reference(before, CONTEXT)))
    _, (record,) = run_passes(program(), (specified,), CONTEXT, level="full")
    assert record.verdict.status is Status.EQUAL
    run_passes(program(), (Swap(contract=Approx(10.0)),), CONTEXT, level="ring")
    with pytest.raises(VerificationError, match="differs by"):
        run_passes(program(), (Swap(contract=Approx(1e-3)),), CONTEXT, level="ring")
    with pytest.raises(VerificationError):
        run_passes(program(), (Swap(contract=EqualAfter(2)),), CONTEXT, level="ring")


def test_a_broken_invariant_names_the_pass() -> None:
    class Broken(Same):
        name: ClassVar[str] = "broken"

        def __call__(self, program: Program, context: Context) -> Program:
            copied, _ = copy_program(program)
            del copied.nodes[-2].meta["val"]
            return copied

    with pytest.raises(HocketError, match=r"pass broken .*meta\['val'\] is missing"):
        run_passes(program(), (Broken(),), CONTEXT, level="off")


def test_what_is_too_expensive_to_execute_is_not_called_equal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(levels, "BUDGET", 10.0)
    with pytest.raises(VerificationError, match=r"was not checked.*retrace="):
        run_passes(program(), (Swap(),), CONTEXT, level="ring")


def test_small_sizes_stand_for_large_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(levels, "BUDGET", 5e4)
    _, (record,) = run_passes(program(4096), (Same(),), CONTEXT, level="float", retrace=lambda: program(2))
    assert record.verdict.status is Status.EQUAL
    with pytest.raises(VerificationError, match="does not compute the same"):
        run_passes(program(4096), (Swap(),), CONTEXT, level="float", retrace=lambda: program(2))


def test_a_retrace_with_another_skeleton_is_refused() -> None:
    other = capture(nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2)), (torch.randn(3, 4),))
    with pytest.raises(VerificationError, match="not the same program at other sizes"):
        run_passes(program(), (Same(),), CONTEXT, level="float", retrace=lambda: other)


@dataclass(frozen=True)
class FirstRows:
    """Keep so many rows of the result, or as many as there are: nothing at small sizes, something else at large ones."""

    name: ClassVar[str] = "first-rows"
    contract: ClassVar[Contract] = Equal()
    most: int = 100

    def __call__(self, program: Program, context: Context) -> Program:
        copied, _ = copy_program(program)
        graph = copied.graph.graph
        node = next(n for n in graph.nodes if n.target is aten.tanh.default)
        with graph.inserting_after(node):
            made = graph.call_function(aten.slice.Tensor, (node, 0, 0, min(self.most, node.meta["val"].shape[0])))
        made.meta.update(node.meta)
        node.replace_all_uses_with(made, delete_user_cb=lambda user: user is not made)
        return copied


def test_what_small_sizes_show_is_not_carried_to_integers_that_follow_no_expression_of_the_sizes() -> None:
    small = [lambda: program(3), lambda: program(5)]
    with pytest.raises(VerificationError, match=r"argument of slice_tensor is .*no expression of the sizes"):
        run_passes(program(4096), (FirstRows(),), CONTEXT, level="float", retrace=small)
    _, (record,) = run_passes(program(4096), (FirstRows(1 << 20),), CONTEXT, level="float", retrace=small)
    assert record.verdict.status is Status.EQUAL


def test_a_retrace_is_not_asked_for_what_the_whole_programs_show() -> None:
    def never() -> Program:
        raise AssertionError("captured again for nothing")

    _, (record,) = run_passes(program(4096), (Same(),), CONTEXT, level="ring", retrace=never)
    assert "certain" in record.verdict.bound


def test_a_reproducer_is_written_when_asked_for(tmp_path: Path) -> None:
    with pytest.raises(VerificationError, match="A reproducer is in"):
        run_passes(program(), (Swap(),), CONTEXT, level="float", reproduce_in=tmp_path)
    (path,) = tmp_path.iterdir()
    text = path.read_text()
    assert "pass swap" in text
    assert "aten.sin.default" in text
    assert "param:0.weight" in text


def test_levels_can_be_given_as_functions() -> None:
    asked = []

    def mine(question, before):
        asked.append([result.level for result in before])
        return levels.LevelResult("mine", Outcome.PROVED, "trust me")

    _, (record,) = run_passes(program(), (Same(),), CONTEXT, level=(types_level, mine))
    assert asked == [["types"]]
    assert record.verdict.status is Status.EQUAL
