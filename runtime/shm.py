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

import zlib
from collections.abc import Callable, Sequence
from typing import Any

import torch

from .chunks import Channel, ExchangeError, Transfer
from .communicator import Pending, wire_bytes
from .exchange import Exchange
from .gloo import GlooCommunicator, PendingWork
from .mail import Message
from .transports.shm import ShmTransport

MOST_MEMBERS = 8
"""Every rank reads the chunks of all others, so beyond some group size the ring algorithms of gloo do less work."""

_SHORT_NAP = 1e-4
"""Seconds between two looks of a rank that waits for gloo as well, which rings no bell."""

_COMBINE: dict[str, Callable[..., torch.Tensor]] = {
    "sum": torch.add,
    "avg": torch.add,
    "max": torch.maximum,
    "min": torch.minimum,
    "product": torch.mul,
}


class ShmCommunicator:
    """See ``Communicator`` and the module. Broadcasts, unequal exchanges and the collectives of large groups go by gloo.

    transport: one-sided communication through the same memory; peer_memory: the same, for those who need views of it.
    """

    def __init__(self, gloo: GlooCommunicator, exchange: Exchange, timeout: float) -> None:
        """timeout: seconds that one operation may take."""
        self.mesh, self.rank, self.wire = gloo.mesh, gloo.rank, gloo.wire
        self._gloo = gloo
        self._exchange = exchange
        self._timeout = timeout
        self._channels: dict[str, Channel] = {}
        for number, axis in enumerate(self.mesh.names):
            members = self.mesh.group(axis, self.rank)
            if 1 < len(members) <= MOST_MEMBERS:
                self._channels[axis] = Channel(exchange, number, members)
        self._all = tuple(self._channels.values())
        exchange.movers.extend(channel.move for channel in self._all)
        self.transport = self.peer_memory = ShmTransport(exchange, timeout)
        self._sent: list[Message] = []
        self._tags: dict[tuple[Any, ...], int] = {}

    def all_reduce(self, tensor: torch.Tensor, op: str, axis: str) -> Pending:
        """See ``Communicator``."""
        channel = self._channels.get(axis)
        if channel is None:
            return self._gloo.all_reduce(tensor, op, axis)
        parts = self._count("all_reduce", tensor, channel)
        result = torch.empty_like(tensor, memory_format=torch.contiguous_format)
        source = tensor.contiguous().view(1, -1)
        return self._issue(channel, "all_reduce", source, result.view(-1), result, op=op, parts=parts)

    def reduce_scatter(self, tensor: torch.Tensor, op: str, axis: str) -> Pending:
        """See ``Communicator``."""
        channel = self._channels.get(axis)
        if channel is None:
            return self._gloo.reduce_scatter(tensor, op, axis)
        parts = self._count("reduce_scatter", tensor, channel)
        result = tensor.new_empty((tensor.shape[0] // parts, *tensor.shape[1:]))
        source = tensor.contiguous().view(parts, result.numel())
        return self._issue(channel, "reduce_scatter", source, result.view(-1), result, op=op, parts=parts)

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
        channel: Channel,
        kind: str,
        source: torch.Tensor,
        target: torch.Tensor,
        result: torch.Tensor,
        *,
        op: str = "",
        parts: int = 0,
    ) -> Transfer:
        key = (kind, op, source.dtype, source.shape)
        tag = self._tags.get(key)
        if tag is None:
            tag = self._tags[key] = zlib.crc32(f"{kind} {op} {source.dtype} {tuple(source.shape)}".encode())
        combine = _COMBINE[op] if op else None
        transfer = Transfer(source, target, combine, result, tag, average=parts if op == "avg" else 0)
        channel.issue(transfer)
        return transfer

    def _count(self, kind: str, tensor: torch.Tensor, channel: Channel) -> int:
        parts = len(channel.members)
        self.wire.count(kind, wire_bytes(kind, tensor, parts))
        return parts

    # --- the others

    def broadcast(self, tensor: torch.Tensor, source: int, axis: str) -> Pending:
        """See ``Communicator``."""
        return self._gloo.broadcast(tensor, source, axis)

    def send(self, tensor: torch.Tensor, peer: int, tag: int, axis: str) -> Pending:
        """See ``Communicator``."""
        self.wire.count("send", wire_bytes("send", tensor, 1))
        message = self.transport.isend(tensor, peer, tag, axis).message
        if message.left:
            self._sent.append(message)
        return message

    def recv(self, like: torch.Tensor, peer: int, tag: int, axis: str) -> Pending:
        """See ``Communicator``."""
        self.wire.count("recv", 0)
        return self.transport.irecv(torch.empty_like(like, memory_format=torch.contiguous_format), peer, tag, axis).message

    # --- waiting

    def wait(self, pending: Pending) -> torch.Tensor:
        """See ``Communicator``."""
        if isinstance(pending, Transfer):
            if pending.left:
                self._until(lambda: not pending.left)
            return pending.result
        if isinstance(pending, Message):
            if pending.left or not pending.begun:
                self._until(lambda: pending.done)
            return pending.result
        assert isinstance(pending, PendingWork)
        if self._exchange.movers:
            self._until(lambda: pending.work is None or bool(pending.work.is_completed()), _SHORT_NAP)
        return self._gloo.wait(pending)

    def arrived(self, pending: Pending) -> bool | None:
        """Whether waiting for a message would take no time; None for anything but a message."""
        if not isinstance(pending, Message):
            return None
        for move in self._exchange.movers if not pending.done else ():
            move()
        return pending.done

    def flush(self) -> None:
        """See ``Communicator``."""
        for channel in self._all:
            if channel.inbox:
                self._until(lambda: not any(channel.inbox for channel in self._all))
                break
        if self._sent:
            self._until(lambda: not any(message.left for message in self._sent))
            self._sent.clear()
        self._gloo.flush()

    def barrier(self) -> None:
        """See ``Communicator``."""
        self._gloo.barrier()

    def _until(self, is_done: Callable[[], bool], nap: float = 0.1) -> None:
        if not self._exchange.until(is_done, self._timeout, nap):
            raise ExchangeError(f"rank {self.rank} waited {self._timeout:g} s for the other ranks of a collective or message")
