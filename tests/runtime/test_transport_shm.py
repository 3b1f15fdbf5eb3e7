"""The shared-memory transport: puts become visible with their signal, every wait ends, messages keep their order."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from thread_world import thread_world

from hocket.runtime.mail import CELL_BYTES, CELLS
from hocket.runtime.mesh import Mesh
from hocket.runtime.transports.shm import ShmTransport
from hocket.runtime.transports.transport import TransportError, TransportTimeout


def world(mesh: Mesh, work: Callable[[ShmTransport], object], timeout: float = 60.0) -> list[object]:
    """Run ``work`` on every rank, a thread each; transport errors are results."""
    return thread_world(mesh, lambda exchange: work(ShmTransport(exchange, timeout)), TransportError)


def test_what_was_put_before_a_signal_is_there_after_the_wait() -> None:
    def work(t: ShmTransport) -> list[float]:
        parts = 3
        buffer = t.symmetric("x", (parts, 5), torch.float32, "d")
        found = []
        for epoch in range(1, 30):
            for peer in range(parts):
                t.put(buffer, peer, torch.full((1, 5), float(t.rank + 10 * epoch)), row=t.rank)
                t.signal(peer, 0, epoch, "d")
            for peer in range(parts):
                t.wait(peer, 0, epoch, "d")
            found.append(float(buffer.local.sum()))
            t.barrier("d")
        return found

    expected = [5 * (0 + 1 + 2 + 30 * epoch) for epoch in range(1, 30)]
    assert world(Mesh.parse("d=3"), work) == [expected] * 3


def test_a_peers_copy_can_be_written_read_and_added_to_in_place() -> None:
    def work(t: ShmTransport) -> tuple[list[float], list[float]]:
        buffer = t.symmetric("x", (4,), torch.float64, "d")
        t.barrier("d")
        torch.mul(torch.arange(4.0, dtype=torch.float64), t.rank + 1, out=buffer.at(1 - t.rank))
        t.signal(1 - t.rank, 3, 1, "d")
        t.wait(1 - t.rank, 3, 1, "d")
        t.accumulate(buffer, t.rank, torch.ones(2, dtype=torch.float64), row=2)
        t.barrier("d")
        got = t.get(buffer, 1 - t.rank, torch.empty(2, dtype=torch.float64), row=2)
        return buffer.local.tolist(), got.tolist()

    assert world(Mesh.parse("d=2"), work) == [([0, 2, 5, 7], [3, 4]), ([0, 1, 3, 4], [5, 7])]


def test_buffers_of_different_groups_and_names_lie_apart() -> None:
    def work(t: ShmTransport) -> list[float]:
        buffers = [t.symmetric(name, (3,), torch.float32, axis) for axis in ("a", "b") for name in ("x", "y")]
        for number, buffer in enumerate(buffers):
            buffer.local.fill_(10 * t.rank + number)
        t.barrier("a")
        t.barrier("b")
        return [float(buffer.at(peer)[2]) for buffer in buffers for peer in (0, 1)]

    found = world(Mesh.parse("a=2,b=2"), work)
    assert found[0] == [0, 20, 1, 21, 2, 12, 3, 13]
    assert found[3] == [10, 30, 11, 31, 22, 32, 23, 33]


def test_released_memory_is_used_again_and_new_buffers_are_zero() -> None:
    def work(t: ShmTransport) -> tuple[float, int]:
        first = t.symmetric("x", (1000,), torch.float32, "d")
        address = first.local.data_ptr() - first.at(0).data_ptr()
        first.local.fill_(7)
        place = first.where[0]
        t.release(first)
        second = t.symmetric("x", (1000,), torch.float32, "d")
        return float(second.local.abs().sum()) + address * 0, second.where[0] - place

    assert world(Mesh.parse("d=2"), work) == [(0.0, 0)] * 2


def test_ranks_that_make_different_buffers_are_told() -> None:
    def work(t: ShmTransport) -> object:
        return t.symmetric("x", (4 + t.rank,), torch.float32, "d")

    errors = world(Mesh.parse("d=2"), work, timeout=1.0)
    assert all(isinstance(error, TransportError) for error in errors)
    assert "another buffer" in str(errors[0])


def test_no_memory_is_one_error_that_names_the_buffer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hocket.runtime.exchange.available_bytes", lambda: 1 << 20)

    def work(t: ShmTransport) -> object:
        assert t.symmetric("small", (100,), torch.float32, "d").local.sum() == 0
        return t.symmetric("huge", (1 << 20,), torch.float32, "d")

    for error in world(Mesh.parse("d=2"), work, timeout=1.0):
        assert isinstance(error, TransportError)
        assert "'huge'" in str(error)


def test_a_peer_that_never_signals_or_comes_is_named() -> None:
    def work(t: ShmTransport) -> None:
        if t.rank == 0:
            t.wait(1, 5, 3, "d", timeout=0.2)

    error, nothing = world(Mesh.parse("d=2"), work)
    assert isinstance(error, TransportTimeout)
    assert "rank 1" in str(error)
    assert "slot 5" in str(error)
    assert nothing is None

    def meet(t: ShmTransport) -> None:
        if t.rank != 1:
            t.barrier("d", timeout=0.2)

    error, _, other = world(Mesh.parse("d=3"), meet)
    assert isinstance(error, TransportTimeout)
    assert "rank 1 at a barrier" in str(error)
    assert isinstance(other, TransportTimeout)


def test_a_late_signal_wakes_a_sleeper() -> None:
    def work(t: ShmTransport) -> bool:
        if t.rank == 1:
            threading.Event().wait(0.2)
            t.signal(0, 0, 1, "d")
            return True
        t.wait(1, 0, 1, "d", timeout=20)
        return t.test(1, 0, 1, "d")

    assert world(Mesh.parse("d=2"), work) == [True, True]


@settings(max_examples=15, deadline=None)
@given(
    sizes=st.lists(st.sampled_from([0, 1, 7, CELL_BYTES // 4, CELL_BYTES // 4 * 3 + 5]), min_size=1, max_size=6),
    tags=st.randoms(use_true_random=False),
)
def test_messages_arrive_whole_whatever_order_they_are_asked_for(sizes: list[int], tags: object) -> None:
    order = list(range(len(sizes)))
    tags.shuffle(order)  # type: ignore[attr-defined]

    def work(t: ShmTransport) -> list[bool]:
        peer = 1 - t.rank
        sent = [t.isend(torch.arange(size, dtype=torch.float32) + t.rank + i, peer, i, "d") for i, size in enumerate(sizes)]
        asked = {i: t.irecv(torch.empty(sizes[i]), peer, i, "d") for i in order}
        found = [torch.equal(asked[i].wait(), torch.arange(sizes[i], dtype=torch.float32) + peer + i) for i in order]
        for transfer in sent:
            transfer.wait()
        return found

    assert world(Mesh.parse("d=2"), work) == [[True] * len(sizes)] * 2


def test_a_message_larger_than_the_ring_travels_while_both_wait() -> None:
    count = (CELLS + 3) * CELL_BYTES // 4 + 1

    def work(t: ShmTransport) -> bool:
        peer = 1 - t.rank
        sending = t.isend(torch.arange(count, dtype=torch.float32), peer, 0, "d")
        got = t.irecv(torch.empty(count), peer, 0, "d").wait()
        sending.wait()
        return torch.equal(got, torch.arange(count, dtype=torch.float32))

    assert world(Mesh.parse("d=2"), work) == [True, True]


def test_a_message_of_another_size_is_refused() -> None:
    def work(t: ShmTransport) -> object:
        sending = t.isend(torch.ones(4), 1 - t.rank, 0, "d")
        sending.wait()
        t.barrier("d")
        with pytest.raises(ValueError, match="16"):
            t.irecv(torch.empty(5), 1 - t.rank, 0, "d").wait()
        return True

    assert world(Mesh.parse("d=2"), work) == [True, True]
