"""The simulated transport keeps what the protocol promises and no more, finds races and deadlocks, and repeats itself."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hocket.runtime.mesh import Mesh
from hocket.runtime.transports.sim import SimTransport, simulate
from hocket.runtime.transports.sim_world import SimWorld
from hocket.runtime.transports.transport import TransportError, TransportTimeout


def add_everything(t: SimTransport, epochs: int = 2) -> list[float]:
    """Every rank puts its number into its row at every peer, and adds up what it got; then the buffer serves again."""
    members = t.mesh.group("d", t.rank)
    parts, own = len(members), members.index(t.rank)
    rows = t.symmetric("rows", (parts, 2), torch.float64, "d")
    found = []
    for epoch in range(1, epochs + 1):
        if epoch > 1:
            for peer in range(parts):
                t.wait(peer, 1, epoch - 1, "d")
        for peer in range(parts):
            t.put(rows, peer, torch.full((1, 2), float(epoch * 10**own)), row=own)
            t.signal(peer, 0, epoch, "d")
        for peer in range(parts):
            t.wait(peer, 0, epoch, "d")
        found.append(float(rows.local[:, 1].sum()))
        for peer in range(parts):
            t.signal(peer, 1, epoch, "d")
    return found


def pass_around(t: SimTransport) -> float:
    """A ring that adds to the owner of a chunk in place: the next rank is told by the one before it."""
    members = t.mesh.group("d", t.rank)
    parts, own = len(members), members.index(t.rank)
    total = t.symmetric("total", (1,), torch.float64, "d")
    for step in range(1, parts + 1):
        if step > 1:
            t.wait((own - 1) % parts, 0, step - 1, "d")
        total.at((own - step) % parts).add_(10.0**own)
        t.signal((own + 1) % parts, 0, step, "d")
    t.barrier("d")
    return float(total.local)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**6), parts=st.integers(2, 4))
def test_a_correct_schedule_gives_the_same_result_in_every_order(seed: int, parts: int) -> None:
    everybody = float(sum(10**rank for rank in range(parts)))
    mesh = Mesh.parse(f"d={parts}")
    assert simulate(mesh, add_everything, seed) == [[everybody, 2 * everybody]] * parts
    assert simulate(mesh, pass_around, seed) == [everybody] * parts


def test_reading_without_waiting_for_the_signal_is_found() -> None:
    def work(t: SimTransport) -> float:
        buffer = t.symmetric("x", (1,), torch.float32, "d")
        t.put(buffer, 1 - t.rank, torch.ones(1))
        t.signal(1 - t.rank, 0, 1, "d")
        return float(buffer.local)

    results = [tuple(simulate(Mesh.parse("d=2"), work, seed)) for seed in range(40)]
    assert any(0.0 in result for result in results)
    assert any(result == (1.0, 1.0) for result in results)


def test_overwriting_what_a_peer_has_not_read_is_found() -> None:
    def work(t: SimTransport) -> list[float]:
        buffer = t.symmetric("x", (1,), torch.float32, "d")
        found = []
        for epoch in (1, 2):
            t.put(buffer, 1 - t.rank, torch.full((1,), float(epoch)))
            t.signal(1 - t.rank, 0, epoch, "d")
            t.wait(1 - t.rank, 0, epoch, "d")
            found.append(float(buffer.local))
        return found

    results = [simulate(Mesh.parse("d=2"), work, seed) for seed in range(60)]
    assert any([2.0, 2.0] in result for result in results)


def test_a_dropped_signal_is_a_deadlock_that_says_who_waits_for_what() -> None:
    def work(t: SimTransport) -> None:
        if t.rank:
            t.wait(0, 4, 1, "d")

    with pytest.raises(TransportTimeout, match=r"rank 1 waits for rank 0 to signal 1 in slot 4 of axis 'd'"):
        simulate(Mesh.parse("d=2"), work)


def test_the_cause_is_raised_not_its_shadow() -> None:
    def work(t: SimTransport) -> None:
        if t.rank == 1:
            raise ZeroDivisionError("the cause")
        t.barrier("d")

    with pytest.raises(ZeroDivisionError, match="the cause"):
        simulate(Mesh.parse("d=3"), work)


def test_signals_that_do_not_grow_and_different_buffers_are_refused() -> None:
    def backwards(t: SimTransport) -> None:
        t.signal(1 - t.rank, 0, 2, "d")
        t.signal(1 - t.rank, 0, 2, "d")

    with pytest.raises(TransportError, match="not more than before"):
        simulate(Mesh.parse("d=2"), backwards)

    def different(t: SimTransport) -> None:
        t.symmetric("x", (1 + t.rank,), torch.float32, "d")

    with pytest.raises(TransportError, match="makes buffer"):
        simulate(Mesh.parse("d=2"), different)


def test_messages_keep_their_order_and_find_their_tags() -> None:
    def work(t: SimTransport) -> list[float]:
        for i in range(4):
            t.isend(torch.tensor([float(10 * t.rank + i)]), 1 - t.rank, i % 2, "d")
        asked = [t.irecv(torch.empty(1), 1 - t.rank, i % 2, "d") for i in range(4)]
        return [float(asked[i].wait()) for i in (3, 1, 0, 2)]

    for seed in range(10):
        assert simulate(Mesh.parse("d=2"), work, seed) == [[13.0, 11.0, 10.0, 12.0], [3.0, 1.0, 0.0, 2.0]]


def test_one_seed_is_one_run() -> None:
    def events(seed: int) -> list[str]:
        world = SimWorld(Mesh.parse("d=3"), seed)
        world.run(lambda rank: add_everything(SimTransport(world, rank)))
        return world.events

    assert events(5) == events(5)
    assert events(5) != events(6)


def test_axes_of_a_mesh_have_groups_of_their_own() -> None:
    def work(t: SimTransport) -> tuple[float, float]:
        found = []
        for axis in ("a", "b"):
            buffer = t.symmetric(axis, (1,), torch.float32, axis)
            for peer in range(2):
                t.accumulate(buffer, peer, torch.full((1,), float(t.rank)))
                t.signal(peer, 0, 1, axis)
            for peer in range(2):
                t.wait(peer, 0, 1, axis)
            found.append(float(buffer.local))
        return found[0], found[1]

    assert simulate(Mesh.parse("a=2,b=2"), work, 3) == [(2.0, 1.0), (4.0, 1.0), (2.0, 5.0), (4.0, 5.0)]
