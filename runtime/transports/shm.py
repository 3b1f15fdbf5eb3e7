"""The transport of ranks on one machine: symmetric buffers are one file that all of them map, a put is a copy, a signal a store.

Nothing moves by itself: a peer's copy is written in place, by the rank that puts. What the file holds is described in ``exchange``.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import Any

import torch

from ..exchange import Exchange, Heap
from ..mail import Mailbox, Message
from .buffers import SharedBuffer, ThroughViews, checked_slot, over
from .transport import SLOTS, Capability, LinkCost, Symmetric, TransportError, TransportTimeout

_BARRIER, _SPEC = SLOTS + 2, SLOTS + 3
_DEFAULT_COST = LinkCost(1.5e-5, 1.2e-10)


@dataclass
class _Group:
    """The ranks of one axis that this rank belongs to."""

    number: int
    members: tuple[int, ...]
    own: int
    heap: Heap
    inbound: tuple[int, ...]
    outbound: tuple[int, ...]
    barriers: int = 0
    specs: int = 0


@dataclass
class ShmTransfer:
    """See ``Transfer``."""

    transport: ShmTransport
    message: Message
    what: str

    def wait(self, timeout: float | None = None) -> torch.Tensor:
        """See ``Transfer``."""
        self.transport.until(lambda: self.message.done, timeout, lambda: self.what)
        return self.message.result


class ShmTransport(ThroughViews):
    """See ``Transport``. Made by every rank of the mesh; cost: measured figures, where there are some; tile_axes: how far the loops
    of each axis have come, for whoever runs them on these signals."""

    capabilities = frozenset({Capability.REMOTE_VIEW})

    def __init__(self, exchange: Exchange, timeout: float, cost: LinkCost = _DEFAULT_COST) -> None:
        self.mesh, self.rank, self.default_timeout = exchange.mesh, exchange.rank, timeout
        self._exchange = exchange
        self._words = exchange.words
        self._cost = cost
        self._groups: dict[str, _Group] = {}
        self._mail: dict[tuple[str, int], Mailbox] = {}
        self.tile_axes: dict[str, Any] = {}

    # --- buffers

    def symmetric(self, name: str, shape: tuple[int, ...], dtype: torch.dtype, axis: str) -> SharedBuffer:
        """See ``Transport``."""
        group = self._group(axis)
        numel = prod(shape)
        try:
            place, each, mapping = group.heap.take(numel * dtype.itemsize)
        except OSError as error:
            size = f"{numel * dtype.itemsize:,} bytes on each of {len(group.members)} ranks"
            raise TransportError(f"rank {self.rank}: no shared memory for buffer {name!r}, {size}: {error.strerror}") from error
        tensors = tuple(over(mapping, index * each, shape, dtype) for index in range(len(group.members)))
        buffer = SharedBuffer(name, tuple(shape), dtype, axis, group.own, tensors, (place, each))
        buffer.local.zero_()
        self._agree(group, buffer)
        return buffer

    def _agree(self, group: _Group, buffer: SharedBuffer) -> None:
        """Meet, and compare what is being made. Two words in turn: a rank can be one buffer ahead of another, not two."""
        group.specs += 1
        word = _SPEC + group.specs % 2
        spec = zlib.crc32(f"{buffer.name} {buffer.shape} {buffer.dtype}".encode())
        self._exchange.fence()
        for row in group.outbound:
            self._words[row + word] = group.specs << 32 | spec
        self._exchange.notify(group.members)
        for index, row in enumerate(group.inbound):
            self.until(
                lambda row=row: self._words[row + word] >> 32 >= group.specs,  # type: ignore[misc]
                None,
                lambda index=index: f"rank {group.members[index]} to make buffer {buffer.name!r}",  # type: ignore[misc]
            )
            if self._words[row + word] & 0xFFFFFFFF != spec:
                mine = f"{buffer.name!r} of {buffer.dtype}{list(buffer.shape)}"
                raise TransportError(f"rank {group.members[index]} makes another buffer than rank {self.rank}, which makes {mine}")

    def release(self, buffer: Symmetric) -> None:
        """See ``Transport``."""
        assert isinstance(buffer, SharedBuffer)
        self.barrier(buffer.axis)
        buffer.tensors = ()
        self._group(buffer.axis).heap.give_back(*buffer.where)

    # --- signals

    def signal(self, peer: int, slot: int, value: int, axis: str, nbytes: int = 0) -> None:  # noqa: ARG002  (takes no time of its own)
        """See ``Transport``."""
        group = self._group(axis)
        self._exchange.fence()
        self._words[group.outbound[peer] + checked_slot(slot)] = value
        self._exchange.notify((group.members[peer],))

    def test(self, peer: int, slot: int, value: int, axis: str) -> bool:
        """See ``Transport``."""
        return self._words[self._group(axis).inbound[peer] + checked_slot(slot)] >= value

    def wait(self, peer: int, slot: int, value: int, axis: str, timeout: float | None = None) -> None:
        """See ``Transport``."""
        group = self._group(axis)
        word = group.inbound[peer] + checked_slot(slot)
        words = self._words
        if words[word] < value:
            self.until(
                lambda: words[word] >= value,
                timeout,
                lambda: f"rank {group.members[peer]} to signal {value} in slot {slot} of axis {axis!r}, which holds {words[word]}",
            )

    def barrier(self, axis: str, timeout: float | None = None) -> None:
        """See ``Transport``."""
        group = self._group(axis)
        group.barriers += 1
        epoch = group.barriers
        self._exchange.fence()
        for row in group.outbound:
            self._words[row + _BARRIER] = epoch
        self._exchange.notify(group.members)

        def missing() -> list[int]:
            there = zip(group.members, group.inbound, strict=True)
            return [member for member, row in there if self._words[row + _BARRIER] < epoch]

        self.until(lambda: not missing(), timeout, lambda: f"rank {', '.join(map(str, missing()))} at a barrier of axis {axis!r}")

    # --- messages

    def isend(self, tensor: torch.Tensor, peer: int, tag: int, axis: str) -> ShmTransfer:
        """See ``Transport``."""
        message = self.mailbox(peer, axis).send(Message.of(tensor.contiguous(), tag))
        message.result = tensor
        return ShmTransfer(self, message, f"rank {self._group(axis).members[peer]} to take message {tag} of axis {axis!r}")

    def irecv(self, out: torch.Tensor, peer: int, tag: int, axis: str) -> ShmTransfer:
        """See ``Transport``. ``out`` must be contiguous."""
        message = self.mailbox(peer, axis).receive(Message.of(out, tag))
        return ShmTransfer(self, message, f"rank {self._group(axis).members[peer]} to send message {tag} of axis {axis!r}")

    def mailbox(self, peer: int, axis: str) -> Mailbox:
        """Messages from and to a peer."""
        found = self._mail.get((axis, peer))
        if found is None:
            group = self._group(axis)
            found = Mailbox(self._exchange, group.number, (self.rank, group.own), (group.members[peer], peer))
            self._mail[axis, peer] = found
            self._exchange.movers.append(found.move)
        return found

    # --- the rest

    def move(self) -> None:
        """Work on whatever is under way on this rank, as far as that goes without waiting."""
        for mover in self._exchange.movers:
            mover()

    def until(self, is_done: Callable[[], bool], timeout: float | None, what: Callable[[], str]) -> None:
        """Wait; TransportTimeout says what for."""
        limit = self.default_timeout if timeout is None else timeout
        if not self._exchange.until(is_done, limit):
            raise TransportTimeout(f"rank {self.rank} waited {limit:g} s for {what()}")

    def cost(self, axis: str) -> LinkCost:  # noqa: ARG002  (all pairs of one machine are alike)
        """See ``Transport``."""
        return self._cost

    def close(self) -> None:
        """See ``Transport``. The memory lives as long as tensors of its buffers do."""
        self._groups.clear()
        self._mail.clear()

    def _group(self, axis: str) -> _Group:
        found = self._groups.get(axis)
        if found is None:
            number = self.mesh.names.index(axis)
            members = self.mesh.group(axis, self.rank)
            own = members.index(self.rank)
            inbound = tuple(self._exchange.signal_word(self.rank, number, index) for index in range(len(members)))
            outbound = tuple(self._exchange.signal_word(member, number, own) for member in members)
            found = self._groups[axis] = _Group(number, members, own, Heap(self._exchange, number), inbound, outbound)
        return found
