"""Which form a loop takes, and whether there is one: by the costs of the machine and the link, and after what costs nothing."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tile_patterns import PATTERNS, Pattern, program_of

from hocket.compiler.contract import Context
from hocket.compiler.cost.cluster import Cluster, TileCosts
from hocket.compiler.program import Decision
from hocket.compiler.rules.table import RuleTable
from hocket.compiler.tiles import TileLoop, is_tile_loop, loop_of
from hocket.passes.tiles.fuse import FuseTiles
from hocket.runtime.mesh import Mesh
from hocket.runtime.transports.transport import LinkCost

RULES = RuleTable(None)
SIZE = 1024
COMPUTE = 2 * SIZE**3 / 2 / Cluster.default().flops["float32"]
SCATTER = Pattern(PATTERNS["mm -> scatter 0"].body, ((SIZE, SIZE // 2), (SIZE // 2, SIZE)))


def chosen(pattern: Pattern, cluster: Cluster, *, least_gain: float = 0.03) -> tuple[TileLoop | None, Decision]:
    """The loop that the pass makes of a pattern with one collective, and why."""
    after = FuseTiles(least_gain=least_gain)(program_of(pattern), Context(Mesh((("tp", 2),)), RULES, cluster))
    loops = [loop_of(node) for node in after.nodes if is_tile_loop(node)]
    (decision,) = [d for d in after.decisions if d.by == "tiles"]
    return (loops[0] if loops else None), decision


def linked(rho: float, alpha: float = 2e-5) -> Cluster:
    """A link that takes ``rho`` times as long as the product."""
    return Cluster.default().over(LinkCost(alpha, rho * COMPUTE / (2 * SIZE * SIZE)))


def seconds(decision: Decision) -> tuple[float, float]:
    """Predicted apart, and as a loop."""
    apart, _, fused = decision.reason.split("predicted ")[1].partition(" -> ")
    return float(apart) * 1e-6, float(fused.split(" us")[0]) * 1e-6


@pytest.mark.parametrize("rho", [0.25, 0.5, 1.0, 2.0])
def test_over_a_link_most_of_it_is_predicted_to_be_hidden(rho: float) -> None:
    loop, decision = chosen(SCATTER, linked(rho))
    assert loop is not None
    assert loop.eager
    apart, fused = seconds(decision)
    assert (apart - fused) / (apart - max(COMPUTE, rho * COMPUTE)) >= 0.8
    assert apart == pytest.approx((1 + rho) * COMPUTE, rel=0.05)


def test_the_slower_the_link_the_shorter_the_first_tile() -> None:
    """A quick link wants few and long tiles, a slow one a first tile that puts it to work at once."""
    first = []
    for rho in (0.05, 2.0):
        loop, _ = chosen(SCATTER, linked(rho), least_gain=-1e9)
        assert loop is not None
        first.append(loop.tile(0, 0)[1] / loop.chunk)
    assert first[0] >= 0.5
    assert first[1] <= 0.1


def test_every_decision_names_the_costs_it_rests_on() -> None:
    measured = dataclasses.replace(linked(1.0), tiles=TileCosts(measured=True))
    assert "default costs" in chosen(SCATTER, linked(1.0))[1].reason
    assert "costs measured on this machine" in chosen(SCATTER, measured)[1].reason
    kept = chosen(PATTERNS["mm -> scatter 0"], Cluster.default())[1]
    assert not kept.applied
    assert "default costs" in kept.reason


def test_what_loops_cost_decides_whether_there_are_any() -> None:
    """The same layer on machines whose loops begin quickly and slowly."""
    layer = Pattern(PATTERNS["mm -> scatter 0"].body, ((512, 128), (128, 512)))
    quick, slow = (dataclasses.replace(Cluster.default(), tiles=TileCosts(begin=begin, turn=1e-6)) for begin in (1e-6, 1.0))
    assert chosen(layer, quick)[1].applied
    assert not chosen(layer, slow)[1].applied


def _beside(g, x, w, a, b):
    """A scattered product that nobody waits for, and a product of its own."""
    return g.scatter(g.mm(x, w)), g.mm(a, b)


def test_a_collective_that_independent_work_hides_is_left_to_it() -> None:
    shape = ((SIZE, SIZE // 2), (SIZE // 2, SIZE))
    alone, _ = chosen(SCATTER, linked(0.5))
    loop, decision = chosen(Pattern(_beside, (*shape, *shape)), linked(0.5))
    assert alone is not None
    assert loop is None
    assert "independent work hides" in decision.reason
    in_memory = chosen(Pattern(_beside, (*shape, *shape)), Cluster.default(), least_gain=-1e9)[1]
    assert "independent work" not in in_memory.reason


@given(rho=st.floats(0.01, 8.0), alpha=st.floats(0.0, 1e-3), turn=st.floats(0.0, 1e-3))
@settings(max_examples=15, deadline=None)
def test_no_loop_is_predicted_to_beat_the_wire_or_the_product(rho: float, alpha: float, turn: float) -> None:
    cluster = dataclasses.replace(linked(rho, alpha), tiles=TileCosts(turn=turn))
    _, decision = chosen(SCATTER, cluster, least_gain=-1e9)
    _, fused = seconds(decision)
    assert fused >= max(COMPUTE, rho * COMPUTE + alpha) - 1e-6
    assert torch.isfinite(torch.tensor(fused))
