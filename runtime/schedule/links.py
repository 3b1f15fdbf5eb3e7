"""How messages of a pipeline travel between ranks: posted receives with tags, sends that are kept alive until they are out.

LocalLink          ranks of one process (tests, simulated meshes): a shared mailbox
CommunicatorLink   any communicator: shared memory, gloo or nccl groups of an engine
GlooLink           a process group of ``torch.distributed``, with receive buffers that are used again
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
import torch.distributed as dist

from ..communicator import Communicator, Pending
from ..errors import RunError
from ..transports.shm import ShmTransfer, ShmTransport
from .stage import ValueSpec

MESSAGE_WIDTH = 64
"""Most tensors in one message: tensor i of message ``tag`` travels with tag ``tag * MESSAGE_WIDTH + i``."""


class Link(Protocol):
    """One rank's end of all its messages. A tag names one message at a time; peers are ranks of the pipeline."""

    def post(self, tag: int, peer: int, specs: Sequence[ValueSpec]) -> None:
        """Get ready for a message."""
        ...

    def send(self, tag: int, peer: int, specs: Sequence[ValueSpec], tensors: Sequence[torch.Tensor]) -> None:
        """Start sending; does not wait. The tensors must not be written before ``finish``."""
        ...

    def ready(self, tag: int) -> bool | None:
        """Whether ``take`` would not wait; None where the link cannot know."""
        ...

    def take(self, tag: int) -> list[torch.Tensor]:
        """The posted message; waits for it."""
        ...

    def finish(self) -> None:
        """Wait until everything sent is out."""
        ...


class LocalLink:
    """Ranks of one process. mailbox: (receiver, tag) -> tensors as they travel, shared by all of them."""

    def __init__(self, rank: int, mailbox: dict[tuple[int, int], list[torch.Tensor]]) -> None:
        self._rank = rank
        self._mailbox = mailbox
        self._posted: dict[int, Sequence[ValueSpec]] = {}

    def post(self, tag: int, peer: int, specs: Sequence[ValueSpec]) -> None:
        """See ``Link``. Raises RunError for a tag that is under way already."""
        del peer
        if tag in self._posted:
            raise RunError(f"rank {self._rank} posts tag {tag} twice")
        self._posted[tag] = specs

    def send(self, tag: int, peer: int, specs: Sequence[ValueSpec], tensors: Sequence[torch.Tensor]) -> None:
        """See ``Link``. The receiver gets copies, as from any other link."""
        if (peer, tag) in self._mailbox:
            raise RunError(f"rank {self._rank} sends tag {tag} to rank {peer} twice")
        self._mailbox[peer, tag] = [spec.on_wire(tensor).clone() for spec, tensor in zip(specs, tensors, strict=True)]

    def ready(self, tag: int) -> bool | None:
        """See ``Link``."""
        return (self._rank, tag) in self._mailbox

    def take(self, tag: int) -> list[torch.Tensor]:
        """See ``Link``. Raises RunError where shapes differ."""
        tensors = []
        for spec, sent in zip(self._posted.pop(tag), self._mailbox.pop((self._rank, tag)), strict=True):
            expected = [spec.shape[dim] for dim in spec.dims]
            if (expected, spec.dtype) != (list(sent.shape), sent.dtype):
                raise RunError(
                    f"rank {self._rank} expected {spec.dtype}{expected} for {spec.name}, found {sent.dtype}{list(sent.shape)}"
                )
            tensors.append(spec.from_wire(sent))
        return tensors

    def finish(self) -> None:
        """Nothing is ever under way."""


class CommunicatorLink:
    """Messages along one axis of a communicator's mesh; peers are indices on it."""

    def __init__(self, communicator: Communicator, axis: str) -> None:
        self._communicator = communicator
        self._axis = axis
        self._posted: dict[int, list[tuple[Pending, ValueSpec]]] = {}

    def post(self, tag: int, peer: int, specs: Sequence[ValueSpec]) -> None:
        """See ``Link``."""
        pending = []
        for i, spec in enumerate(specs):
            like = torch.empty([spec.shape[dim] for dim in spec.dims], dtype=spec.dtype)
            pending.append((self._communicator.recv(like, peer, tag * MESSAGE_WIDTH + i, self._axis), spec))
        self._posted[tag] = pending

    def send(self, tag: int, peer: int, specs: Sequence[ValueSpec], tensors: Sequence[torch.Tensor]) -> None:
        """See ``Link``."""
        for i, (spec, tensor) in enumerate(zip(specs, tensors, strict=True)):
            self._communicator.send(spec.on_wire(tensor), peer, tag * MESSAGE_WIDTH + i, self._axis)

    def ready(self, tag: int) -> bool | None:
        """See ``Link``: known where the communicator can tell (shared memory), not where it goes through gloo."""
        arrived = getattr(self._communicator, "arrived", None)
        if arrived is None:
            return None
        found = [arrived(pending) for pending, _ in self._posted[tag]]
        return None if None in found else all(found)

    def take(self, tag: int) -> list[torch.Tensor]:
        """See ``Link``."""
        return [spec.from_wire(self._communicator.wait(pending)) for pending, spec in self._posted.pop(tag)]

    def finish(self) -> None:
        """See ``Link``."""
        self._communicator.flush()


