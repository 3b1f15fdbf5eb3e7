"""Communication through ``torch.distributed``: one process group per mesh axis, in-place c10d calls on private buffers.

The functional collectives of torch copy their output once more (half to all of the time of a large all_reduce on gloo), so this
module owns its buffers and calls c10d directly. Written for gloo; nccl works too where its operations exist.
"""

from __future__ import annotations

import datetime
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from .communicator import Wire, wire_bytes
from .errors import RunError
from .mesh import Mesh
from .transports.gloo import GlooTransport

_REDUCE = {
    "sum": dist.ReduceOp.SUM,
    "avg": dist.ReduceOp.SUM,
    "max": dist.ReduceOp.MAX,
    "min": dist.ReduceOp.MIN,
    "product": dist.ReduceOp.PRODUCT,
}


@dataclass
class PendingWork:
    """A c10d operation under way; ``finish`` makes the result of its buffer."""

    work: Any
    buffer: torch.Tensor
    finish: Callable[[torch.Tensor], torch.Tensor] | None = None


class GlooCommunicator:
    """One rank's groups, made from the default process group, which must span exactly the ranks of the mesh.

    Every rank must construct it at the same time: groups are created in the order of the axes. timeout: seconds that one operation
    may take. Raises RunError when the world does not fit the mesh.
    """

    def __init__(self, mesh: Mesh, timeout: float = 1800.0) -> None:
        if dist.get_world_size() != mesh.size:
            raise RunError(f"mesh {mesh} needs {mesh.size} ranks, the process group has {dist.get_world_size()}")
        self.mesh = mesh
        self.rank = dist.get_rank()
        self.wire = Wire()
        self._timeout = timeout
        self._sends: list[PendingWork] = []
        self._groups: dict[str, dist.ProcessGroup] = {}
        self._members: dict[str, tuple[int, ...]] = {}
        for axis in mesh.names:
            self._members[axis] = mesh.group(axis, self.rank)
            for members in mesh.groups(axis):
                group = self._group_of(members, timeout)
                if self.rank in members:
                    self._groups[axis] = group

    def _group_of(self, members: tuple[int, ...], timeout: float) -> Any:
        if len(members) == self.mesh.size:
            return dist.group.WORLD
        return dist.new_group(list(members), timeout=datetime.timedelta(seconds=timeout))

    @functools.cached_property
    def transport(self) -> GlooTransport:
        """One-sided communication between the same ranks; its threads start with the first use."""
        groups = {axis: (self._groups[axis], self._members[axis]) for axis in self.mesh.names}
        return GlooTransport(self.mesh, self.rank, groups, self._timeout)

    def all_reduce(self, tensor: torch.Tensor, op: str, axis: str) -> PendingWork:
        """See ``Communicator``."""
        parts = self._count("all_reduce", tensor, axis)
        buffer = tensor.clone(memory_format=torch.contiguous_format)
        if parts == 1:
            return PendingWork(None, buffer)
        work = dist.all_reduce(buffer, _REDUCE[op], self._groups[axis], async_op=True)
        return PendingWork(work, buffer, _average(op, parts))

    def all_gather(self, tensor: torch.Tensor, axis: str) -> PendingWork:
        """See ``Communicator``."""
        parts = self._count("all_gather", tensor, axis)
        piece = tensor.contiguous()
        if parts == 1:
            return PendingWork(None, piece)
        buffer = piece.new_empty((parts * piece.shape[0], *piece.shape[1:]))
        return PendingWork(dist.all_gather_single(buffer, piece, self._groups[axis], async_op=True), buffer)

    def reduce_scatter(self, tensor: torch.Tensor, op: str, axis: str) -> PendingWork:
        """See ``Communicator``."""
        parts = self._count("reduce_scatter", tensor, axis)
        whole = tensor.contiguous()
        if parts == 1:
            return PendingWork(None, whole)
        buffer = whole.new_empty((whole.shape[0] // parts, *whole.shape[1:]))
        work = dist.reduce_scatter_single(buffer, whole, _REDUCE[op], self._groups[axis], async_op=True)
        return PendingWork(work, buffer, _average(op, parts))

    def all_to_all(self, tensor: torch.Tensor, output_splits: Sequence[int], input_splits: Sequence[int], axis: str) -> PendingWork:
        """See ``Communicator``."""
        own = self._members[axis].index(self.rank)
        row = tensor[:1].numel() * tensor.element_size()
        self.wire.count("all_to_all", sum(n for i, n in enumerate(input_splits) if i != own) * row)
        whole = tensor.contiguous()
        if len(self._members[axis]) == 1:
            return PendingWork(None, whole)
        buffer = whole.new_empty((sum(output_splits), *whole.shape[1:]))
        work = dist.all_to_all_single(
            buffer, whole, list(output_splits), list(input_splits), group=self._groups[axis], async_op=True
        )
        return PendingWork(work, buffer)

    def broadcast(self, tensor: torch.Tensor, source: int, axis: str) -> PendingWork:
        """See ``Communicator``."""
        root = self._members[axis][source]
        self.wire.count(
            "broadcast", wire_bytes("broadcast", tensor, 1) if root == self.rank and len(self._members[axis]) > 1 else 0
        )
        buffer = (
            tensor.clone(memory_format=torch.contiguous_format)
            if root == self.rank
            else torch.empty_like(tensor, memory_format=torch.contiguous_format)
        )
        if len(self._members[axis]) == 1:
            return PendingWork(None, buffer)
        return PendingWork(dist.broadcast(buffer, root, self._groups[axis], async_op=True), buffer)

    def send(self, tensor: torch.Tensor, peer: int, tag: int, axis: str) -> PendingWork:
        """See ``Communicator``."""
        self.wire.count("send", wire_bytes("send", tensor, 1))
        buffer = tensor.clone(memory_format=torch.contiguous_format)
        pending = PendingWork(dist.isend(buffer, self._members[axis][peer], self._groups[axis], tag), buffer)
        self._sends.append(pending)
        return pending

    def recv(self, like: torch.Tensor, peer: int, tag: int, axis: str) -> PendingWork:
        """See ``Communicator``."""
        self.wire.count("recv", 0)
        buffer = torch.empty_like(like, memory_format=torch.contiguous_format)
        return PendingWork(dist.irecv(buffer, self._members[axis][peer], self._groups[axis], tag), buffer)

    def wait(self, pending: PendingWork) -> torch.Tensor:
        """See ``Communicator``."""
        if pending.work is not None:
            pending.work.wait()
            pending.work = None
        return pending.buffer if pending.finish is None else pending.finish(pending.buffer)

    def flush(self) -> None:
        """See ``Communicator``."""
        while self._sends:
            self.wait(self._sends.pop())

    def barrier(self) -> None:
        """See ``Communicator``."""
        dist.barrier()

    def _count(self, kind: str, tensor: torch.Tensor, axis: str) -> int:
        parts = len(self._members[axis])
        self.wire.count(kind, wire_bytes(kind, tensor, parts))
        return parts


def _average(op: str, parts: int) -> Callable[[torch.Tensor], torch.Tensor] | None:
    return (lambda buffer: buffer.div_(parts)) if op == "avg" else None
