"""Two halves of the batch: the same function, collectives that travel behind the other half, and reasons to leave it whole."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from tile_patterns import Pattern, linear3, program_of
from torch import nn

import hocket
from hocket.compiler.contract import Context
from hocket.compiler.cost.cluster import COLLECTIVES, Cluster, Line
from hocket.compiler.emit import emit
from hocket.compiler.program import Program, Role, RoleKind
from hocket.compiler.rules.table import RuleTable
from hocket.compiler.verify.lowered import with_whole_inputs
from hocket.compiler.verify.ring.compare import compare
from hocket.passes.nano_batch import NanoBatch
from hocket.passes.overlap_order import OverlapOrder
from hocket.passes.timeline import Timeline, is_collective
from hocket.runtime.executors.lockstep import run_lockstep
from hocket.runtime.mesh import Mesh

RULES = RuleTable(None)
SLOW_LINK = Cluster("cpu", {"float32": 1e9}, 1e9, 1e-7, {kind: Line(1e-6, 4e-9) for kind in COLLECTIVES})
SLOWER_LINK = Cluster("cpu", {"float32": 1e9}, 1e9, 1e-7, {kind: Line(1e-6, 2e-8) for kind in COLLECTIVES})
FREE_LINK = Cluster("cpu", {"float32": 1e9}, 1e9, 1e-7, {kind: Line(0.0, 0.0) for kind in COLLECTIVES})


def two_layers(g, x, w, v):
    """Two tensor-parallel layers, each with its all-reduce, and the weight gradient of the second."""
    h = g.relu(g.reduce(linear3(g, x, w)))
    y = g.reduce(linear3(g, h, v))
    size = g.size(h)
    flat = g.view(h, [size[0] * size[1], size[2]])
    return y, g.mm(g.t(flat), g.view(y, [size[0] * size[1], g.size(y)[2]]))


def sequence_layers(g, x, w, v):
    """Gathers and scatters along the sequence."""
    return g.scatter(linear3(g, g.relu(linear3(g, g.gather(x, 1), w)), v), 1)


LAYERS = Pattern(two_layers, ((4, 3, 6), (5, 6), (4, 5)))
SEQUENCE = Pattern(sequence_layers, ((4, 2, 6), (5, 6), (6, 5)))


def context(cluster: Cluster = SLOW_LINK) -> Context:
    return Context(Mesh.parse("tp=2"), RULES, cluster)


def batched(pattern: Pattern) -> Program:
    """The program of a pattern whose first input is a batch, and whose other ones are parameters."""
    program = program_of(pattern)
    first, *others = program.signature.inputs
    roles = (first, *(Role(RoleKind.PARAM, role.name) for role in others))
    return program.replace(signature=dataclasses.replace(program.signature, inputs=roles))


def run(program: Program) -> list[list[torch.Tensor | None]]:
    generator = torch.Generator().manual_seed(3)
    vals = [node.meta["val"] for node in program.placeholders]
    rows = [[torch.randint(-2, 3, v.shape, generator=generator).to(v.dtype) for v in vals] for _ in range(2)]
    return run_lockstep(emit(program), rows)


@pytest.mark.parametrize("pattern", [LAYERS, SEQUENCE], ids=["reduce", "gather and scatter"])
def test_halves_compute_the_same_to_the_bit_and_are_proven(pattern: Pattern) -> None:
    before = batched(pattern)
    after = NanoBatch(least_gain=-1e9)(before, context())
    assert after.decisions[-1].applied, after.decisions[-1].reason
    assert sum(map(is_collective, after.nodes)) == 2 * sum(map(is_collective, before.nodes))
    for mine, theirs in zip(run(after), run(before), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))
    assert compare(with_whole_inputs(before), after).status.value == "equal"


def test_on_a_slow_link_halves_in_overlap_order_are_predicted_quicker() -> None:
    big = Pattern(two_layers, ((8, 16, 32), (32, 32), (32, 32)))
    before = batched(big)
    halves = NanoBatch()(before, context(SLOWER_LINK))
    assert halves.decisions[-1].applied
    after = OverlapOrder(memory=1.5)(halves, context(SLOWER_LINK))
    seconds = [Timeline(p, SLOWER_LINK).run([n for n in p.nodes if n.op == "call_function"]).seconds for p in (before, after)]
    assert seconds[1] < 0.97 * seconds[0]


@pytest.mark.parametrize(
    ("pattern", "cluster", "why"),
    [
        (LAYERS, FREE_LINK, "to gain"),
        (Pattern(two_layers, ((3, 3, 6), (5, 6), (4, 5))), SLOW_LINK, "can be halved"),
        (Pattern(lambda g, x, w: g.reduce(g.mm(x, w)), ((4, 6), (6, 5))), SLOW_LINK, "reaches 1 collectives"),
    ],
)
def test_the_batch_stays_whole_for_a_reason(pattern: Pattern, cluster: Cluster, why: str) -> None:
    before = batched(pattern)
    after = NanoBatch()(before, context(cluster))
    assert [n.name for n in after.nodes] == [n.name for n in before.nodes]
    assert not after.decisions[-1].applied
    assert why in after.decisions[-1].reason


def test_a_step_in_halves_equals_eager() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8), nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8))
    x = torch.randn(8, 8)
    plain = model(x)
    plain.square().sum().backward()
    wanted = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    tactics = [hocket.TensorParallel("tp"), hocket.Rewrites(after=(NanoBatch(least_gain=-1e9), OverlapOrder(memory=2.0)))]
    with hocket.parallelize(model, "tp=2", (x,), tactics=tactics, engine="sim") as parallel:
        out = parallel(x)
        out.square().sum().backward()
        found = [p.grad.clone() for p in parallel.parameters()]
        assert "nano-batch" in str(parallel.explain())
    torch.testing.assert_close(out, plain)
    for mine, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)
