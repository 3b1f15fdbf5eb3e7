"""The emulated link: nothing is seen before a wire of that latency and bandwidth has delivered it, and all of it is seen then."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest
import torch
from thread_world import thread_world

import hocket
from hocket.compiler.cost.cluster import COLLECTIVES
from hocket.compiler.cost.timing import repeated_collective
from hocket.compiler.emit import emit
from hocket.compiler.redistribute import StepKind
from hocket.runtime.engines.local import LocalEngine
from hocket.runtime.errors import InputError
from hocket.runtime.mesh import Mesh
from hocket.runtime.transports.link import LinkSpec, LinkTransport, VirtualWire, check_transport
from hocket.runtime.transports.shm import ShmTransport
from hocket.runtime.transports.transport import TransportTimeout

SLOW = LinkSpec(0.02, 1e6)
"""A kilobyte takes a millisecond; the first byte twenty."""


def world(spec: LinkSpec, work: Callable[[LinkTransport], object], timeout: float = 60.0, ranks: int = 2) -> list[object]:
    """Run ``work`` on every rank, a thread each; timeouts are results."""
    mesh = Mesh((("d", ranks),))
    return thread_world(mesh, lambda exchange: work(LinkTransport(ShmTransport(exchange, timeout), spec)), TransportTimeout)


def test_a_signal_is_not_seen_before_its_bytes_could_be_there() -> None:
    """Two messages: the second leaves when the first has left."""

    def work(t: LinkTransport) -> list[float]:
        buffer = t.symmetric("x", (4, 500), torch.float32, "d")
        t.shm.barrier("d")
        start = time.monotonic()
        if t.rank == 0:
            t.put(buffer, 1, torch.ones(2, 500))
            t.signal(1, 0, 1, "d")
            buffer.at(1)[2:].fill_(2)
            t.signal(1, 1, 1, "d", nbytes=4000)
            t.shm.signal(1, 2, int(start * 1e9), "d")
            return []
        t.shm.wait(0, 2, 1, "d")
        sent = t.shm._words[t.shm._group("d").inbound[0] + 2] / 1e9
        found = []
        for slot in (0, 1):
            t.wait(0, slot, 1, "d")
            found.append(time.monotonic() - sent)
        assert buffer.local.sum() == 3000
        return found

    first, second = world(SLOW, work)[1]
    assert first >= 0.024
    assert second >= 0.028


def test_a_signal_under_way_is_not_there_yet() -> None:
    def work(t: LinkTransport) -> bool:
        if t.rank == 0:
            t.signal(1, 7, 3, "d")
            t.shm.signal(1, 8, 1, "d")
            return True
        t.shm.wait(0, 8, 1, "d")
        return t.test(0, 7, 3, "d")

    assert world(LinkSpec(30.0, 1e9), work) == [True, False]


def test_many_signals_in_one_slot_lose_nothing() -> None:
    def work(t: LinkTransport) -> list[float]:
        buffer, found = t.symmetric("x", (1,), torch.float64, "d"), []
        for epoch in range(1, 40):
            t.put(buffer, 1 - t.rank, torch.tensor([10.0 * epoch + t.rank], dtype=torch.float64))
            t.signal(1 - t.rank, 5, epoch, "d")
            t.wait(1 - t.rank, 5, epoch, "d")
            found.append(float(buffer.local))
            t.barrier("d")
        return found

    assert world(LinkSpec(1e-5, 1e9), work) == [[10.0 * e + other for e in range(1, 40)] for other in (1, 0)]


def test_messages_keep_their_order_and_take_their_time() -> None:
    def work(t: LinkTransport) -> list[float]:
        start = time.monotonic()
        sends = [t.isend(torch.full((250,), float(k)), 1 - t.rank, 9, "d") for k in range(3)]
        received = [t.irecv(torch.empty(250), 1 - t.rank, 9, "d") for _ in range(3)]
        found = [float(r.wait()[0]) for r in received]
        for send in sends:
            send.wait()
        return [*found, float(time.monotonic() - start > 0.0)]

    assert world(LinkSpec(1e-4, 1e7), work) == [[0.0, 1.0, 2.0, 1.0]] * 2


def test_reading_from_a_peer_takes_the_way_there_and_back() -> None:
    def work(t: LinkTransport) -> bool:
        buffer = t.symmetric("x", (1000,), torch.float32, "d")
        buffer.local.fill_(t.rank)
        t.barrier("d")
        start = time.monotonic()
        got = t.get(buffer, 1 - t.rank, torch.empty(1000))
        return time.monotonic() - start >= 0.044 and bool((got == 1 - t.rank).all())

    assert world(SLOW, work) == [True, True]


def test_a_delivery_that_would_come_too_late_is_a_timeout_that_says_so() -> None:
    def work(t: LinkTransport) -> object:
        if t.rank == 0:
            t.signal(1, 0, 1, "d")
            return None
        t.wait(0, 0, 1, "d", timeout=0.05)
        return None

    error = world(LinkSpec(1000.0, 1e9), work)[1]
    assert isinstance(error, TransportTimeout)
    assert "rank 0 has sent it" in str(error)


def test_messages_leave_one_after_the_other() -> None:
    wire = VirtualWire(LinkSpec(1.0, 1e3))
    first, second, twice = wire.arrival(1000), wire.arrival(2000), wire.arrival(0, hops=2)
    assert second - first == 2_000_000_000
    assert twice - second == 1_000_000_000


def test_a_link_is_text() -> None:
    assert LinkSpec.parse("link:20us,1.5GB/s") == LinkSpec(2e-5, 1.5e9)
    assert LinkSpec.parse(str(LinkSpec(2e-5, 1.5e9))) == LinkSpec(2e-5, 1.5e9)
    assert check_transport("auto") == ""


@pytest.mark.parametrize("text", ["link:", "link:20,1GB/s", "link:-1us,1GB/s", "link:1us,0GB/s", "link:1us,1e999B/s", "rdma"])
def test_what_is_no_link_is_refused(text: str) -> None:
    with pytest.raises(InputError, match="link"):
        check_transport(text)


def test_only_local_ranks_emulate_a_link() -> None:
    with pytest.raises(InputError, match="engine='local'"):
        hocket.parallelize(torch.nn.Linear(4, 4), "tp=2", engine="sim", transport="link:1us,1GB/s")


class Block(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = torch.nn.Linear(16, 32), torch.nn.Linear(32, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(x + self.down(torch.relu(self.up(x))))


def test_steps_over_a_link_equal_eager_and_take_their_time() -> None:
    """With the collectives as they are, and in tile loops: what is summed at the end of the block must go there and back."""
    torch.manual_seed(0)
    model, x = Block(), torch.randn(8, 16)
    always = hocket.OverlapTiles(least_gain=-1e9)
    cut = {"up.weight": "tp:S(0)", "down.weight": "tp:S(1)"}
    with LocalEngine(Mesh.parse("tp=2"), threads=1, transport="link:30ms,1GB/s") as engine:
        for tactics in ([hocket.TensorParallel("tp")], [hocket.TensorParallel("tp"), always]):
            parallel = hocket.parallelize(model, "tp=2", (x,), tactics=tactics, constraints=cut, engine=engine)
            kinds = {kind for wire in engine.wire() for kind in wire.sent}
            start = time.monotonic()
            torch.testing.assert_close(parallel(x), model(x))
            assert time.monotonic() - start >= 0.03, kinds
            parallel(x).sum().backward()


@pytest.mark.parametrize("kind", list(COLLECTIVES))
def test_every_collective_takes_its_way(kind: StepKind) -> None:
    """Three that need each other: three latencies, twice as many where sums come back."""
    with LocalEngine(Mesh.parse("d=2"), threads=1, transport="link:10ms,1GB/s") as engine:
        handle = engine.load(emit(repeated_collective(kind, 64, 3, engine)), {})
        engine.forward(handle, [torch.ones(64)])
        start = time.monotonic()
        engine.forward(handle, [torch.ones(64)])
        assert time.monotonic() - start >= (0.06 if kind is StepKind.ALL_REDUCE else 0.03)
