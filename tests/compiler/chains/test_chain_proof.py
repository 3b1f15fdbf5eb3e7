"""What the verifier makes of chains: the loop they mean, and the sweeps they ask for."""

import dataclasses
import json

import pytest
import torch
from torch import nn

import hocket
from hocket.compiler.contract import Context, Equal
from hocket.compiler.cost.cluster import Cluster
from hocket.compiler.plan.tactics import Rewrites
from hocket.compiler.program import Program, copy_program
from hocket.compiler.rules.table import RuleTable
from hocket.compiler.verify.ring.compare import compare
from hocket.compiler.verify.ring.ops import chain as ring_chain
from hocket.compiler.verify.ring.verdict import Status
from hocket.passes.chain.jacobi import JacobiFeedforward
from hocket.runtime.mesh import Mesh

STEPS = 6


class Loop(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inside, self.outside = nn.Linear(3, 3), nn.Linear(2, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        state, given = x.new_zeros(x.shape[1], 3), []
        for piece in x.unbind(0):
            state = torch.tanh(self.outside(piece) + self.inside(state))
            given.append(state)
        return torch.stack(given)


@pytest.fixture(scope="module")
def programs() -> tuple[Program, Program]:
    plain = hocket.capture(Loop(), (torch.randn(STEPS, 2, 2),), train=False)
    context = Context(Mesh.parse("one=1"), RuleTable(None), Cluster.current())
    return plain, JacobiFeedforward("jacobi", shortest=4)(plain, context)


def changed(program: Program, position: int, change: object) -> Program:
    """A copy whose chain has another body (position 4) or another solver (5)."""
    copy, _ = copy_program(program)
    (node,) = [n for n in copy.nodes if "hocket.chain" in str(n.target)]
    raw = json.loads(node.args[position])
    change(raw)
    text = json.dumps(raw, separators=(",", ":"), sort_keys=True)
    node.args = (*node.args[:position], text, *node.args[position + 1 :])
    return copy


def test_a_lifted_loop_is_proven_equal(programs: tuple[Program, Program]) -> None:
    assert compare(*programs).status is Status.EQUAL


def test_a_wrong_body_is_seen(programs: tuple[Program, Program]) -> None:
    plain, chained = programs

    def sigmoid(raw: dict[str, list[list[object]]]) -> None:
        call = next(c for c in raw["calls"] if c[0] == "aten.tanh.default")
        call[0] = "aten.sigmoid.default"

    assert compare(plain, changed(chained, 4, sigmoid)).status is Status.DIFFERENT


def test_as_many_sweeps_as_steps_are_proven_equal_and_fewer_are_not(programs: tuple[Program, Program]) -> None:
    plain, chained = programs
    enough = changed(chained, 5, lambda raw: raw.update(sweeps=STEPS))
    assert compare(plain, enough).status is Status.EQUAL
    fewer = changed(chained, 5, lambda raw: raw.update(sweeps=STEPS - 1))
    assert compare(plain, fewer).status is Status.DIFFERENT


def test_k_sweeps_are_proven_exact_on_the_first_k_steps(programs: tuple[Program, Program]) -> None:
    plain, chained = programs
    few = changed(chained, 5, lambda raw: raw.update(sweeps=3))
    assert compare(first(plain, 3), first(few, 3)).status is Status.EQUAL
    assert compare(first(plain, 4), first(few, 4)).status is Status.DIFFERENT


def first(program: Program, steps: int) -> Program:
    """The same program, giving out its first steps only."""
    copy, _ = copy_program(program)
    graph = copy.graph.graph
    output = next(n for n in reversed(graph.nodes) if n.op == "output")
    (result,) = output.args[0]
    with graph.inserting_before(output):
        part = graph.call_function(torch.ops.aten.slice.Tensor, (result, 0, 0, steps))
    part.meta = {**result.meta, "val": result.meta["val"][:steps]}
    output.args = ((part,),)
    return dataclasses.replace(copy)


def test_a_long_chain_is_proven_at_small_sizes_and_not_step_by_step(monkeypatch: pytest.MonkeyPatch) -> None:
    steps = 0
    plain = ring_chain._Step.__call__

    def counted(self: object, *args: object) -> object:
        nonlocal steps
        steps += 1
        return plain(self, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(ring_chain._Step, "__call__", counted)
    x = torch.randn(1000, 1, 3)
    with hocket.parallelize(nn.RNN(3, 4), "one=1", (x,), tactics=[hocket.Jacobi()], engine="sim", verify="ring") as parallel:
        assert "equal" in str(parallel.explain())
    assert 0 < steps < 1000


def test_proofs_run_outside_of_the_mode_that_captures_layers() -> None:
    seen: list[int] = []

    class Watching:
        name = "watching"
        contract = Equal()

        def __call__(self, program: Program, context: Context) -> Program:
            seen.append(torch._C._len_torch_function_stack())
            return program

    before = torch._C._len_torch_function_stack()
    tactics = [hocket.Jacobi(), Rewrites(before=(Watching(),))]
    with hocket.parallelize(nn.RNN(3, 4), "one=1", (torch.randn(5, 1, 3),), tactics=tactics, engine="sim"):
        pass
    assert seen
    assert set(seen) == {before}
