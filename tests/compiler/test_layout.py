"""Cutting and assembling tensors, and the steps between layouts."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hocket.compiler.errors import HocketError
from hocket.compiler.layout import (
    Layout,
    Partial,
    Placement,
    Replicate,
    Shard,
    assemble,
    cut,
    format_placement,
    local_shape,
    parse_placement,
)
from hocket.compiler.redistribute import StepKind, steps, wire_bytes
from hocket.runtime.mesh import Mesh

PLACEMENTS: list[Placement] = [Replicate(), Shard(0), Shard(1), Partial("sum")]


@st.composite
def cases(draw: st.DrawFn) -> tuple[Mesh, Layout, torch.Tensor]:
    sizes = draw(st.lists(st.integers(1, 3), min_size=1, max_size=3))
    mesh = Mesh(tuple((f"a{i}", size) for i, size in enumerate(sizes)))
    layout = tuple(draw(st.sampled_from(PLACEMENTS)) for _ in sizes)
    shape = draw(st.tuples(st.integers(1, 9), st.integers(1, 9)))
    return mesh, layout, torch.randn(shape, dtype=torch.float64)


@given(cases())
@settings(deadline=None, max_examples=200)
def test_assembling_the_pieces_gives_the_value_back(case: tuple[Mesh, Layout, torch.Tensor]) -> None:
    mesh, layout, value = case
    pieces = cut(value, layout, mesh)
    assert [tuple(p.shape) for p in pieces] == [local_shape(value.shape, layout, mesh, r) for r in range(mesh.size)]
    torch.testing.assert_close(assemble(pieces, layout, mesh), value)


@pytest.mark.parametrize("placement", [*PLACEMENTS, Partial("max"), Shard(3)])
def test_placements_survive_a_round_trip_through_text(placement: Placement) -> None:
    assert parse_placement(format_placement(placement)) == placement


def test_every_reachable_pair_of_layouts_has_valid_steps() -> None:
    layouts = list(itertools.product(PLACEMENTS, repeat=3))
    for source, target in itertools.product(layouts, repeat=2):
        if any(isinstance(t, Partial) and s != t for s, t in zip(source, target, strict=True)):
            with pytest.raises(HocketError, match="nothing makes a partial sum"):
                steps(source, target)
            continue
        path = steps(source, target)
        assert (path[-1].after if path else source) == target
        assert all(a.after == b.before for a, b in itertools.pairwise(path))
        for step in path:
            assert step.axis == next(i for i in range(3) if step.before[i] != step.after[i])
            outer_dim = {p.dim for p in (step.source, step.target) if isinstance(p, Shard)}
            inner_dims = {p.dim for p in step.before[step.axis + 1 :] if isinstance(p, Shard)}
            assert not (outer_dim & inner_dims), f"{step} changes a cut that an inner axis nests in"


def test_bytes_on_the_wire_follow_the_ring_formulas() -> None:
    mesh = Mesh.parse("tp=4")
    for source, target, expected in [
        (Shard(0), Replicate(), 3 * 2 * 8 * 4),
        (Partial("sum"), Replicate(), 2 * 3 / 4 * 8 * 8 * 4),
        (Partial("sum"), Shard(1), 3 * 8 * 2 * 4),
        (Shard(0), Shard(1), 3 / 4 * 2 * 8 * 4),
        (Replicate(), Shard(0), 0),
    ]:
        (step,) = steps((source,), (target,))
        assert wire_bytes(step, (8, 8), 4, mesh) == expected


def test_uneven_pieces_are_priced_with_their_padding() -> None:
    (step,) = steps((Shard(0),), (Replicate(),))
    assert step.kind is StepKind.ALL_GATHER
    assert wire_bytes(step, (5, 2), 4, Mesh.parse("tp=2")) == 3 * 2 * 4
