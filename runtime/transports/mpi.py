"""The transport over MPI: symmetric buffers are windows (MPI-3, chapter 11), a put is a put, a signal is an atomic store.

    put, accumulate   MPI_Put, MPI_Accumulate            complete at the peer (flushed) before they return
    signal            MPI_Accumulate(REPLACE) on a window of words, after everything written through views (MPI_Win_sync)
    wait              the rank's own words, read atomically; the progress engine of MPI runs between looks

For ranks that a cluster's MPI starts (``mpirun``, ``srun``), over whatever network it knows. Ranks of one machine get windows that
all of them map, and so views of each other's memory. Needs ``pip install hocket[mpi]``; nothing else imports mpi4py, and importing
this module does not.

Windows are made and freed by all ranks together, and MPI knows no timeouts there: ranks first meet over the words, with one, so
that nobody enters such a call alone.
"""

from __future__ import annotations

import importlib
import importlib.util
import math
import os
import shutil
import time
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, cast

import torch

from ..errors import InputError
from ..mesh import Mesh
from .buffers import SharedBuffer, checked_slot, over
from .transport import SLOTS, Capability, LinkCost, Symmetric, TransportError, TransportTimeout

_BARRIER, _SPEC, _WORDS = SLOTS, SLOTS + 1, SLOTS + 3
_COST = LinkCost(2e-6, 1e-10)
_SPIN, _NAP = 1e-3, 2e-4
"""Seconds that a rank looks for a signal without a pause, and those of each pause afterwards."""

_ADDED = {torch.float32: "FLOAT", torch.float64: "DOUBLE", torch.int32: "INT32_T", torch.int64: "INT64_T"}
"""Dtypes that MPI adds; others are read, added here, and written back."""


def why_unavailable() -> str:
    """In words, for a person; "" where mpi4py and a launcher are installed. Does not start MPI."""
    if importlib.util.find_spec("mpi4py") is None:
        return "mpi4py is not installed: pip install hocket[mpi], with an MPI library such as Open MPI on the machine"
    if shutil.which("mpirun") is None and shutil.which("mpiexec") is None and shutil.which("srun") is None:
        return "mpi4py is installed, but no launcher is: mpirun, mpiexec or srun starts the ranks"
    return ""


@dataclass
class MpiTransfer:
    """See ``Transfer``. staging: the bytes that MPI has, kept alive until they have left or arrived."""

    transport: MpiTransport
    request: Any
    tensor: torch.Tensor
    what: str
    staging: torch.Tensor

    def wait(self, timeout: float | None = None) -> torch.Tensor:
        """See ``Transfer``."""
        self.transport.until(self.request.Test, timeout, lambda: self.what)
        return self.tensor


@dataclass
class _Group:
    """An axis: its communicator, members as ranks of the mesh, the own index, the window of words and how often ranks met."""

    comm: Any
    members: tuple[int, ...]
    own: int
    is_shared: bool
    words: Any
    buffers: dict[int, SharedBuffer] = field(default_factory=dict)
    windows: dict[int, Any] = field(default_factory=dict)
    made: int = 0
    barriers: int = 0


