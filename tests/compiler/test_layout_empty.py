"""Which layouts leave a rank without a piece."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hocket.compiler.layout import Layout, Replicate, Shard, has_empty_piece, local_shape
from hocket.runtime.mesh import Mesh


@given(st.lists(st.integers(1, 4), min_size=1, max_size=3), st.tuples(st.integers(1, 9), st.integers(1, 9)), st.data())
@settings(deadline=None, max_examples=100)
def test_a_layout_has_an_empty_piece_exactly_when_some_rank_holds_none(
    sizes: list[int], shape: tuple[int, int], data: st.DataObject
) -> None:
    mesh = Mesh(tuple((f"a{i}", size) for i, size in enumerate(sizes)))
    layout: Layout = tuple(data.draw(st.sampled_from([Replicate(), Shard(0), Shard(1)])) for _ in sizes)
    empty = any(0 in local_shape(shape, layout, mesh, rank) for rank in range(mesh.size))
    assert has_empty_piece(shape, layout, mesh) == empty


@pytest.mark.parametrize(("size", "expected"), [(8, True), (12, False), (0, False)])
def test_nested_cuts_can_starve_a_rank_that_neither_cut_alone_would(size: int, expected: bool) -> None:
    assert has_empty_piece((size,), (Shard(0), Shard(0)), Mesh.parse("a=2,b=3")) is expected