class BufferPool:
    """Contiguous tensors that are used again once nobody refers to their memory, values that are views of them included."""

    def __init__(self) -> None:
        self._buffers: dict[tuple[tuple[int, ...], torch.dtype], list[tuple[torch.Tensor, torch.UntypedStorage]]] = {}

    def take(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """A tensor of that shape and type with any content."""
        row = self._buffers.setdefault((shape, dtype), [])
        for tensor, storage in row:
            if torch._C._storage_Use_Count(storage._cdata) <= _UNUSED:
                return tensor.detach()
        tensor = torch.empty(shape, dtype=dtype)
        row.append((tensor, tensor.untyped_storage()))
        return tensor.detach()

    @property
    def size(self) -> int:
        """Buffers made so far."""
        return sum(map(len, self._buffers.values()))


_UNUSED = 2
"""References to the memory of a buffer that only its pool knows: the tensor, and the storage object beside it."""


class GlooLink:
    """Messages through a process group of ``torch.distributed``. members: global rank of every rank of the pipeline.

    Where a peer is gone, or a wait takes longer than the group's timeout, ``take`` and ``finish`` raise RunError.
    """

    def __init__(self, members: Sequence[int], group: dist.ProcessGroup | None = None) -> None:
        self._members = tuple(members)
        self._group = group
        self.pool = BufferPool()
        self._posted: dict[int, list[tuple[Any, torch.Tensor, ValueSpec]]] = {}
        self._sent: list[tuple[Any, torch.Tensor]] = []

    def post(self, tag: int, peer: int, specs: Sequence[ValueSpec]) -> None:
        """See ``Link``."""
        works = []
        for i, spec in enumerate(specs):
            buffer = self.pool.take(tuple(spec.shape[dim] for dim in spec.dims), spec.dtype)
            works.append((dist.irecv(buffer, self._members[peer], self._group, tag * MESSAGE_WIDTH + i), buffer, spec))
        self._posted[tag] = works

    def send(self, tag: int, peer: int, specs: Sequence[ValueSpec], tensors: Sequence[torch.Tensor]) -> None:
        """See ``Link``."""
        for i, (spec, tensor) in enumerate(zip(specs, tensors, strict=True)):
            whole = spec.on_wire(tensor)
            self._sent.append((dist.isend(whole, self._members[peer], self._group, tag * MESSAGE_WIDTH + i), whole))

    def ready(self, tag: int) -> bool | None:
        """See ``Link``: gloo completes a receive only where somebody waits for it."""
        del tag
        return None

    def take(self, tag: int) -> list[torch.Tensor]:
        """See ``Link``."""
        tensors = []
        for work, buffer, spec in self._posted.pop(tag):
            _finished(work, f"to receive {spec.name}")
            tensors.append(spec.from_wire(buffer))
        return tensors

    def finish(self) -> None:
        """See ``Link``."""
        while self._sent:
            _finished(self._sent.pop()[0], "for its messages to leave")


def _finished(work: Any, what: str) -> None:
    try:
        work.wait()
    except RuntimeError as error:
        rank = dist.get_rank()
        raise RunError(
            f"rank {rank} waited {what} and its peer did not answer ({error}); another rank has failed, see what it printed",
            rank=rank,
        ) from error


class ShmLink:
    """Messages through shared memory along one axis of the transport's mesh; peers are indices on it."""

    def __init__(self, transport: ShmTransport, axis: str) -> None:
        self._transport = transport
        self._axis = axis
        self.pool = BufferPool()
        self._posted: dict[int, tuple[int, list[tuple[ShmTransfer, ValueSpec]]]] = {}
        self._sent: list[ShmTransfer] = []

    def post(self, tag: int, peer: int, specs: Sequence[ValueSpec]) -> None:
        """See ``Link``."""
        transfers = []
        for i, spec in enumerate(specs):
            buffer = self.pool.take(tuple(spec.shape[dim] for dim in spec.dims), spec.dtype)
            transfers.append((self._transport.irecv(buffer, peer, tag * MESSAGE_WIDTH + i, self._axis), spec))
        self._posted[tag] = (peer, transfers)

    def send(self, tag: int, peer: int, specs: Sequence[ValueSpec], tensors: Sequence[torch.Tensor]) -> None:
        """See ``Link``."""
        for i, (spec, tensor) in enumerate(zip(specs, tensors, strict=True)):
            transfer = self._transport.isend(spec.on_wire(tensor), peer, tag * MESSAGE_WIDTH + i, self._axis)
            if not transfer.message.done:
                self._sent.append(transfer)

    def ready(self, tag: int) -> bool | None:
        """See ``Link``."""
        peer, transfers = self._posted[tag]
        self._transport.mailbox(peer, self._axis).move()
        return all(transfer.message.done for transfer, _ in transfers)

    def take(self, tag: int) -> list[torch.Tensor]:
        """See ``Link``. Raises TransportTimeout where the sender never comes."""
        _, transfers = self._posted.pop(tag)
        return [spec.from_wire(transfer.wait()) for transfer, spec in transfers]

    def finish(self) -> None:
        """See ``Link``."""
        while self._sent:
            self._sent.pop().wait()
