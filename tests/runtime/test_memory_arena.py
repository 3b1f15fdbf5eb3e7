"""Shared memory: tensors move without changing, blocks live as long as their storage, and nothing leaks."""

from __future__ import annotations

import gc
import itertools
import os
import weakref
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hocket.runtime.errors import InputError
from hocket.runtime.memory import ALIGNMENT, PACKED_BYTES, SEGMENT_BYTES, BlockPlan, SharedArena, size_class
from hocket.runtime.segments import Location, MappedSegments

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.int64, torch.bool, torch.uint8, torch.complex64]


def other_side(arena):
    """The arena as a rank maps it."""
    mapped = MappedSegments()
    for ident, fd, nbytes in arena.descriptors():
        mapped.add(ident, os.dup(fd), nbytes)
    return mapped


@pytest.mark.parametrize("dtype", DTYPES)
def test_share_keeps_values_strides_and_identity(dtype):
    arena = SharedArena()
    values = torch.randint(0, 2, (5, 7)).to(dtype)
    tensors = [
        values.clone(),
        values.clone().t(),
        values.clone()[1:4, ::2],
        torch.empty(0, 3, dtype=dtype),
        torch.ones((), dtype=dtype),
    ]
    expected = [t.clone() for t in tensors]
    strides = [t.stride() for t in tensors]
    arena.share(tensors)
    mapped = other_side(arena)
    for tensor, want, stride in zip(tensors, expected, strides, strict=True):
        assert torch.equal(tensor, want)
        assert tensor.stride() == stride
        where = arena.locate(tensor)
        if tensor.numel():
            assert torch.equal(mapped.tensor(where, tensor.shape, stride, dtype), want)
    mapped.tensor(arena.locate(tensors[0]), (5, 7), (7, 1), dtype).zero_()
    assert not tensors[0].any()


def test_tied_storages_stay_tied_and_parameters_stay_parameters():
    arena = SharedArena()
    flat = torch.randn(20)
    head, tail, tied = torch.nn.Parameter(flat[:12].view(3, 4)), torch.nn.Parameter(flat[10:]), torch.nn.Parameter(flat[:12])
    grad = torch.ones(3, 4)
    head.grad = grad
    arena.share([head, tail, tied])
    with torch.no_grad():
        head[2, 3] = 42.0
    assert tail[1] == 42.0
    assert tied[11] == 42.0
    assert isinstance(head, torch.nn.Parameter)
    assert head.grad is grad
    assert len(arena.descriptors()) == 1
    again = head.data_ptr()
    arena.share([head, tail])
    assert head.data_ptr() == again


def test_what_cannot_be_shared_is_refused():
    arena = SharedArena()
    with pytest.raises(InputError, match="only dense CPU tensors"):
        arena.share([torch.eye(3).to_sparse()])
    with pytest.raises(InputError, match="on meta"):
        arena.share([torch.empty(3, device="meta")])


def test_parameters_give_their_segment_back_when_the_last_one_dies():
    arena = SharedArena()
    first, second = torch.ones(100), torch.ones(100)
    arena.share([first, second])
    (ident, _, _) = arena.descriptors()[0]
    del first
    arena.trim()
    assert arena.total_bytes() > 0
    view = second[3:]
    del second
    arena.trim()
    assert view.tolist() == [1.0] * 97
    del view
    arena.trim()
    assert arena.total_bytes() == 0
    assert arena.retired == [ident]


def test_a_block_returns_when_its_storage_dies_not_its_tensor():
    arena = SharedArena()
    tensor = arena.empty((64, 64), torch.float32)
    address = tensor.data_ptr()
    view, array = tensor[1:2], None
    del tensor
    assert arena.empty((64, 64), torch.float32).data_ptr() != address
    array = view.numpy()
    del view
    assert arena.live_blocks() == 1
    del array
    assert arena.live_blocks() == 0
    assert arena.empty((64, 64), torch.float32).data_ptr() == address


