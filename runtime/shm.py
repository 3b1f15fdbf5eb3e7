"""Collectives between ranks of one machine, through memory that all of them map (``exchange``).

    all_reduce        out = v[0] + v[1] + ...  every rank adds everybody's chunks, in rank order: the result is the same bits on all
    reduce_scatter    the same, each rank for its own piece
    all_gather        everybody's chunks side by side
    all_to_all        everybody's chunks for this rank side by side

A tensor travels in chunks; while a rank adds one chunk, the next ones are on their way. What is issued is published at once as far
as there is room, the rest and all results are worked off while the rank waits for any collective of any axis. So an operation that
was issued needs nothing from its rank but that it waits for something, sooner or later, and collectives may wait in any order.
"""

from __future__ import annotations

import time
import zlib
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from .communicator import Pending, wire_bytes
from .exchange import SLOT_BYTES, SLOTS, Exchange
from .gloo import GlooCommunicator, PendingWork

MOST_MEMBERS = 8
"""Every rank reads the chunks of all others, so beyond some group size the ring algorithms of gloo do less work."""

_SPINS = 40
"""Looks (about two microseconds each) before a rank goes to sleep. Few, since another rank may need this core."""

_NAP = 0.1
"""Seconds after which a sleeping rank looks up by itself, though nobody rang."""

_SHORT_NAP = 1e-4
"""The same while it waits for gloo as well, which rings no bell."""

_COMBINE: dict[str, Callable[..., torch.Tensor]] = {
    "sum": torch.add,
    "avg": torch.add,
    "max": torch.maximum,
    "min": torch.minimum,
    "product": torch.mul,
}


class ExchangeError(ConnectionError):
    """Ranks met in different collectives, or one did not come in time."""