class MpiTransport:
    """See ``Transport``. All ranks of the world make it at the same time; rank r of the mesh is rank r of MPI's world.

    views: whether ranks of one machine see each other's memory. Raises InputError without mpi4py, and where the world does not fit
    the mesh.
    """

    def __init__(self, mesh: Mesh, timeout: float = 1800.0, *, views: bool = True) -> None:
        if importlib.util.find_spec("mpi4py") is None:
            raise InputError(f"expected mpi4py for the MPI transport: {why_unavailable()}")
        self._mpi: Any = importlib.import_module("mpi4py.MPI")  # starts MPI
        world = self._mpi.COMM_WORLD
        if world.Get_size() != mesh.size:
            raise InputError(f"mesh {mesh} needs {mesh.size} ranks, but MPI has started {world.Get_size()}: mpirun -n {mesh.size}")
        self.mesh, self.rank, self.default_timeout = mesh, world.Get_rank(), timeout
        self._groups = {axis: self._group(world, axis, views=views) for axis in mesh.names}
        shared = all(group.is_shared for group in self._groups.values())
        self.capabilities = frozenset({Capability.REMOTE_VIEW} if shared else set())

    def _group(self, world: Any, axis: str, *, views: bool) -> _Group:
        members = self.mesh.group(axis, self.rank)
        own = members.index(self.rank)
        comm = world.Split(members[0], own)
        near = comm.Split_type(self._mpi.COMM_TYPE_SHARED)
        is_shared = views and comm.allreduce(near.Get_size() == len(members), op=self._mpi.LAND)
        near.Free()
        words = self._mpi.Win.Allocate(8 * len(members) * _WORDS, 8, comm=comm)
        memoryview(words).cast("B")[:] = bytes(8 * len(members) * _WORDS)
        words.Lock_all(self._mpi.MODE_NOCHECK)
        words.Sync()
        comm.Barrier()
        return _Group(comm, members, own, is_shared, words)

    # --- buffers

    def symmetric(self, name: str, shape: tuple[int, ...], dtype: torch.dtype, axis: str) -> SharedBuffer:
        """See ``Transport``."""
        group = self._groups[axis]
        group.made += 1
        self._agree(group, f"{name!r} of {dtype}{list(shape)}")
        nbytes = max(8, math.prod(shape) * dtype.itemsize)
        make = self._mpi.Win.Allocate_shared if group.is_shared else self._mpi.Win.Allocate
        try:
            window = make(nbytes, 1, comm=group.comm)
        except self._mpi.Exception as error:
            raise TransportError(f"rank {self.rank}: no memory for buffer {name!r}, {nbytes:,} bytes: {error}") from error
        window.Lock_all(self._mpi.MODE_NOCHECK)
        if group.is_shared:
            copies = [over(window.Shared_query(peer)[0], 0, shape, dtype) for peer in range(len(group.members))]
        else:
            empty = torch.empty(0, dtype=dtype)
            copies = [
                over(memoryview(window), 0, shape, dtype) if peer == group.own else empty for peer in range(len(group.members))
            ]
        buffer = SharedBuffer(name, tuple(shape), dtype, axis, group.own, tuple(copies), group.made, sees_all=group.is_shared)
        buffer.local.zero_()
        group.buffers[group.made], group.windows[group.made] = buffer, window
        self.barrier(axis)
        return buffer

    def _agree(self, group: _Group, what: str) -> None:
        """Meet with a timeout, and compare what is being made."""
        spec = zlib.crc32(what.encode())
        word = _SPEC + group.made % 2
        for peer in range(len(group.members)):
            self._store(group, peer, word, group.made << 32 | spec)
        for peer, member in enumerate(group.members):
            found = self._until_word(group, peer, word, group.made << 32, None, f"to make buffer {what}")
            if found & 0xFFFFFFFF != spec:
                raise TransportError(f"rank {member} makes another buffer than rank {self.rank}, which makes {what}")

    def release(self, buffer: Symmetric) -> None:
        """See ``Transport``."""
        assert isinstance(buffer, SharedBuffer)
        group = self._groups[buffer.axis]
        self.barrier(buffer.axis)
        kept = group.buffers.pop(buffer.where)
        buffer.tensors = kept.tensors = ()
        window = group.windows.pop(buffer.where)
        window.Unlock_all()
        window.Free()

    def put(self, buffer: Symmetric, peer: int, source: torch.Tensor, row: int = 0) -> None:
        """See ``Transport``."""
        window, rows, start = self._rows(buffer, source, row)
        window.Put(_bytes(rows), peer, start)
        window.Flush(peer)

    def accumulate(self, buffer: Symmetric, peer: int, source: torch.Tensor, row: int = 0) -> None:
        """See ``Transport``."""
        window, rows, start = self._rows(buffer, source, row)
        name = _ADDED.get(buffer.dtype)
        if name is None:
            self.put(buffer, peer, self.get(buffer, peer, torch.empty_like(rows), row).add_(rows), row)
            return
        count, kind = rows.numel(), getattr(self._mpi, name)
        window.Accumulate([_bytes(rows), count, kind], peer, [start, count, kind], self._mpi.SUM)
        window.Flush(peer)

    def get(self, buffer: Symmetric, peer: int, out: torch.Tensor, row: int = 0) -> torch.Tensor:
        """See ``Transport``."""
        window, rows, start = self._rows(buffer, torch.empty(out.shape, dtype=buffer.dtype), row)
        window.Get(_bytes(rows), peer, start)
        window.Flush(peer)
        return out.copy_(rows)

    def _rows(self, buffer: Symmetric, source: torch.Tensor, row: int) -> tuple[Any, torch.Tensor, int]:
        """The window, contiguous rows in the dtype of the buffer, and where they begin in it, in bytes."""
        assert isinstance(buffer, SharedBuffer)
        rows = source.to(buffer.dtype).contiguous()
        if buffer.local.narrow(0, row, source.shape[0]).shape != rows.shape:
            raise TransportError(f"rows of shape {list(rows.shape)} do not fit buffer {buffer.name!r} of {list(buffer.shape)}")
        each = math.prod(buffer.shape[1:]) * buffer.dtype.itemsize
        return self._groups[buffer.axis].windows[buffer.where], rows, row * each

    # --- signals

    def signal(self, peer: int, slot: int, value: int, axis: str, nbytes: int = 0) -> None:  # noqa: ARG002  (takes no time of its own)
        """See ``Transport``."""
        self._store(self._groups[axis], peer, checked_slot(slot), value)

    def _store(self, group: _Group, peer: int, slot: int, value: int) -> None:
        self._seen(group)  # what was written through views comes first
        word, kind = torch.tensor([value]), self._mpi.INT64_T
        group.words.Accumulate([_bytes(word), 1, kind], peer, [group.own * _WORDS + slot, 1, kind], self._mpi.REPLACE)
        group.words.Flush(peer)

    def _load(self, group: _Group, peer: int, slot: int) -> int:
        word, kind = torch.zeros(2, dtype=torch.int64), self._mpi.INT64_T
        place = peer * _WORDS + slot
        group.words.Fetch_and_op([_bytes(word[:1]), 1, kind], [_bytes(word[1:]), 1, kind], group.own, place, self._mpi.NO_OP)
        group.words.Flush(group.own)
        return int(word[1])

    def test(self, peer: int, slot: int, value: int, axis: str) -> bool:
        """See ``Transport``."""
        group = self._groups[axis]
        return self._load(group, peer, checked_slot(slot)) >= value and self._seen(group)

    def wait(self, peer: int, slot: int, value: int, axis: str, timeout: float | None = None) -> None:
        """See ``Transport``."""
        what = f"to signal {value} in slot {slot} of axis {axis!r}"
        self._until_word(self._groups[axis], peer, checked_slot(slot), value, timeout, what)

    def barrier(self, axis: str, timeout: float | None = None) -> None:
        """See ``Transport``."""
        group = self._groups[axis]
        group.barriers += 1
        for peer in range(len(group.members)):
            self._store(group, peer, _BARRIER, group.barriers)
        for peer in range(len(group.members)):
            self._until_word(group, peer, _BARRIER, group.barriers, timeout, f"at a barrier of axis {axis!r}")

    def _until_word(self, group: _Group, peer: int, slot: int, value: int, timeout: float | None, what: str) -> int:
        """Wait until a word has grown; what it holds."""
        found = [0]

        def has_grown() -> bool:
            found[0] = self._load(group, peer, slot)
            return found[0] >= value

        self.until(has_grown, timeout, lambda: f"rank {group.members[peer]} {what}, its word holds {found[0]}")
        self._seen(group)
        return found[0]

    def _seen(self, group: _Group) -> bool:
        """Let this processor see what a signal has announced, and others what it has written."""
        for window in group.windows.values():
            window.Sync()
        return True

    def until(self, is_done: Callable[[], bool], timeout: float | None, what: Callable[[], str]) -> None:
        """Wait, with MPI at work; TransportTimeout says what for."""
        limit = self.default_timeout if timeout is None else timeout
        start = time.monotonic()
        while not is_done():
            passed = time.monotonic() - start
            if passed > limit:
                raise TransportTimeout(f"rank {self.rank} waited {limit:g} s for {what()}")
            self._mpi.COMM_WORLD.Iprobe()
            if passed > _SPIN:
                time.sleep(_NAP)
            else:
                os.sched_yield()

    # --- messages

    def isend(self, tensor: torch.Tensor, peer: int, tag: int, axis: str) -> MpiTransfer:
        """See ``Transport``."""
        group, rows = self._groups[axis], tensor.contiguous()
        request = group.comm.Isend(_bytes(rows), peer, tag)
        return MpiTransfer(self, request, tensor, f"rank {group.members[peer]} to take message {tag}", rows)

    def irecv(self, out: torch.Tensor, peer: int, tag: int, axis: str) -> MpiTransfer:
        """See ``Transport``. ``out`` must be contiguous."""
        group = self._groups[axis]
        request = group.comm.Irecv(_bytes(out), peer, tag)
        return MpiTransfer(self, request, out, f"rank {group.members[peer]} to send message {tag}", out)

    # --- the rest

    def cost(self, axis: str) -> LinkCost:  # noqa: ARG002
        """See ``Transport``."""
        return _COST

    def close(self) -> None:
        """See ``Transport``. Windows are freed by all ranks together, so they stay until MPI ends."""
        for group in self._groups.values():
            group.buffers.clear()
        _KEPT.extend(window for group in self._groups.values() for window in (*group.windows.values(), group.words))


_KEPT: list[Any] = []
"""Windows of closed transports: freeing one waits for all ranks."""


def _bytes(tensor: torch.Tensor) -> memoryview:
    """The memory of a contiguous tensor."""
    return memoryview(cast(Any, tensor.detach().reshape(-1).view(torch.uint8).numpy()))
