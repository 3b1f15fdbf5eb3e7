"""The overlap order: collectives early, waits late, the same function, no more memory than allowed."""

from __future__ import annotations

import pytest
import torch
from lowered_programs import program_of
from torch import nn

import hocket
from hocket.compiler.contract import Context
from hocket.compiler.cost.cluster import COLLECTIVES, Cluster, Line
from hocket.compiler.program import Program, Role, RoleKind, Signature
from hocket.compiler.rules.table import RuleTable
from hocket.passes.overlap_order import OverlapOrder
from hocket.passes.timeline import WAIT, Timeline, is_collective
from hocket.runtime.mesh import Mesh

aten, c10d = torch.ops.aten, torch.ops._c10d_functional
MESH = Mesh.parse("tp=2")
SLOW_LINK = Cluster("cpu", {"float32": 1e9}, 1e9, 1e-7, {kind: Line(1e-6, 4e-9) for kind in COLLECTIVES})
FREE_LINK = Cluster("cpu", {"float32": 1e9}, 1e9, 1e-7, {kind: Line(0.0, 0.0) for kind in COLLECTIVES})


def context(cluster: Cluster = SLOW_LINK) -> Context:
    return Context(MESH, RuleTable(None), cluster)


def two_products(graph, x, w, v):
    """An all-reduce whose result is needed at once, and a product that is not."""
    part = graph.call_function(aten.mm.default, (x, w))
    pending = graph.call_function(aten.alias.default, (part,))
    used = graph.call_function(aten.relu.default, (pending,))
    other = graph.call_function(aten.mm.default, (x, v))
    return [used, other]


def reduced_program(n: int = 32) -> Program:
    """``two_products`` with the alias turned into an all-reduce and its wait."""
    program = program_of(two_products, {"x": (n, n), "w": (n, n), "v": (n, n)}, torch.float32)
    graph = program.graph.graph
    alias = next(node for node in graph.nodes if node.target is aten.alias.default)
    (part,) = alias.args
    with graph.inserting_before(alias):
        started = graph.call_function(c10d.all_reduce.default, (part, "sum", "tp"))
        waited = graph.call_function(WAIT, (started,))
    for new in (started, waited):
        new.meta.update(alias.meta)
    alias.replace_all_uses_with(waited)
    graph.erase_node(alias)
    return program.replace(mesh=MESH)


def targets(program: Program) -> list[str]:
    return [str(n.target).split(".")[-2] for n in program.nodes if n.op == "call_function"]


def test_golden_the_independent_product_moves_between_issue_and_wait() -> None:
    program = reduced_program()
    assert targets(program) == ["mm", "all_reduce", "wait_tensor", "relu", "mm"]
    after = OverlapOrder(memory=2.0)(program, context())
    assert targets(after) == ["mm", "all_reduce", "mm", "wait_tensor", "relu"]
    one, whole = after.decisions
    assert one.applied
    assert one.gain is not None
    assert one.gain > 0
    assert "ms ->" in whole.reason


def test_a_free_link_leaves_the_order_alone_and_says_why() -> None:
    program = reduced_program()
    after = OverlapOrder()(program, context(FREE_LINK))
    assert [n.name for n in after.nodes] == [n.name for n in program.nodes]
    assert not after.decisions[0].applied
    assert "no order" in after.decisions[0].reason


def test_memory_bounds_the_order() -> None:
    program = reduced_program()
    given = Timeline(program, SLOW_LINK).peak_bytes([n for n in program.nodes if n.op == "call_function"])
    after = OverlapOrder(memory=1.0)(program, context())
    assert Timeline(after, SLOW_LINK).peak_bytes([n for n in after.nodes if n.op == "call_function"]) <= given


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.norm = nn.Linear(16, 32), nn.Linear(32, 16), nn.LayerNorm(16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(x + self.down(torch.relu(self.up(x))))


@pytest.mark.parametrize("kind", [hocket.TensorParallel, hocket.DataParallel])
def test_a_step_in_overlap_order_is_proven_and_equals_eager(kind) -> None:
    model, x = nn.Sequential(Block(), Block()), torch.randn(8, 16)
    tactics = [kind("tp"), hocket.Rewrites(after=(OverlapOrder(least_gain=0.0, memory=4.0),))]
    with hocket.parallelize(model, "tp=2", (x,), tactics=tactics, engine="sim") as parallel:
        out = parallel(x)
        out.square().sum().backward()
        found = [p.grad.clone() for p in parallel.parameters()]
        assert "overlap-order" in str(parallel.explain())
    model.zero_grad()
    plain = model(x)
    plain.square().sum().backward()
    torch.testing.assert_close(out, plain)
    for mine, theirs in zip(found, [p.grad for p in model.parameters()], strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


def test_collectives_of_one_axis_keep_their_order() -> None:
    program = reduced_program()
    after = OverlapOrder(memory=4.0, least_gain=0.0)(program, context())
    before = [n.name for n in program.nodes if is_collective(n)]
    assert [n.name for n in after.nodes if is_collective(n)] == before


def test_a_program_without_collectives_is_left_alone() -> None:
    program = program_of(two_products, {"x": (4, 4), "w": (4, 4), "v": (4, 4)})
    assert program.signature == Signature(
        tuple(Role(RoleKind.INPUT, n) for n in "xwv"), tuple(Role(RoleKind.OUTPUT, f"out[{i}]") for i in range(2))
    )
    assert not OverlapOrder()(program, context()).decisions[0].applied
