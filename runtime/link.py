"""Collectives over an emulated link: those of shared memory, whose results are there when the link would have delivered them.

    all_gather, all_to_all    every rank sends its peers what is for them; one latency
    reduce_scatter            the same (each rank adds what arrives); one latency
    all_reduce                a reduce_scatter, then an all_gather; two latencies

Each rank's bytes leave one after the other (``transports.link``); they are those of ``communicator.wire_bytes``. A result is there
when the shared memory has it and the last peer's bytes have arrived, so what a rank computes between issue and wait is hidden.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from .communicator import Pending, wire_bytes
from .shm import ShmCommunicator
from .transports.link import LinkSpec, LinkTransfer, LinkTransport
from .transports.transport import SLOTS, TransportError

_FIRST, _TURNS = 480, 32
"""Signal slots of collectives, used in turn: those that tile loops leave free."""


@dataclass
class LinkPending:
    """A collective of shared memory, and the signals to wait for before its result counts as arrived."""

    inner: Pending
    axis: str
    slot: int
    value: int


class LinkCommunicator:
    """See ``Communicator`` and the module. All ranks make it at the same time."""

    def __init__(self, shm: ShmCommunicator, transport: LinkTransport) -> None:
        assert _FIRST + _TURNS == SLOTS
        self.mesh, self.rank, self.wire = shm.mesh, shm.rank, shm.wire
        self.shm = shm
        self.transport = self.peer_memory = transport
        self._issued = dict.fromkeys(self.mesh.names, 0)
        self._sent: list[LinkTransfer] = []

    def all_reduce(self, tensor: torch.Tensor, op: str, axis: str) -> Pending:
        """See ``Communicator``."""
        return self._delayed(self.shm.all_reduce(tensor, op, axis), axis, self._share("all_reduce", tensor, axis), hops=2)

    def all_gather(self, tensor: torch.Tensor, axis: str) -> Pending:
        """See ``Communicator``."""
        return self._delayed(self.shm.all_gather(tensor, axis), axis, self._share("all_gather", tensor, axis))

    def reduce_scatter(self, tensor: torch.Tensor, op: str, axis: str) -> Pending:
        """See ``Communicator``."""
        return self._delayed(self.shm.reduce_scatter(tensor, op, axis), axis, self._share("reduce_scatter", tensor, axis))

    def all_to_all(self, tensor: torch.Tensor, output_splits: Sequence[int], input_splits: Sequence[int], axis: str) -> Pending:
        """See ``Communicator``."""
        row = tensor[:1].numel() * tensor.element_size()
        pending = self.shm.all_to_all(tensor, output_splits, input_splits, axis)
        return self._delayed(pending, axis, [n * row for n in input_splits])

    def broadcast(self, tensor: torch.Tensor, source: int, axis: str) -> Pending:
        """See ``Communicator``."""
        sends = self.mesh.coordinate(self.rank)[axis] == source
        size = tensor.nbytes if sends else 0
        return self._delayed(self.shm.broadcast(tensor, source, axis), axis, [size] * self.mesh.axis_size(axis))

    def _share(self, kind: str, tensor: torch.Tensor, axis: str) -> list[float]:
        """Bytes for each peer."""
        parts = self.mesh.axis_size(axis)
        return [float(wire_bytes(kind, tensor, parts)) / max(1, parts - 1)] * parts

    def _delayed(self, pending: Pending, axis: str, nbytes: Sequence[float], hops: int = 1) -> Pending:
        parts = self.mesh.axis_size(axis)
        if parts == 1:
            return pending
        own, number = self.mesh.coordinate(self.rank)[axis], self._issued[axis]
        self._issued[axis] += 1
        slot, value = _FIRST + number % _TURNS, number // _TURNS + 1
        for step in range(1, parts):
            peer = (own + step) % parts
            self.transport.signal_over(peer, slot, value, axis, nbytes[peer], hops)
        return LinkPending(pending, axis, slot, value)

    def send(self, tensor: torch.Tensor, peer: int, tag: int, axis: str) -> Pending:
        """See ``Communicator``."""
        self.wire.count("send", wire_bytes("send", tensor, 1))
        transfer = self.transport.isend(tensor, peer, tag, axis)
        self._sent.append(transfer)
        return transfer

    def recv(self, like: torch.Tensor, peer: int, tag: int, axis: str) -> Pending:
        """See ``Communicator``."""
        self.wire.count("recv", 0)
        return self.transport.irecv(torch.empty_like(like, memory_format=torch.contiguous_format), peer, tag, axis)

    def wait(self, pending: Pending) -> torch.Tensor:
        """See ``Communicator``."""
        if isinstance(pending, LinkTransfer):
            return pending.wait()
        if not isinstance(pending, LinkPending):
            return self.shm.wait(pending)
        result = self.shm.wait(pending.inner)
        own = self.mesh.coordinate(self.rank)[pending.axis]
        for peer in range(self.mesh.axis_size(pending.axis)):
            if peer != own:
                self.transport.wait(peer, pending.slot, pending.value, pending.axis)
        return result

    def flush(self) -> None:
        """See ``Communicator``."""
        while self._sent:
            self._sent.pop().wait()
        self.shm.flush()

    def barrier(self) -> None:
        """See ``Communicator``."""
        self.shm.barrier()


def over_link(shm: object, text: str) -> LinkCommunicator:
    """The communicator of an emulated link over one of shared memory. TransportError where there is none."""
    if not isinstance(shm, ShmCommunicator):
        raise TransportError(f"transport {text!r} is emulated in shared memory, which these ranks do not have")
    return LinkCommunicator(shm, LinkTransport(shm.transport, LinkSpec.parse(text)))
