"""Sixty patterns around collectives: each is fused, or kept for a stated reason; what is fused is the same function to the bit."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from tile_patterns import PATTERNS, Pattern, program_of

from hocket.compiler.contract import Context
from hocket.compiler.cost.cluster import Cluster
from hocket.compiler.emit import emit
from hocket.compiler.passmanager import run_passes
from hocket.compiler.program import Program
from hocket.compiler.rules.table import RuleTable
from hocket.compiler.tiles import is_tile_loop, loop_of, written_out
from hocket.compiler.verify.lowered import with_whole_inputs
from hocket.compiler.verify.report import Status
from hocket.compiler.verify.ring.compare import compare
from hocket.passes.tiles.fuse import FuseTiles
from hocket.runtime.executors.lockstep import run_lockstep
from hocket.runtime.mesh import Mesh
from hocket.runtime.regions import regions
from hocket.runtime.shapes import Form, forms
from hocket.runtime.templates import Site
from hocket.runtime.tile_loop import TILE_LOOP

RULES = RuleTable(None)
QUICK = dataclasses.replace(Cluster.default(), flops={"float32": 1e12})
ALWAYS = FuseTiles(least_gain=-1e9)
KEPT_BECAUSE = {
    "sum of a gather": "no product",
    "scatter of a pointwise": "no product",
    "mm -> softmax over rows -> scatter": "no product",
    "mm -> largest": "reduction by max",
}


def context(parts: int = 2) -> Context:
    return Context(Mesh((("tp", parts),)), RULES, Cluster.default())


def fused(pattern: Pattern, parts: int = 2, tiles: int = 0, dtype: torch.dtype = torch.float32) -> tuple[Program, Program]:
    program = program_of(pattern, parts, dtype)
    return program, FuseTiles(least_gain=-1e9, tiles=tiles)(program, context(parts))


def run(program: Program, seed: int = 0) -> list[list[torch.Tensor | None]]:
    """All ranks on integers, every rank with its own."""
    instructions = emit(program)
    assert program.mesh is not None
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for _ in range(program.mesh.size):
        vals = [node.meta["val"] for node in program.placeholders]
        rows.append([torch.randint(-2, 3, v.shape, generator=generator).to(v.dtype) for v in vals])
    return run_lockstep(instructions, rows)


@pytest.mark.parametrize("name", PATTERNS)
def test_every_pattern_is_fused_or_kept_for_a_reason(name: str) -> None:
    pattern = PATTERNS[name]
    before, after = fused(pattern)
    loops = [node for node in after.nodes if is_tile_loop(node)]
    assert len(loops) == pattern.fused, [d.reason for d in after.decisions]
    if not pattern.fused:
        assert any(KEPT_BECAUSE[name] in d.reason for d in after.decisions)
        assert not any(d.applied for d in after.decisions)
        return
    assert sum(d.applied for d in after.decisions) == pattern.fused
    assert all(d.source for d in after.decisions)
    exact = "softmax" not in name and "norm" not in name and "gelu" not in name and "silu" not in name and "gated" not in name
    for mine, theirs in zip(run(after), run(before), strict=True):
        for a, b in zip(mine, theirs, strict=True):
            assert a is not None
            assert b is not None
            if exact:
                assert torch.equal(a, b)
            else:
                torch.testing.assert_close(a, b)


CORE = ["gather 1 of 3d -> linear with bias", "linear of 3d -> scatter 1", "gather -> gated MLP -> scatter", "mm -> reduce"]
CORE += ["gather 1 -> norm -> MLP -> scatter 1", "dispatch -> expert MLP -> combine", "weight gradient of a gathered input"]
CORE += ["gather -> gradients -> scatter"]


@pytest.mark.parametrize("name", CORE)
def test_what_is_fused_is_proven_over_the_ring_on_all_ranks(name: str) -> None:
    before, after = fused(PATTERNS[name])
    verdict = compare(with_whole_inputs(before), written_out(after))
    assert verdict.status.value == "equal", verdict


def test_the_pass_manager_proves_a_loop_and_refuses_a_wrong_one() -> None:
    program = program_of(PATTERNS["mm -> scale -> scatter"])
    _, records = run_passes(program, (ALWAYS,), context(), level="ring")
    assert records[0].verdict.status is Status.EQUAL
    assert records[0].applied == 1
    _, wrong = fused(PATTERNS["mm -> scale -> scatter"])
    loop = next(node for node in wrong.nodes if is_tile_loop(node))
    region = str(loop.args[1])
    assert "0.5" in region
    loop.args = (loop.args[0], region.replace("0.5", "0.25"), *loop.args[2:])
    assert compare(with_whole_inputs(program), written_out(wrong)).status.value == "different"


@pytest.mark.parametrize(("parts", "tiles"), [(3, 1), (3, 2), (4, 2)])
@pytest.mark.parametrize("name", ["mm -> scatter 0", "mm -> reduce", "gather -> MLP -> scatter", "exchange -> mm"])
def test_more_ranks_and_tiles(name: str, parts: int, tiles: int) -> None:
    pattern = PATTERNS[name]
    scaled = tuple((s[0] * parts * 3 if i == 0 else s[0], *s[1:]) for i, s in enumerate(pattern.shapes))
    before, after = fused(Pattern(pattern.body, scaled), parts, tiles)
    (loop,) = [loop_of(node) for node in after.nodes if is_tile_loop(node)]
    assert (loop.parts, loop.tiles) == (parts, tiles)
    for mine, theirs in zip(run(after), run(before), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))


def test_the_choice_for_a_program_is_made_again_at_other_sizes() -> None:
    """Where the small copy would be kept and the large one is fused, both are fused: what is proven is what runs."""
    big = Pattern(PATTERNS["mm -> scatter 0"].body, ((2048, 512), (512, 2048)))
    one, quick = FuseTiles(), dataclasses.replace(context(), cluster=QUICK)
    large = one(program_of(big), quick)
    small = one(program_of(PATTERNS["mm -> scatter 0"]), quick)
    assert any(map(is_tile_loop, large.nodes))
    assert any(map(is_tile_loop, small.nodes))
    loops = [next(node for node in program.nodes if is_tile_loop(node)) for program in (large, small)]
    assert loops[0].args[1] == loops[1].args[1]
    assert not any(map(is_tile_loop, FuseTiles()(program_of(PATTERNS["mm -> scatter 0"]), quick).nodes))


def test_golden_a_loop_as_data() -> None:
    _, after = fused(PATTERNS["linear with bias -> scatter 0"], tiles=2)
    (node,) = [node for node in after.nodes if is_tile_loop(node)]
    assert (
        '"calls":[["aten.addmm.default",[{"slot":0},{"slot":1},{"slot":2}],{},[3],false],["aten.contiguous.default"' in node.args[1]
    )
    assert '"results":[["reduce_scatter",4,0,"sum"]]' in node.args[1]
    assert [str(n.target) for n in after.nodes if n.op == "call_function"] == [
        "aten.t.default",
        "hocket.tile_loop.default",
        "<built-in function getitem>",
    ]
    assert after.decisions[0].reason.startswith(
        "reduce_scatter_tensor_default and 1 product in one loop of 2 x 2 tiles, own chunk first, 2 calls each"
    )


@pytest.mark.parametrize("name", ["mm -> scatter 0", "gather -> gated MLP -> scatter", "exchange -> mm"])
def test_compilers_of_instruction_lists_leave_loops_alone_and_know_their_shapes(name: str) -> None:
    before, after = fused(PATTERNS[name])
    program = emit(after)
    at = next(i for i, ins in enumerate(program.instructions) if ins.op == TILE_LOOP)
    assert not any(region.start <= at < region.stop for region in regions(program))
    given = {i: Form.of(node.meta["val"]) for i, node in enumerate(after.placeholders)}
    known = forms(program, Site.of(program.mesh, 0), given)
    results = [slot for segment in program.segments for _, slot in segment.results]
    assert [tuple(known[slot].shape) for slot in results] == [tuple(n.meta["val"].shape) for n in before.results if n is not None]
