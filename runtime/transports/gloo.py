"""The transport over gloo: one-sided calls become messages that a thread of the other rank carries out.

    header     kind, buffer, row, rows, slot, value      then, for data, the rows themselves

A thread per peer takes its messages in order, so a signal is carried out after the puts before it. Data moves while ranks compute,
at the price of that thread; there are no views of remote memory. For ranks of several machines, and where ``shm`` is not to be had.
"""

from __future__ import annotations

import contextlib
import datetime
import enum
import threading
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist

from ..mesh import Mesh
from .buffers import SharedBuffer, checked_slot
from .transport import SLOTS, Capability, LinkCost, Symmetric, TransportError, TransportTimeout

_BARRIER, _SPEC = SLOTS, SLOTS + 1
_HEADER, _DATA, _REPLY, _FIRST_TAG = 1 << 20, (1 << 20) + 1, (1 << 20) + 2, 1 << 21
_COST = LinkCost(3e-4, 6e-10)


class Kind(enum.IntEnum):
    """What a message asks for."""

    PUT = 0
    ACCUMULATE = 1
    GET = 2
    SIGNAL = 3
    BYE = 4


@dataclass
class GlooTransfer:
    """See ``Transfer``."""

    work: Any
    tensor: torch.Tensor
    limit: float
    what: str

    def wait(self, timeout: float | None = None) -> torch.Tensor:
        """See ``Transfer``."""
        limit = self.limit if timeout is None else timeout
        try:
            self.work.wait(datetime.timedelta(seconds=limit))
        except RuntimeError as error:
            raise TransportTimeout(f"waited {limit:g} s for {self.what}: {error}") from error
        return self.tensor


@dataclass
class _Group:
    """An axis: its process group, members as global ranks, the own index, and what has arrived."""

    group: Any
    members: tuple[int, ...]
    own: int
    words: dict[tuple[int, int], int] = field(default_factory=dict)
    buffers: dict[int, SharedBuffer] = field(default_factory=dict)
    gone: dict[int, str] = field(default_factory=dict)
    changed: threading.Condition = field(default_factory=threading.Condition)
    made: int = 0
    barriers: int = 0


