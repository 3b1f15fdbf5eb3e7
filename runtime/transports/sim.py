"""A transport of ranks that are threads of one process, run one at a time in an order drawn from a seed, to find races.

    results = simulate(Mesh.parse("tp=4"), lambda transport: program(transport), seed=7)

At every call the running rank may lose its turn to any other that can go on. Puts and signals are on their way until they are
delivered, at any moment: signals of a pair in order, puts before the signal that follows them, in any order among themselves. That
is all the protocol promises, so a schedule that relies on more fails for some seed; the same seed gives the same run. When nobody
can go on, every rank gets a TransportTimeout that says what it waits for.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch

from ..mesh import Mesh
from .buffers import SharedBuffer, checked_slot
from .sim_world import Parcel, SimWorld
from .transport import SLOTS, Capability, LinkCost, Symmetric, TransportError

T = TypeVar("T")
_BARRIER = SLOTS


@dataclass
class SimTransfer:
    """See ``Transfer``."""

    transport: SimTransport
    tensor: torch.Tensor
    box: list[torch.Tensor]
    number: int
    what: str

    def wait(self, timeout: float | None = None) -> torch.Tensor:  # noqa: ARG002  (there is no time here)
        """See ``Transfer``."""
        self.transport.world.pause(self.transport.rank, lambda: len(self.box) > self.number, self.what)
        return self.tensor if self.number < 0 else self.tensor.copy_(self.box[self.number])


def simulate(mesh: Mesh, work: Callable[[SimTransport], T], seed: int = 0) -> list[T]:
    """Run ``work`` on every rank of a mesh and return the results in rank order. Raises what a rank raises, or TransportTimeout."""
    world = SimWorld(mesh, seed)
    return world.run(lambda rank: work(SimTransport(world, rank)))


class SimTransport:
    """One rank of a ``SimWorld``; see ``Transport``. Timeouts mean nothing here: what cannot happen any more is known at once."""

    capabilities = frozenset({Capability.REMOTE_VIEW, Capability.ASYNC_PROGRESS, Capability.REPEATABLE})

    def __init__(self, world: SimWorld, rank: int) -> None:
        self.world, self.rank, self.mesh, self.default_timeout = world, rank, world.mesh, 0.0
        self._made: dict[str, int] = {}
        self._barriers: dict[str, int] = {}
        self._asked: dict[tuple[int, str, int, int], int] = {}

    def symmetric(self, name: str, shape: tuple[int, ...], dtype: torch.dtype, axis: str) -> SharedBuffer:
        """See ``Transport``."""
        members = self._members(axis)
        number = self._made[axis] = self._made.get(axis, 0) + 1
        spec = f"{name!r} of {dtype}{list(shape)}"
        key = (axis, tuple(members), number)
        if key not in self.world.buffers:
            self.world.buffers[key] = (spec, tuple(torch.zeros(shape, dtype=dtype) for _ in members))
        other, tensors = self.world.buffers[key]
        self.barrier(axis)
        if other != spec:
            raise TransportError(f"rank {self.rank} makes buffer {spec}, another rank of axis {axis!r} makes {other}")
        return SharedBuffer(name, tuple(shape), dtype, axis, members.index(self.rank), tensors)

    def release(self, buffer: Symmetric) -> None:
        """See ``Transport``."""
        assert isinstance(buffer, SharedBuffer)
        self.barrier(buffer.axis)
        buffer.tensors = ()

    def put(self, buffer: Symmetric, peer: int, source: torch.Tensor, row: int = 0) -> None:
        """See ``Transport``."""
        self._move(buffer, peer, source, row, "put", lambda rows, value: rows.copy_(value))

    def accumulate(self, buffer: Symmetric, peer: int, source: torch.Tensor, row: int = 0) -> None:
        """See ``Transport``."""
        self._move(buffer, peer, source, row, "accumulate", lambda rows, value: rows.add_(value))

    def _move(
        self,
        buffer: Symmetric,
        peer: int,
        source: torch.Tensor,
        row: int,
        verb: str,
        apply: Callable[[torch.Tensor, torch.Tensor], object],
    ) -> None:
        rows, value = buffer.at(peer).narrow(0, row, source.shape[0]), source.to(buffer.dtype, copy=True)
        if rows.shape != value.shape:
            raise TransportError(f"rank {self.rank} puts {list(value.shape)} into {list(rows.shape)} of buffer {buffer.name!r}")
        what = f"{verb} {buffer.name!r} rows {row} to {row + source.shape[0]}"
        if peer == self._members(buffer.axis).index(self.rank):
            apply(rows, value)
            return

        def deliver() -> None:
            apply(rows, value)

        self.world.send(self.rank, self._members(buffer.axis)[peer], Parcel(deliver, ordered=False, what=what))

    def get(self, buffer: Symmetric, peer: int, out: torch.Tensor, row: int = 0) -> torch.Tensor:
        """See ``Transport``."""
        self.world.pause(self.rank, lambda: True, "its turn")
        return out.copy_(buffer.at(peer).narrow(0, row, out.shape[0]))

    def signal(self, peer: int, slot: int, value: int, axis: str, nbytes: int = 0) -> None:  # noqa: ARG002  (takes no time of its own)
        """See ``Transport``."""
        self._signal(peer, checked_slot(slot), value, axis)

    def _signal(self, peer: int, slot: int, value: int, axis: str) -> None:
        members = self._members(axis)
        word = (members[peer], axis, members.index(self.rank), slot)
        if value <= self.world.words.get((*word[:3], SLOTS + 1 + slot), 0):
            raise TransportError(f"rank {self.rank} signals {value} in slot {slot} of axis {axis!r}, which is not more than before")
        self.world.words[*word[:3], SLOTS + 1 + slot] = value

        def deliver() -> None:
            self.world.words[word] = value

        self.world.send(self.rank, members[peer], Parcel(deliver, ordered=True, what=f"signal {slot} = {value} of axis {axis}"))

    def test(self, peer: int, slot: int, value: int, axis: str) -> bool:
        """See ``Transport``."""
        self.world.pause(self.rank, lambda: True, "its turn")
        return self._has(peer, slot, value, axis)

    def _has(self, peer: int, slot: int, value: int, axis: str) -> bool:
        return self.world.words.get((self.rank, axis, peer, slot), 0) >= value

    def wait(self, peer: int, slot: int, value: int, axis: str, timeout: float | None = None) -> None:  # noqa: ARG002
        """See ``Transport``."""
        what = f"rank {self._members(axis)[peer]} to signal {value} in slot {slot} of axis {axis!r}"
        self.world.pause(self.rank, lambda: self._has(peer, slot, value, axis), what)

    def barrier(self, axis: str, timeout: float | None = None) -> None:  # noqa: ARG002
        """See ``Transport``."""
        members = self._members(axis)
        epoch = self._barriers[axis] = self._barriers.get(axis, 0) + 1
        for peer in range(len(members)):
            self._signal(peer, _BARRIER, epoch, axis)

        def all_here() -> bool:
            return all(self._has(peer, _BARRIER, epoch, axis) for peer in range(len(members)))

        self.world.pause(self.rank, all_here, f"the other ranks at a barrier of axis {axis!r}")

    def isend(self, tensor: torch.Tensor, peer: int, tag: int, axis: str) -> SimTransfer:
        """See ``Transport``."""
        members, value = self._members(axis), tensor.clone()
        box = self.world.messages.setdefault((members[peer], axis, self.rank, tag), [])
        self.world.send(self.rank, members[peer], Parcel(lambda: box.append(value), ordered=True, what=f"message {tag}"))
        return SimTransfer(self, tensor, box, -1, "its turn")

    def irecv(self, out: torch.Tensor, peer: int, tag: int, axis: str) -> SimTransfer:
        """See ``Transport``."""
        sender = self._members(axis)[peer]
        key = (self.rank, axis, sender, tag)
        box = self.world.messages.setdefault(key, [])
        number = self._asked[key] = self._asked.get(key, -1) + 1
        return SimTransfer(self, out, box, number, f"message {tag} from rank {sender}")

    def cost(self, axis: str) -> LinkCost:  # noqa: ARG002
        """See ``Transport``: nothing here takes time."""
        return LinkCost(0.0, 0.0)

    def close(self) -> None:
        """See ``Transport``."""

    def _members(self, axis: str) -> Sequence[int]:
        return self.mesh.group(axis, self.rank)
