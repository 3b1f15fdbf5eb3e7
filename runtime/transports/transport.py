"""One-sided communication: buffers that every rank of a group has a copy of, writes into a peer's copy, and signals.

    buffer = transport.symmetric("partial", (rows, cols), torch.float32, axis="tp")     # every rank of the group, in the same order
    transport.put(buffer, peer, tile, row=8)          # buffer[8 : 8 + len(tile)] of that peer
    transport.signal(peer, slot=3, value=epoch, axis="tp")
    ...
    transport.wait(peer, slot=3, value=epoch, axis="tp", timeout=60.0)                   # on the peer: its rows are there now

Peers are indices on the axis, as in ``Communicator``. Signals are words that only grow: a rank has one word per slot and peer that
may signal it, ``signal`` sets it, ``wait`` blocks until it is at least ``value``. So a signal is never lost, never consumed, and a
step number (an epoch) as value makes the same slot serve every step. What a rank wrote at a peer before it signals that peer is
visible to the peer once its ``wait`` has returned, and nothing else is promised: a buffer may be overwritten only after a signal
from everybody who reads it. Where a transport gives views of remote memory, writes through a view are visible to whoever has seen
a signal sent after them, directly or through others: memory is one.

One-sided communication with signals on symmetric memory follows OpenSHMEM (``shmem_put_signal``, specification 1.5, 9.8).
"""

from __future__ import annotations

import enum
from typing import NamedTuple, Protocol

import torch

from ..mesh import Mesh

SLOTS = 512
"""Signal slots per ordered pair of ranks on an axis: ``0 .. SLOTS-1``."""


class Capability(enum.Enum):
    """What a transport can do beyond the protocol's promises.

    REMOTE_VIEW: ``Symmetric.at(peer)`` is the peer's memory itself, to be read and written in place (a GEMM may write its result
    there); ASYNC_PROGRESS: data moves while both ranks compute; REPEATABLE: the same calls give the same order of events.
    """

    REMOTE_VIEW = "remote view"
    ASYNC_PROGRESS = "asynchronous progress"
    REPEATABLE = "repeatable"


class TransportError(ConnectionError):
    """Ranks do not agree on a buffer, a peer is gone, or memory ran out. Names the rank, the peer and the buffer or slot."""


class TransportTimeout(TransportError):
    """A wait took longer than its timeout. Names the rank, the peer and the slot, the value expected and the one found."""


class LinkCost(NamedTuple):
    """Seconds of a put with its signal: ``alpha + beta * nbytes``."""

    alpha: float
    beta: float

    def seconds(self, nbytes: float) -> float:
        """Of one put with its signal."""
        return self.alpha + self.beta * nbytes


class Symmetric(Protocol):
    """A contiguous buffer of which every rank of an axis group has a copy, of the same shape and dtype. Zero when new."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    axis: str

    @property
    def local(self) -> torch.Tensor:
        """This rank's copy, always in place."""
        ...

    def at(self, peer: int) -> torch.Tensor:
        """The copy of a peer (an index on the axis), in place. TransportError without ``Capability.REMOTE_VIEW``, except for
        this rank's own index."""
        ...


class Transfer(Protocol):
    """A message under way."""

    def wait(self, timeout: float | None = None) -> torch.Tensor:
        """The tensor, once it has left or arrived. TransportTimeout; None: the transport's own timeout."""
        ...


class Transport(Protocol):
    """One rank's end. Not thread-safe. Every ``timeout`` is in seconds; None stands for ``default_timeout``."""

    mesh: Mesh
    rank: int
    capabilities: frozenset[Capability]
    default_timeout: float

    def symmetric(self, name: str, shape: tuple[int, ...], dtype: torch.dtype, axis: str) -> Symmetric:
        """Make a buffer. All ranks of the group make the same buffers in the same order, and meet here: this waits for the others.

        Raises TransportError when they ask for different ones or when there is no memory, TransportTimeout when one does not come.
        """
        ...

    def release(self, buffer: Symmetric) -> None:
        """Give a buffer back. All ranks of the group do it in the same order; it waits for the others, so that none still reads.
        The tensors of the buffer must not be used afterwards."""
        ...

    def put(self, buffer: Symmetric, peer: int, source: torch.Tensor, row: int = 0) -> None:
        """Write ``source`` into the peer's copy, from row ``row`` on: ``buffer.at(peer)[row : row + len(source)] = source``.

        ``source`` may be changed when this returns."""
        ...

    def accumulate(self, buffer: Symmetric, peer: int, source: torch.Tensor, row: int = 0) -> None:
        """Like ``put``, but add. Two ranks must not add to the same rows at the same time."""
        ...

    def get(self, buffer: Symmetric, peer: int, out: torch.Tensor, row: int = 0) -> torch.Tensor:
        """Read ``buffer.at(peer)[row : row + len(out)]`` into ``out`` and return it."""
        ...

    def signal(self, peer: int, slot: int, value: int, axis: str, nbytes: int = 0) -> None:
        """Set this rank's word for ``slot`` at the peer. Values of a slot must grow.

        nbytes: what this rank has written for the peer through views since its last signal to it, or lets it read in place; where
        bytes take time the signal comes after them. Puts count themselves."""
        ...

    def test(self, peer: int, slot: int, value: int, axis: str) -> bool:
        """Whether ``wait`` would return at once."""
        ...

    def wait(self, peer: int, slot: int, value: int, axis: str, timeout: float | None = None) -> None:
        """Block until the peer has signalled at least ``value``. TransportTimeout."""
        ...

    def isend(self, tensor: torch.Tensor, peer: int, tag: int, axis: str) -> Transfer:
        """Start sending; the tensor must not change before the transfer is waited for."""
        ...

    def irecv(self, out: torch.Tensor, peer: int, tag: int, axis: str) -> Transfer:
        """Start receiving into ``out``. Messages of one pair, axis and tag arrive in the order in which they were sent."""
        ...

    def barrier(self, axis: str, timeout: float | None = None) -> None:
        """Block until every rank of the group is here. TransportTimeout names who is missing."""
        ...

    def cost(self, axis: str) -> LinkCost:
        """Of one put with its signal between two ranks of the axis."""
        ...

    def close(self) -> None:
        """Free what belongs to this rank; waits for nobody. Closing twice is harmless."""
        ...
