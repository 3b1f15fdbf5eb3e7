"""Messages of a pipeline over shared memory and gloo: by tag, in any order, with the maker's strides, in buffers used again."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from gloo_pair import run_pair, world_of_two
from hypothesis import given, settings
from hypothesis import strategies as st

from hocket.runtime.communicator import Pending, SingleCommunicator
from hocket.runtime.exchange import SPIN_CROWDED, Exchange, exchange_bytes
from hocket.runtime.mail import CELL_BYTES, CELLS
from hocket.runtime.mesh import Mesh
from hocket.runtime.schedule.links import MESSAGE_WIDTH, BufferPool, CommunicatorLink, GlooLink, Link, ShmLink
from hocket.runtime.schedule.stage import ValueSpec
from hocket.runtime.transports.shm import ShmTransport
from hocket.runtime.transports.transport import TransportTimeout


def spec_of(name: str, tensor: torch.Tensor) -> ValueSpec:
    return ValueSpec(name, tuple(tensor.shape), tensor.dtype, tensor.stride())


@pytest.fixture
def pair() -> Iterator[tuple[ShmLink, ShmLink]]:
    """Both ends in this process: whoever is asked for something does its own moves."""
    with_pair = _pair()
    yield with_pair
    for link in with_pair:
        link.finish()


def _pair(timeout: float = 60.0) -> tuple[ShmLink, ShmLink]:
    mesh, fd = Mesh.parse("pp=2"), os.memfd_create("links")
    os.ftruncate(fd, exchange_bytes(mesh))
    ends = [ShmLink(ShmTransport(Exchange(os.dup(fd), mesh, rank, SPIN_CROWDED), timeout), "pp") for rank in range(2)]
    os.close(fd)
    return ends[0], ends[1]


def test_a_message_keeps_values_shapes_and_strides(pair: tuple[ShmLink, ShmLink]) -> None:
    sent = [torch.randn(3, 4, 5).permute(2, 0, 1), torch.arange(6).view(2, 3), torch.tensor(2.5), torch.empty(0, 4)]
    specs = [spec_of(str(i), tensor) for i, tensor in enumerate(sent)]
    pair[1].post(7, 0, specs)
    assert pair[1].ready(7) is False
    pair[0].send(7, 1, specs, sent)
    assert pair[1].ready(7) is True
    found = pair[1].take(7)
    for tensor, expected in zip(found, sent, strict=True):
        assert torch.equal(tensor, expected)
        assert tensor.stride() == expected.stride()


@settings(max_examples=20, deadline=None)
@given(order=st.permutations(range(5)), sizes=st.lists(st.integers(1, 40), min_size=5, max_size=5), post_first=st.booleans())
def test_tags_find_their_messages_whatever_the_order(order: list[int], sizes: list[int], *, post_first: bool) -> None:
    pair = _pair()
    tensors = [torch.full((size,), float(tag)) for tag, size in enumerate(sizes)]
    specs = [[spec_of("x", tensor)] for tensor in tensors]

    def post() -> None:
        for tag in order:
            pair[1].post(tag, 0, specs[tag])

    if post_first:
        post()
    for tag, tensor in enumerate(tensors):
        pair[0].send(tag, 1, specs[tag], [tensor])
    if not post_first:
        post()
    for tag in order:
        assert torch.equal(pair[1].take(tag)[0], tensors[tag])
    pair[0].finish()


def test_a_message_larger_than_the_ring_arrives_whole() -> None:
    pair = _pair()
    large = torch.arange(CELLS * CELL_BYTES // 4 + 1000, dtype=torch.float32)
    specs, found = [spec_of("x", large)], []

    def receive() -> None:
        pair[1].post(0, 0, specs)
        found.extend(pair[1].take(0))

    thread = threading.Thread(target=receive)
    pair[0].send(0, 1, specs, [large])
    thread.start()
    pair[0].finish()
    thread.join(60)
    assert torch.equal(found[0], large)


def test_a_message_that_never_comes_is_an_error_that_names_it() -> None:
    _, reader = _pair(timeout=0.05)
    reader.post(3, 0, [spec_of("x", torch.empty(2))])
    with pytest.raises(TransportTimeout, match=r"rank 0 to send message 192 of axis 'pp'"):
        reader.take(3)


def test_a_buffer_is_used_again_once_nobody_sees_its_memory() -> None:
    pool = BufferPool()
    first = pool.take((4,), torch.float32)
    view = first[1:]
    place = first.data_ptr()
    del first
    assert pool.take((4,), torch.float32).data_ptr() != place  # the view still shows it
    del view
    assert pool.take((4,), torch.float32).data_ptr() == place
    assert pool.size == 2


class _Telling(SingleCommunicator):
    """One that knows which of its messages are there."""

    def __init__(self) -> None:
        super().__init__()
        self.there: set[int] = set()

    def recv(self, like: torch.Tensor, peer: int, tag: int, axis: str) -> Pending:
        del like, peer, axis
        return tag

    def arrived(self, pending: Pending) -> bool | None:
        return None if pending == 2 * MESSAGE_WIDTH else pending in self.there


def test_a_rank_knows_of_a_message_when_its_communicator_does() -> None:
    network = _Telling()
    link = CommunicatorLink(network, "pp")
    for tag in (1, 2):
        link.post(tag, 0, [spec_of("x", torch.empty(2))] * 2)
    assert link.ready(1) is False
    network.there = {MESSAGE_WIDTH}
    assert link.ready(1) is False, "half of it"
    network.there = {MESSAGE_WIDTH, MESSAGE_WIDTH + 1}
    assert link.ready(1) is True
    assert link.ready(2) is None
    silent = CommunicatorLink(SingleCommunicator(), "pp")
    assert silent.ready(3) is None


def _steps(link: Link, rank: int) -> dict[str, object]:
    """Five rounds of two messages each way, taken in another order than sent."""
    other, sums = 1 - rank, []
    layouts = [torch.empty(4, 3).t(), torch.empty(5)]
    for turn in range(5):
        for tag, tensor in enumerate(layouts):
            link.post(2 * turn + tag, other, [spec_of("x", tensor)] * 2)
        for tag, tensor in enumerate(layouts):
            value = torch.empty_strided(tensor.shape, tensor.stride()).fill_(float(100 * rank + 10 * turn + tag))
            link.send(2 * turn + tag, other, [spec_of("x", value)] * 2, [value, value + 0.5])
        for tag in (1, 0):
            left, right = link.take(2 * turn + tag)
            assert left.stride() == layouts[tag].stride()
            sums.append((float(left.flatten()[0]), float((right - left).sum())))
    link.finish()
    assert isinstance(link, GlooLink)
    return {"sums": sums, "buffers": link.pool.size}


def rank_main(rank: int, folder: str) -> None:
    """One rank over gloo, its results into a file."""
    with world_of_two(rank, folder):
        torch.save(_steps(GlooLink((0, 1)), rank), f"{folder}/rank{rank}.pt")


def test_gloo_does_the_same_between_two_processes_and_uses_its_buffers_again(tmp_path: Path) -> None:
    for rank, found in enumerate(run_pair(rank_main, tmp_path)):
        expected = [(float(100 * (1 - rank) + 10 * turn + tag), 0.5 * size) for turn in range(5) for tag, size in ((1, 5), (0, 12))]
        assert found["sums"] == expected
        assert found["buffers"] <= 6, "two tensors of two shapes, and those that the last message still shows"