@dataclass(eq=False)
class Transfer:
    """A collective under way.

    source: (pieces, n), what this rank gives, one row per receiver or a single row for all; target: (n,) to combine into, or
    (members, n) to lay side by side; combine: None to lay side by side; width: elements of a row in one chunk; first: number of
    its first chunk; result: what the caller gets, once ``left`` chunks are taken.
    """

    source: torch.Tensor
    target: torch.Tensor
    combine: Callable[..., torch.Tensor] | None
    result: torch.Tensor
    tag: int
    average: int = 0
    width: int = 0
    chunks: int = 0
    first: int = 0
    left: int = 0

    def __post_init__(self) -> None:
        rows, length = self.source.shape
        self.width = max(1, min(length, SLOT_BYTES // self.source.element_size() // rows))
        self.chunks = self.left = max(1, -(-length // self.width))

    def span(self, chunk: int) -> tuple[int, int]:
        """Elements of a row that a chunk holds: start and number."""
        start = (chunk - self.first) * self.width
        return start, min(self.width, self.source.shape[1] - start)


@dataclass(eq=False)
class _Channel:
    """A group of ranks along one axis. own: this rank's index in it."""

    exchange: Exchange
    axis: int
    members: tuple[int, ...]
    own: int
    others: tuple[int, ...] = ()
    published: int = 0
    taken: int = 0
    issued: int = 0
    outbox: deque[Transfer] = field(default_factory=deque)
    inbox: deque[Transfer] = field(default_factory=deque)

    def __post_init__(self) -> None:
        self.others = tuple(member for member in self.members if member != self.exchange.rank)

    def issue(self, transfer: Transfer) -> None:
        transfer.first = self.issued
        self.issued += transfer.chunks
        self.outbox.append(transfer)
        self.inbox.append(transfer)
        self.publish()

    def publish(self) -> bool:
        """Put chunks into slots as long as there is room."""
        moved = False
        while self.outbox and self._has_room():
            transfer, chunk = self.outbox[0], self.published
            start, length = transfer.span(chunk)
            rows = transfer.source.shape[0]
            slot = self.exchange.slot(self.exchange.rank, self.axis, chunk, transfer.source.dtype, (rows, length), (length, 1))
            slot.copy_(transfer.source.narrow(1, start, length))
            self.exchange.post(self.axis, chunk, transfer.tag)
            self.exchange.ring(self.others)
            self.published += 1
            if self.published == transfer.first + transfer.chunks:
                self.outbox.popleft()
            moved = True
        return moved

    def _has_room(self) -> bool:
        oldest = self.published - SLOTS
        return oldest < 0 or all(self.exchange.consumed(member, self.axis) > oldest for member in self.members)

    def take(self) -> bool:
        """Take chunks that everybody has posted."""
        moved = False
        exchange, axis = self.exchange, self.axis
        while self.inbox and self.taken < self.published and all(exchange.posted(m, axis) > self.taken for m in self.others):
            transfer, chunk = self.inbox[0], self.taken
            self._check(transfer, chunk)
            start, length = transfer.span(chunk)
            skip = self.own * length if transfer.source.shape[0] > 1 else 0
            dtype = transfer.source.dtype
            given = [exchange.slot(member, axis, chunk, dtype, (length,), (1,), skip) for member in self.members]
            if transfer.combine is None:
                for row, piece in zip(transfer.target, given, strict=True):
                    row.narrow(0, start, length).copy_(piece)
            else:
                into = transfer.target.narrow(0, start, length)
                transfer.combine(given[0], given[1], out=into)
                for piece in given[2:]:
                    transfer.combine(into, piece, out=into)
            exchange.consume(axis, chunk)
            exchange.ring(self.others)
            self.taken += 1
            transfer.left -= 1
            if not transfer.left:
                self.inbox.popleft()
                if transfer.average:
                    transfer.result.div_(transfer.average)
            moved = True
        return moved

    def _check(self, transfer: Transfer, chunk: int) -> None:
        odd = [member for member in self.others if self.exchange.tag(member, self.axis, chunk) != transfer.tag]
        if odd:
            raise ExchangeError(f"rank {odd[0]} sent a piece of another collective, shape or dtype than rank {self.exchange.rank}")


class ShmCommunicator:
    """See ``Communicator`` and the module. Point-to-point messages, broadcasts, unequal exchanges and large groups go by gloo."""

    def __init__(self, gloo: GlooCommunicator, exchange: Exchange, timeout: float) -> None:
        """timeout: seconds that one operation may take."""
        self.mesh, self.rank, self.wire = gloo.mesh, gloo.rank, gloo.wire
        self._gloo = gloo
        self._exchange = exchange
        self._timeout = timeout
        self._channels: dict[str, _Channel] = {}
        for number, axis in enumerate(self.mesh.names):
            members = self.mesh.group(axis, self.rank)
            if 1 < len(members) <= MOST_MEMBERS:
                self._channels[axis] = _Channel(exchange, number, members, members.index(self.rank))

    def all_reduce(self, tensor: torch.Tensor, op: str, axis: str) -> Pending:
        """See ``Communicator``."""
        channel = self._channels.get(axis)
        if channel is None:
            return self._gloo.all_reduce(tensor, op, axis)
        parts = self._count("all_reduce", tensor, channel)
        result = torch.empty_like(tensor, memory_format=torch.contiguous_format)
        source = tensor.contiguous().view(1, -1)
        return self._issue(channel, "all_reduce", source, result.view(-1), result, op, parts)

    def reduce_scatter(self, tensor: torch.Tensor, op: str, axis: str) -> Pending:
        """See ``Communicator``."""
        channel = self._channels.get(axis)
        if channel is None:
            return self._gloo.reduce_scatter(tensor, op, axis)
        parts = self._count("reduce_scatter", tensor, channel)
        result = tensor.new_empty((tensor.shape[0] // parts, *tensor.shape[1:]))
        source = tensor.contiguous().view(parts, result.numel())
        return self._issue(channel, "reduce_scatter", source, result.view(-1), result, op, parts)

    def all_gather(self, tensor: torch.Tensor, axis: str) -> Pending:
        """See ``Communicator``."""
        channel = self._channels.get(axis)
        if channel is None:
            return self._gloo.all_gather(tensor, axis)
        parts = self._count("all_gather", tensor, channel)
        result = tensor.new_empty((parts * tensor.shape[0], *tensor.shape[1:]))
        source = tensor.contiguous().view(1, tensor.numel())
        return self._issue(channel, "all_gather", source, result.view(parts, tensor.numel()), result)

    def all_to_all(self, tensor: torch.Tensor, output_splits: Sequence[int], input_splits: Sequence[int], axis: str) -> Pending:
        """See ``Communicator``."""
        channel = self._channels.get(axis)
        if channel is None or len({*output_splits, *input_splits}) != 1:
            return self._gloo.all_to_all(tensor, output_splits, input_splits, axis)
        parts = len(channel.members)
        whole = tensor.contiguous().view(parts, tensor.numel() // parts)
        self.wire.count("all_to_all", (parts - 1) * whole[0].numel() * tensor.element_size())
        result = tensor.new_empty(tensor.shape)
        return self._issue(channel, "all_to_all", whole, result.view(whole.shape), result)

    def _issue(
        self,
        channel: _Channel,
        kind: str,
        source: torch.Tensor,
        target: torch.Tensor,
        result: torch.Tensor,
        op: str = "",
        parts: int = 0,
    ) -> Transfer:
        tag = zlib.crc32(f"{kind} {op} {source.dtype} {tuple(source.shape)}".encode())
        combine = _COMBINE[op] if op else None
        transfer = Transfer(source, target, combine, result, tag, average=parts if op == "avg" else 0)
        channel.issue(transfer)
        return transfer

    def _count(self, kind: str, tensor: torch.Tensor, channel: _Channel) -> int:
        parts = len(channel.members)
        self.wire.count(kind, wire_bytes(kind, tensor, parts))
        return parts

    # --- the others

    def broadcast(self, tensor: torch.Tensor, source: int, axis: str) -> Pending:
        """See ``Communicator``."""
        return self._gloo.broadcast(tensor, source, axis)

    def send(self, tensor: torch.Tensor, peer: int, tag: int, axis: str) -> Pending:
        """See ``Communicator``."""
        return self._gloo.send(tensor, peer, tag, axis)

    def recv(self, like: torch.Tensor, peer: int, tag: int, axis: str) -> Pending:
        """See ``Communicator``."""
        return self._gloo.recv(like, peer, tag, axis)

    # --- waiting

    def wait(self, pending: Pending) -> torch.Tensor:
        """See ``Communicator``."""
        if isinstance(pending, PendingWork):
            if any(channel.inbox for channel in self._channels.values()):
                self._work_off(lambda: pending.work is None or pending.work.is_completed(), nap=_SHORT_NAP)
            return self._gloo.wait(pending)
        assert isinstance(pending, Transfer)
        self._work_off(lambda: not pending.left)
        return pending.result

    def flush(self) -> None:
        """See ``Communicator``."""
        self._work_off(lambda: not any(channel.inbox for channel in self._channels.values()))
        self._gloo.flush()

    def barrier(self) -> None:
        """See ``Communicator``."""
        self._gloo.barrier()

    def _work_off(self, is_done: Callable[[], Any], nap: float = _NAP) -> None:
        """Move chunks of all axes until ``is_done``."""
        looks = 0
        deadline = 0.0
        while True:
            bell = self._exchange.bell()
            moved = False
            for channel in self._channels.values():
                if channel.inbox:
                    moved = channel.take() or moved
                    moved = channel.publish() or moved
            if is_done():
                return
            looks = 0 if moved else looks + 1
            if looks > _SPINS:
                deadline = deadline or time.monotonic() + self._timeout
                self._exchange.sleep(bell, nap)
                if time.monotonic() > deadline:
                    raise ExchangeError(f"rank {self.rank} waited {self._timeout:.0f} s for the other ranks of a collective")
