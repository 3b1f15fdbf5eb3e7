"""Collectives through shared memory: against what torch computes on the pieces, in any order of waiting, in chunks, late.

Ranks are threads here, each with a view of the same file; what they do is what processes do.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from thread_world import thread_world

from hocket.runtime.chunks import ExchangeError
from hocket.runtime.communicator import Wire
from hocket.runtime.exchange import SLOT_BYTES, SLOTS, Exchange
from hocket.runtime.mesh import Mesh
from hocket.runtime.shm import ShmCommunicator


class NoGloo(SimpleNamespace):
    """Stands for the communicator that takes what shared memory does not."""

    def flush(self) -> None:
        """Nothing to do."""


def world(mesh: Mesh, work: Callable[[ShmCommunicator], object], timeout: float = 60.0) -> list[object]:
    """Run ``work`` on every rank at once; errors of the exchange are results."""

    def run(exchange: Exchange) -> object:
        gloo = NoGloo(mesh=mesh, rank=exchange.rank, wire=Wire())
        return work(ShmCommunicator(gloo, exchange, timeout))

    return thread_world(mesh, run, ExchangeError)


def values(rank: int, rows: int, width: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    made = torch.arange(rows * width, dtype=torch.float64).reshape(rows, width)
    return ((made * 7 + rank * 13) % 11 - 5).to(dtype)


REDUCTIONS = {
    "sum": lambda stack: stack.sum(0),
    "avg": lambda stack: stack.mean(0),
    "max": lambda stack: stack.amax(0),
    "min": lambda stack: stack.amin(0),
    "product": lambda stack: stack.prod(0),
}


@settings(max_examples=25, deadline=None)
@given(
    parts=st.integers(2, 5),
    rows=st.integers(0, 4),
    width=st.integers(0, 5),
    op=st.sampled_from(sorted(REDUCTIONS)),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_every_collective_computes_what_its_formula_says(parts: int, rows: int, width: int, op: str, dtype: torch.dtype) -> None:
    def work(c: ShmCommunicator) -> list[torch.Tensor]:
        mine = values(c.rank, rows * parts, width, dtype)
        splits = [rows] * parts
        started = [
            c.all_reduce(mine, op, "d"),
            c.reduce_scatter(mine, op, "d"),
            c.all_gather(mine, "d"),
            c.all_to_all(mine, splits, splits, "d"),
        ]
        return [c.wait(pending) for pending in started]

    given_values = [values(rank, rows * parts, width, dtype) for rank in range(parts)]
    reduced = REDUCTIONS[op](torch.stack(given_values))
    for rank, (whole, piece, gathered, exchanged) in enumerate(world(Mesh.parse(f"d={parts}"), work)):  # type: ignore[misc]
        torch.testing.assert_close(whole, reduced)
        torch.testing.assert_close(piece, reduced[rank * rows : (rank + 1) * rows])
        torch.testing.assert_close(gathered, torch.cat(given_values))
        torch.testing.assert_close(exchanged, torch.cat([value[rank * rows : (rank + 1) * rows] for value in given_values]))


@pytest.mark.parametrize("extra", [-1, 0, 1, 1000])
def test_tensors_larger_than_all_slots_travel_in_chunks(extra: int) -> None:
    count = (SLOTS + 2) * SLOT_BYTES // 4 + extra

    def work(c: ShmCommunicator) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        mine = torch.arange(count, dtype=torch.float32) * (c.rank + 1)
        first, second = c.all_reduce(mine, "sum", "d"), c.all_gather(mine, "d")
        third = c.reduce_scatter(mine[: count // 2 * 2].view(2, -1), "sum", "d")
        return c.wait(second).clone(), c.wait(first).clone(), c.wait(third).clone()

    base = torch.arange(count, dtype=torch.float32)
    for rank, (gathered, summed, piece) in enumerate(world(Mesh.parse("d=2"), work)):  # type: ignore[misc]
        assert torch.equal(gathered, torch.cat([base, base * 2]))
        assert torch.equal(summed, base * 3)
        assert torch.equal(piece, (base[: count // 2 * 2] * 3).view(2, -1)[rank : rank + 1])


def test_sums_are_the_same_bits_on_every_rank() -> None:
    def work(c: ShmCommunicator) -> torch.Tensor:
        return c.wait(c.all_reduce(torch.randn(1000, generator=torch.Generator().manual_seed(c.rank)), "sum", "d"))

    first, *others = world(Mesh.parse("d=5"), work)
    assert all(torch.equal(first, other) for other in others)  # type: ignore[arg-type]


def test_waits_in_opposite_orders_on_two_axes_do_not_block_each_other() -> None:
    count = (SLOTS + 1) * SLOT_BYTES // 4  # does not fit: the rest goes out while its rank waits for something else

    def work(c: ShmCommunicator) -> tuple[float, float]:
        mine = torch.full((count,), float(c.rank))
        pending = {"a": c.all_reduce(mine, "sum", "a"), "b": c.all_reduce(mine, "sum", "b")}
        order = ("a", "b") if c.rank in (0, 3) else ("b", "a")
        found = {axis: float(c.wait(pending[axis])[-1]) for axis in order}
        return found["a"], found["b"]

    assert world(Mesh.parse("a=2,b=2"), work) == [(2.0, 1.0), (4.0, 1.0), (2.0, 5.0), (4.0, 5.0)]


def test_many_small_collectives_before_the_first_wait() -> None:
    def work(c: ShmCommunicator) -> list[float]:
        pending = [c.all_reduce(torch.tensor([float(i)]), "sum", "d") for i in range(5 * SLOTS)]
        return [float(c.wait(one)) for one in reversed(pending)]

    for found in world(Mesh.parse("d=3"), work):
        assert found == [3.0 * i for i in reversed(range(5 * SLOTS))]


def test_flush_finishes_what_nobody_waits_for() -> None:
    count = (SLOTS + 2) * SLOT_BYTES // 4

    def work(c: ShmCommunicator) -> float:
        pending = c.all_reduce(torch.ones(count), "sum", "d")
        c.flush()
        return float(c.wait(pending)[-1])

    assert world(Mesh.parse("d=2"), work) == [2.0, 2.0]


def test_a_late_rank_wakes_those_that_sleep() -> None:
    def work(c: ShmCommunicator) -> float:
        if c.rank == 1:
            threading.Event().wait(0.3)
        return float(c.wait(c.all_reduce(torch.ones(3), "sum", "d")).sum())

    assert world(Mesh.parse("d=3"), work) == [9.0] * 3


@pytest.mark.parametrize("other", ["shape", "dtype", "op"])
def test_ranks_in_different_collectives_are_told(other: str) -> None:
    def work(c: ShmCommunicator) -> torch.Tensor:
        odd = c.rank == 1
        mine = torch.ones(4 if odd and other == "shape" else 3, dtype=torch.float64 if odd and other == "dtype" else torch.float32)
        return c.wait(c.all_reduce(mine, "max" if odd and other == "op" else "sum", "d"))

    assert any(isinstance(result, ExchangeError) for result in world(Mesh.parse("d=2"), work, timeout=1.0))


def test_a_rank_that_never_comes_ends_the_wait() -> None:
    def work(c: ShmCommunicator) -> object:
        return None if c.rank else c.wait(c.all_reduce(torch.ones(3), "sum", "d"))

    error, nothing = world(Mesh.parse("d=2"), work, timeout=0.3)
    assert isinstance(error, ExchangeError)
    assert nothing is None


def test_bytes_are_counted_by_the_formula() -> None:
    def work(c: ShmCommunicator) -> dict[str, float]:
        mine = torch.ones(8, 3)
        for pending in (
            c.all_reduce(mine, "sum", "d"),
            c.reduce_scatter(mine, "sum", "d"),
            c.all_gather(mine, "d"),
            c.all_to_all(mine, [2] * 4, [2] * 4, "d"),
        ):
            c.wait(pending)
        return {kind: float(sent) for kind, sent in c.wire.sent.items()}

    expected = {"all_reduce": 144.0, "reduce_scatter": 72.0, "all_gather": 288.0, "all_to_all": 72.0}
    assert world(Mesh.parse("d=4"), work) == [expected] * 4


def test_messages_go_through_the_same_memory_and_flush_waits_for_them() -> None:
    count = 20 * SLOT_BYTES // 4 * 2  # more than fits on the way at once

    def work(c: ShmCommunicator) -> tuple[bool, bool, int]:
        pending = []
        if c.rank == 0:
            for tag in (1, 2):
                c.send(torch.arange(count, dtype=torch.float32) * tag, 1, tag, "d")
        else:
            pending = [(tag, c.recv(torch.empty(count), 0, tag, "d")) for tag in (2, 1)]
        summed = c.wait(c.all_reduce(torch.ones(2), "sum", "d"))  # messages move while their ranks wait for something else
        found = [bool(torch.equal(c.wait(one), torch.arange(count, dtype=torch.float32) * tag)) for tag, one in pending]
        c.flush()
        return all(found), bool((summed == 2).all()), int(c.wire.sent.get("send", 0))

    assert world(Mesh.parse("d=2"), work) == [(True, True, 2 * 4 * count), (True, True, 0)]