class GlooTransport:
    """See ``Transport``. groups: per axis of the mesh, the process group of this rank and its members as global ranks."""

    capabilities = frozenset({Capability.ASYNC_PROGRESS})

    def __init__(self, mesh: Mesh, rank: int, groups: dict[str, tuple[Any, tuple[int, ...]]], timeout: float) -> None:
        self.mesh, self.rank, self.default_timeout = mesh, rank, timeout
        self._groups = {axis: _Group(group, members, members.index(rank)) for axis, (group, members) in groups.items()}
        self._closed = False
        for group in self._groups.values():
            for peer in range(len(group.members)):
                if peer != group.own:
                    threading.Thread(target=self._serve, args=(group, peer), name="hocket-gloo", daemon=True).start()

    # --- buffers

    def symmetric(self, name: str, shape: tuple[int, ...], dtype: torch.dtype, axis: str) -> SharedBuffer:
        """See ``Transport``."""
        group = self._groups[axis]
        group.made += 1
        own = torch.zeros(shape, dtype=dtype)
        copies = tuple(own if peer == group.own else own[:0] for peer in range(len(group.members)))
        buffer = SharedBuffer(name, tuple(shape), dtype, axis, group.own, copies, group.made, sees_all=False)
        group.buffers[group.made] = buffer
        spec = zlib.crc32(f"{name} {tuple(shape)} {dtype}".encode())
        for peer in range(len(group.members)):
            self._signal(group, peer, _SPEC + group.made % 2, group.made << 32 | spec)
        for peer, member in enumerate(group.members):
            key = (peer, _SPEC + group.made % 2)
            self._until(group, peer, lambda key=key: group.words.get(key, 0) >> 32 >= group.made, None, f"buffer {name!r}")  # type: ignore[misc]
            if group.words[key] & 0xFFFFFFFF != spec:
                mine = f"{name!r} of {dtype}{list(shape)}"
                raise TransportError(f"rank {member} makes another buffer than rank {self.rank}, which makes {mine}")
        return buffer

    def release(self, buffer: Symmetric) -> None:
        """See ``Transport``."""
        assert isinstance(buffer, SharedBuffer)
        self.barrier(buffer.axis)
        del self._groups[buffer.axis].buffers[buffer.where]
        buffer.tensors = ()

    def put(self, buffer: Symmetric, peer: int, source: torch.Tensor, row: int = 0) -> None:
        """See ``Transport``."""
        self._move(Kind.PUT, buffer, peer, source, row)

    def accumulate(self, buffer: Symmetric, peer: int, source: torch.Tensor, row: int = 0) -> None:
        """See ``Transport``."""
        self._move(Kind.ACCUMULATE, buffer, peer, source, row)

    def _move(self, kind: Kind, buffer: Symmetric, peer: int, source: torch.Tensor, row: int) -> None:
        assert isinstance(buffer, SharedBuffer)
        group = self._groups[buffer.axis]
        rows = source.to(buffer.dtype).contiguous()
        if buffer.local.narrow(0, row, source.shape[0]).shape != rows.shape:
            raise TransportError(f"rows of shape {list(rows.shape)} do not fit buffer {buffer.name!r} of {list(buffer.shape)}")
        if peer == group.own:
            _apply(kind, buffer.local.narrow(0, row, rows.shape[0]), rows)
            return
        self._tell(group, peer, kind, buffer.where, row, rows.shape[0])
        dist.send(rows, group.members[peer], group.group, _DATA)

    def get(self, buffer: Symmetric, peer: int, out: torch.Tensor, row: int = 0) -> torch.Tensor:
        """See ``Transport``."""
        assert isinstance(buffer, SharedBuffer)
        group = self._groups[buffer.axis]
        if peer == group.own:
            return out.copy_(buffer.local.narrow(0, row, out.shape[0]))
        self._tell(group, peer, Kind.GET, buffer.where, row, out.shape[0])
        rows = torch.empty(out.shape, dtype=buffer.dtype)
        dist.recv(rows, group.members[peer], group.group, _REPLY)
        return out.copy_(rows)

    # --- signals

    def signal(self, peer: int, slot: int, value: int, axis: str, nbytes: int = 0) -> None:  # noqa: ARG002  (takes no time of its own)
        """See ``Transport``."""
        self._signal(self._groups[axis], peer, checked_slot(slot), value)

    def _signal(self, group: _Group, peer: int, slot: int, value: int) -> None:
        if peer == group.own:
            with group.changed:
                group.words[peer, slot] = value
        else:
            self._tell(group, peer, Kind.SIGNAL, 0, 0, 0, slot, value)

    def test(self, peer: int, slot: int, value: int, axis: str) -> bool:
        """See ``Transport``."""
        return self._groups[axis].words.get((peer, checked_slot(slot)), 0) >= value

    def wait(self, peer: int, slot: int, value: int, axis: str, timeout: float | None = None) -> None:
        """See ``Transport``."""
        group, key = self._groups[axis], (peer, checked_slot(slot))
        what = f"to signal {value} in slot {slot} of axis {axis!r}"
        self._until(group, peer, lambda: group.words.get(key, 0) >= value, timeout, what)

    def barrier(self, axis: str, timeout: float | None = None) -> None:
        """See ``Transport``."""
        group = self._groups[axis]
        group.barriers += 1
        epoch = group.barriers
        for peer in range(len(group.members)):
            self._signal(group, peer, _BARRIER, epoch)
        for peer in range(len(group.members)):
            here = lambda peer=peer: group.words.get((peer, _BARRIER), 0) >= epoch  # noqa: E731
            self._until(group, peer, here, timeout, f"at a barrier of axis {axis!r}")

    def _until(self, group: _Group, peer: int, is_done: Callable[[], bool], timeout: float | None, what: str) -> None:
        limit = self.default_timeout if timeout is None else timeout
        member = group.members[peer]
        with group.changed:
            group.changed.wait_for(lambda: is_done() or peer in group.gone, limit)
            if not is_done():
                if peer in group.gone:
                    raise TransportError(f"rank {self.rank} waited for rank {member} {what}, and it is gone: {group.gone[peer]}")
                raise TransportTimeout(f"rank {self.rank} waited {limit:g} s for rank {member} {what}")

    # --- messages

    def isend(self, tensor: torch.Tensor, peer: int, tag: int, axis: str) -> GlooTransfer:
        """See ``Transport``."""
        group = self._groups[axis]
        work = dist.isend(tensor.contiguous(), group.members[peer], group.group, _FIRST_TAG + tag)
        return GlooTransfer(work, tensor, self.default_timeout, f"rank {group.members[peer]} to take message {tag}")

    def irecv(self, out: torch.Tensor, peer: int, tag: int, axis: str) -> GlooTransfer:
        """See ``Transport``. ``out`` must be contiguous."""
        group = self._groups[axis]
        work = dist.irecv(out, group.members[peer], group.group, _FIRST_TAG + tag)
        return GlooTransfer(work, out, self.default_timeout, f"rank {group.members[peer]} to send message {tag}")

    def cost(self, axis: str) -> LinkCost:  # noqa: ARG002
        """See ``Transport``."""
        return _COST

    def close(self) -> None:
        """See ``Transport``."""
        if not self._closed:
            self._closed = True
            for group in self._groups.values():
                for peer in range(len(group.members)):
                    if peer != group.own:
                        with contextlib.suppress(TransportError):  # it may be gone
                            self._tell(group, peer, Kind.BYE)

    # --- the wire

    def _tell(self, group: _Group, peer: int, kind: Kind, *figures: int) -> None:
        header = torch.tensor([kind, *figures, *[0] * (5 - len(figures))], dtype=torch.int64)
        try:
            dist.send(header, group.members[peer], group.group, _HEADER)
        except RuntimeError as error:
            raise TransportError(f"rank {group.members[peer]} cannot be reached: {error}") from error

    def _serve(self, group: _Group, peer: int) -> None:
        """Carry out what a peer asks for, until it says goodbye or is gone."""
        source, header = group.members[peer], torch.empty(6, dtype=torch.int64)
        try:
            with torch.inference_mode():
                while True:
                    dist.recv(header, source, group.group, _HEADER)
                    kind, number, row, rows, slot, value = header.tolist()
                    if kind == Kind.BYE:
                        reason = "it has closed"
                        break
                    if kind == Kind.SIGNAL:
                        with group.changed:
                            group.words[peer, slot] = value
                            group.changed.notify_all()
                        continue
                    place = group.buffers[number].local.narrow(0, row, rows)
                    if kind == Kind.GET:
                        dist.send(place.contiguous(), source, group.group, _REPLY)
                    else:
                        arrived = torch.empty_like(place, memory_format=torch.contiguous_format)
                        dist.recv(arrived, source, group.group, _DATA)
                        _apply(Kind(kind), place, arrived)
        except (RuntimeError, KeyError) as error:
            reason = str(error)
        with group.changed:
            group.gone[peer] = reason
            group.changed.notify_all()


def _apply(kind: Kind, place: torch.Tensor, rows: torch.Tensor) -> None:
    if kind == Kind.PUT:
        place.copy_(rows)
    else:
        place.add_(rows)
