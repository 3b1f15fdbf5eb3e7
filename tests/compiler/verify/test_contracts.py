"""What each contract promises is what the pass manager asks for: no more, no less, and nothing for free."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
import torch.fx as fx
from torch import Tensor, nn

from hocket.compiler.capture import capture
from hocket.compiler.contract import Approx, Context, Contract, Equal, EqualAfter, Spec
from hocket.compiler.errors import VerificationError
from hocket.compiler.passmanager import PassRecord, run_passes
from hocket.compiler.program import Program, RoleKind, annotate, copy_program, note
from hocket.compiler.verify.report import Status
from hocket.runtime.mesh import Mesh

aten = torch.ops.aten
CONTEXT = Context(Mesh.parse("d=1"), rules=None, cluster=None)  # type: ignore[arg-type]
STEPS = 3


class Recurrence(nn.Module):
    """x <- tanh(x w + b), STEPS times."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(STEPS):
            x = torch.tanh(self.cell(x))
        return x


def recurrence() -> Program:
    torch.manual_seed(0)
    return capture(Recurrence(), (torch.randn(2, 4),), train=False)


@dataclass(frozen=True)
class Jacobi:
    """All steps of the recurrence at once, ``sweeps`` times over, each from the states of the sweep before."""

    name: ClassVar[str] = "jacobi"
    sweeps: int = STEPS

    @property
    def contract(self) -> Contract:
        return EqualAfter(self.sweeps)

    def __call__(self, program: Program, context: Context) -> Program:
        new, _ = copy_program(program)
        graph = new.graph.graph
        ends = [node for node in graph.nodes if node.target is aten.tanh.default]
        step = [node for node in graph.nodes if node.op == "call_function"]
        start = next(n for n, role in zip(new.placeholders, new.signature.inputs, strict=True) if role.kind is RoleKind.INPUT)
        states = [start] * (len(ends) + 1)
        last = ends[-1]
        with graph.inserting_after(last):
            anchor = graph.call_function(aten.alias.default, (last,))
        with graph.inserting_before(anchor):
            for _ in range(self.sweeps):
                states = [start, *self._sweep(graph, step, ends, states)]
        for made in graph.nodes:
            if "val" not in made.meta:
                made.meta.update(last.meta)
                annotate(made, origin="", added_by=self.name)
        last.replace_all_uses_with(states[-1], delete_user_cb=lambda user: user.op == "output")
        graph.eliminate_dead_code()
        return new

    @staticmethod
    def _sweep(graph: fx.Graph, step: list[fx.Node], ends: list[fx.Node], states: list[fx.Node]) -> list[fx.Node]:
        """f of every state at once: the nodes between two ends, on the state that the sweep before left there."""
        made = []
        for place, end in enumerate(ends):
            first = 0 if place == 0 else step.index(ends[place - 1]) + 1
            before = None if place == 0 else ends[place - 1]
            renamed: dict[fx.Node, fx.Node] = {}
            for node in step[first : step.index(end) + 1]:
                renamed[node] = graph.node_copy(
                    node, lambda n, place=place, before=before, renamed=renamed: states[place] if n is before else renamed.get(n, n)
                )
                if place == 0:
                    renamed[node].args = tuple(renamed.get(a, a) if isinstance(a, fx.Node) else a for a in renamed[node].args)
            made.append(renamed[end])
        return made


def test_an_iteration_is_equal_after_as_many_sweeps_as_it_has_steps_and_not_before() -> None:
    _, (record,) = run_passes(recurrence(), (Jacobi(STEPS),), CONTEXT, level="ring")
    assert record.verdict.status is Status.EQUAL
    run_passes(recurrence(), (Jacobi(STEPS + 1),), CONTEXT, level="ring")
    with pytest.raises(VerificationError, match=r"EqualAfter\(sweeps=2\)"):
        run_passes(recurrence(), (Jacobi(STEPS - 1),), CONTEXT, level="ring")


@dataclass(frozen=True)
class Scaled:
    """Every result of an op times a number."""

    name: ClassVar[str] = "scaled"
    factor: float = 1.0
    contract: Contract = Equal()  # noqa: RUF009

    def __call__(self, program: Program, context: Context) -> Program:
        new, _ = copy_program(program)
        graph = new.graph.graph
        for node in [n for n in graph.nodes if n.target is aten.tanh.default]:
            with graph.inserting_after(node):
                made = graph.call_function(aten.mul.Tensor, (node, self.factor))
            made.meta.update(node.meta)
            annotate(made, origin=note(node).origin, added_by=self.name)
            node.replace_all_uses_with(made, delete_user_cb=lambda user, made=made: user is not made)
        return new


def proved(one: object, level: str = "ring") -> PassRecord:
    return run_passes(recurrence(), (one,), CONTEXT, level=level)[1][0]  # type: ignore[arg-type]


def scaled_by(factor: float) -> Callable[[Program], Program]:
    return lambda program: Scaled(factor)(program, CONTEXT)


def test_a_specified_pass_computes_its_reference_and_not_the_original() -> None:
    assert proved(Scaled(0.5, Spec(scaled_by(0.5)))).verdict.status is Status.EQUAL
    for wrong in (Scaled(1.0, Spec(scaled_by(0.5))), Scaled(0.5, Spec(scaled_by(0.25))), Scaled(0.5)):
        with pytest.raises(VerificationError):
            proved(wrong)


@pytest.mark.parametrize("level", ["ring", "full", "float"])
def test_an_approximate_pass_is_judged_in_floating_point_and_says_so(level: str) -> None:
    record = proved(Scaled(1.0001, Approx(1e-2)), level)
    assert record.verdict.status is Status.EQUAL
    assert "no proof" in record.verdict.bound
    with pytest.raises(VerificationError, match="differs by"):
        proved(Scaled(1.0001, Approx(1e-6)), level)