def test_memory_of_one_size_can_be_used_for_another():
    arena = SharedArena()
    for size in (1, 3, 7, 11):
        blocks = [arena.empty((size << 20,), torch.uint8) for _ in range(2)]
        del blocks
    assert arena.total_bytes() == SEGMENT_BYTES


def test_allocated_tensors_are_no_views_and_may_be_changed_in_place_under_autograd():
    arena = SharedArena()
    (a, b), _ = arena.allocate(BlockPlan.of([((2, 3), torch.float32), ((4,), torch.float32)]))
    assert a._base is None
    a.fill_(1.0)
    b.fill_(2.0)
    weight = torch.ones(2, 3, requires_grad=True)
    a.mul_(weight)
    a.sum().backward()
    assert weight.grad.tolist() == [[1.0] * 3] * 2
    assert b.tolist() == [2.0] * 4


def test_small_tensors_share_a_block_and_large_ones_do_not():
    arena = SharedArena()
    large = (PACKED_BYTES // 4,)
    tensors, places = arena.allocate(
        BlockPlan.of([((3,), torch.float32), ((), torch.int64), (large, torch.float32), ((0, 2), torch.bool)])
    )
    assert arena.live_blocks() == 2
    mapped = other_side(arena)
    for k, tensor in enumerate(tensors):
        tensor.fill_(k + 1)
        where = Location(places[2 * k], places[2 * k + 1])
        assert torch.equal(mapped.tensor(where, tensor.shape, tensor.stride(), tensor.dtype), tensor)
    del tensors[2], tensor
    assert arena.live_blocks() == 1


def test_a_kept_scalar_does_not_stop_memory_from_being_used_again():
    arena = SharedArena()
    kept = []
    for size in range(1, 200):
        kept.append(arena.empty((), torch.float32))
        arena.empty((size, 1000), torch.float32)
    assert arena.total_bytes() <= SEGMENT_BYTES


def test_a_tensor_larger_than_a_segment_gets_its_own():
    arena = SharedArena()
    big = arena.empty((SEGMENT_BYTES + 1,), torch.uint8)
    big[-1] = 7
    assert other_side(arena).read(Location(arena.newest(), SEGMENT_BYTES), 1) == b"\x07"


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3000), st.sampled_from(DTYPES), st.integers(0, 5)), max_size=40))
def test_live_tensors_never_overlap(steps):
    arena = SharedArena()
    live: list[torch.Tensor] = []
    for numel, dtype, drop in steps:
        tensors, _ = arena.allocate(BlockPlan.of([((numel,), dtype), ((2,), dtype)]))
        live += tensors
        del tensors
        if drop < len(live):
            del live[drop]
        spans = sorted((t.data_ptr(), t.data_ptr() + t.numel() * t.element_size()) for t in live if t.numel())
        assert all(stop <= start for (_, stop), (start, _) in itertools.pairwise(spans))
        assert all(t.data_ptr() % ALIGNMENT == 0 for t in live if t.numel())
    live.clear()
    assert arena.live_blocks() == 0


@given(st.integers(0, 1 << 40))
def test_size_classes_waste_at_most_a_quarter(nbytes):
    rounded = size_class(nbytes)
    assert rounded >= max(nbytes, 1)
    assert rounded % ALIGNMENT == 0
    assert rounded <= max(nbytes * 1.25, nbytes + ALIGNMENT)
    assert size_class(rounded) == rounded


def test_an_arena_that_dies_before_its_tensors_leaves_them_usable():
    gc.collect()
    arena = SharedArena()
    tensor = arena.empty((8,), torch.float32)
    gone = weakref.ref(arena)
    ((_, fd, _),) = arena.descriptors()
    inode = os.fstat(fd).st_ino
    del arena
    gc.collect()
    assert gone() is None
    assert tensor.fill_(3.0).sum() == 24
    del tensor
    gc.collect()
    links = (Path("/proc/self/fd") / name for name in os.listdir("/proc/self/fd"))
    assert inode not in [link.stat().st_ino for link in links if link.exists()]
