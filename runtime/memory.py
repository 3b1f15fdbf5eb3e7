"""Memory that this process and its ranks see together, so that tensors travel as offsets and never through a socket.

A segment is an anonymous file (``memfd_create``) mapped by the controller and, from the descriptor, by every rank. It has no name,
so nothing can be left behind in ``/dev/shm`` however the processes end.

    parameters   share() moves a tensor's storage into a segment; the tensor object, its strides and its ties stay
    all else     empty() hands out a tensor that owns a block; the block returns to the pool when its *storage* is freed, so user
                 code may keep a gradient or an output, or accumulate into it, without a copy
"""

from __future__ import annotations

import bisect
import os
import threading
import weakref
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import count
from math import prod
from typing import Any

import numpy as np
import torch

from .errors import InputError
from .segments import Location, Segment

ALIGNMENT = 64
"""Bytes: a cache line, and a multiple of the size of every dtype."""

SEGMENT_BYTES = 32 << 20
"""Smallest segment of the pool. Pages that nobody touches cost nothing."""

PACKED_BYTES = 64 << 10
"""Tensors below this size that are allocated together share one block."""


@dataclass(frozen=True)
class _Block:
    segment: Segment
    offset: int
    nbytes: int


def size_class(nbytes: int) -> int:
    """Round up to one of four sizes per power of two, so that blocks of freed tensors fit the next ones; at most 25 % is unused."""
    if nbytes <= 4 * ALIGNMENT:
        return max(ALIGNMENT, -(-nbytes // ALIGNMENT) * ALIGNMENT)
    step = 1 << ((nbytes - 1).bit_length() - 3)
    return -(-nbytes // step) * step


@dataclass(frozen=True)
class _Entry:
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    nbytes: int
    offset: int

    @classmethod
    def of(cls, shape: Sequence[int], dtype: torch.dtype, offset: int) -> _Entry:
        return cls(tuple(shape), contiguous_stride(shape), dtype, prod(shape) * dtype.itemsize, offset)


@dataclass(frozen=True)
class BlockPlan:
    """Contiguous tensors to be allocated together, again and again.

    Those below PACKED_BYTES share one block of ``packed`` bytes, which is freed with the last of them.
    """

    entries: tuple[_Entry, ...]
    packed: int

    @classmethod
    def of(cls, specs: Iterable[tuple[Sequence[int], torch.dtype]]) -> BlockPlan:
        """specs: (shape, dtype) of each tensor."""
        entries, packed = [], 0
        listed = list(specs)
        for shape, dtype in listed:
            entry = _Entry.of(shape, dtype, packed)
            if entry.nbytes < PACKED_BYTES and len(listed) > 1:
                packed += max(-(-entry.nbytes // ALIGNMENT), 1) * ALIGNMENT
            else:
                entry = _Entry.of(shape, dtype, -1)
            entries.append(entry)
        return cls(tuple(entries), packed)


def contiguous_stride(shape: Sequence[int]) -> tuple[int, ...]:
    """Strides of a row-major tensor, in elements."""
    strides: list[int] = []
    step = 1
    for size in reversed(shape):
        strides.append(step)
        step *= max(size, 1)
    return tuple(reversed(strides))


def _over(storage: torch.UntypedStorage, offset: int, entry: _Entry) -> torch.Tensor:
    """A tensor over part of a storage. Not a view of another tensor, so user code may change it in place under autograd."""
    tensor = torch.empty(0, dtype=entry.dtype)
    return tensor.set_(storage, offset // entry.dtype.itemsize, entry.shape, entry.stride)


class SharedArena:
    """All shared memory of one process. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._idents = count()
        self._segments: dict[int, Segment] = {}
        self._sorted: list[tuple[int, Segment]] = []
        self._free: dict[int, list[_Block]] = {}
        self._returned: deque[_Block] = deque()  # filled by weak references, at any moment, in any thread: no lock there
        self._owners: dict[int, weakref.ref[object]] = {}
        self._keys = count()
        self.retired: list[int] = []
        """Numbers of the segments that are gone, in order; ranks that mapped them should unmap them."""

    # --- tensors of the user

    def share(self, tensors: Iterable[torch.Tensor]) -> None:
        """Move the storages of CPU tensors into shared memory, in place (``tensor.data`` is replaced); storages used by several of
        the given tensors move once. Tensors already there stay as they are. Raises InputError for what cannot be shared."""
        moving: dict[int, tuple[torch.UntypedStorage, list[torch.Tensor]]] = {}
        for tensor in tensors:
            _check_shareable(tensor)
            if self.locate(tensor) is None:
                storage = tensor.untyped_storage()
                moving.setdefault(storage.data_ptr(), (storage, []))[1].append(tensor)
        if not moving:
            return
        sizes = [max(-(-storage.nbytes() // ALIGNMENT), 1) * ALIGNMENT for storage, _ in moving.values()]
        with self._lock:
            segment = self._add_segment(max(sum(sizes), ALIGNMENT), recycled=False)
            blocks = [self._carve(segment, size) for size in sizes]
        for block, (storage, users) in zip(blocks, moving.values(), strict=True):
            shared = self._storage(block)
            nbytes = storage.nbytes()
            if nbytes:
                old, new = torch.empty(0, dtype=torch.uint8), torch.empty(0, dtype=torch.uint8)
                new.set_(shared, 0, (nbytes,), (1,)).copy_(old.set_(storage, 0, (nbytes,), (1,)))
            for tensor in users:
                view = torch.empty(0, dtype=tensor.dtype)
                view.set_(shared, tensor.storage_offset(), tensor.size(), tensor.stride())
                tensor.data = view

    def locate(self, tensor: torch.Tensor) -> Location | None:
        """Where a tensor lies in shared memory, or None."""
        return self.locate_address(tensor.data_ptr())

    def locate_address(self, address: int) -> Location | None:
        """The same for an address."""
        ordered = self._sorted
        at = bisect.bisect_right(ordered, address, key=lambda entry: entry[0]) - 1
        if at < 0:
            return None
        base, segment = ordered[at]
        return Location(segment.ident, address - base) if address < base + segment.nbytes else None

    # --- the pool

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """An uninitialised contiguous tensor that owns its block."""
        entry = _Entry.of(shape, dtype, -1)
        return self._alone(self._take(entry.nbytes), entry)

    def allocate(self, plan: BlockPlan) -> tuple[list[torch.Tensor], list[int]]:
        """Uninitialised tensors for a plan, and (segment, byte offset) of each, flat."""
        tensors: list[torch.Tensor] = []
        places: list[int] = []
        block = self._take(plan.packed) if plan.packed else None
        packed = self._storage(block) if block is not None else None
        for entry in plan.entries:
            if block is not None and packed is not None and entry.offset >= 0:
                tensors.append(_over(packed, entry.offset, entry))
                places += (block.segment.ident, block.offset + entry.offset)
            else:
                alone = self._take(entry.nbytes)
                tensors.append(self._alone(alone, entry))
                places += (alone.segment.ident, alone.offset)
        return tensors, places

    def descriptors(self, known: Iterable[int] = ()) -> list[tuple[int, int, int]]:
        """``(number, file descriptor, bytes)`` of the segments whose numbers are not in ``known``."""
        with self._lock:
            return [(s.ident, s.fd, s.nbytes) for s in self._segments.values() if s.ident not in known]

    def newest(self) -> int:
        """Number of the newest segment, -1 without one."""
        return next(reversed(self._segments), -1)

    def live_blocks(self) -> int:
        """Blocks that some tensor owns."""
        with self._lock:
            self._collect()
            return sum(segment.live for segment in self._segments.values())

    def total_bytes(self) -> int:
        """Address space of all segments; untouched pages are not backed by memory."""
        return sum(segment.nbytes for segment in list(self._segments.values()))

    def trim(self) -> None:
        """Give segments without any live block back to the system."""
        with self._lock:
            self._collect()
            for segment in [s for s in self._segments.values() if not s.live]:
                self._drop(segment)

    # --- inside

    def _take(self, nbytes: int) -> _Block:
        wanted = size_class(nbytes)
        with self._lock:
            self._collect()
            free = self._free.get(wanted)
            if free:
                block = free.pop()
                block.segment.live += 1
                return block
            for segment in self._segments.values():
                if segment.recycled and segment.used + wanted <= segment.nbytes:
                    return self._carve(segment, wanted)
            for segment in self._segments.values():
                if segment.recycled and not segment.live and wanted <= segment.nbytes:
                    self._reset(segment)
                    return self._carve(segment, wanted)
            return self._carve(self._add_segment(max(wanted, SEGMENT_BYTES), recycled=True), wanted)

    def _carve(self, segment: Segment, nbytes: int) -> _Block:
        block = _Block(segment, segment.used, nbytes)
        segment.used += nbytes
        segment.live += 1
        return block

    def _alone(self, block: _Block, entry: _Entry) -> torch.Tensor:
        numel = entry.nbytes // entry.dtype.itemsize
        if not numel:
            return _over(self._storage(block), 0, entry)
        return torch.frombuffer(self._own(block), dtype=entry.dtype, count=numel).as_strided_(entry.shape, entry.stride)

    def _storage(self, block: _Block) -> torch.UntypedStorage:
        return torch.frombuffer(self._own(block), dtype=torch.uint8).untyped_storage()

    def _own(self, block: _Block) -> Any:
        """A buffer over a block: it dies with the last storage over it, and then the weak reference returns the block."""
        owner = np.frombuffer(block.segment.map, np.uint8, block.nbytes, block.offset)
        key = next(self._keys)
        returned, owners = self._returned, self._owners

        def give_back(_: object) -> None:
            owners.pop(key, None)
            returned.append(block)

        owners[key] = weakref.ref(owner, give_back)
        return owner

    def _collect(self) -> None:
        while self._returned:
            block = self._returned.popleft()
            segment = block.segment
            segment.live -= 1
            if segment.recycled:
                self._free.setdefault(block.nbytes, []).append(block)
            elif not segment.live:
                self._drop(segment)

    def _reset(self, segment: Segment) -> None:
        """A segment without live blocks starts afresh, so that other block sizes can use it."""
        for size in list(self._free):
            kept = [block for block in self._free[size] if block.segment is not segment]
            if kept:
                self._free[size] = kept
            else:
                del self._free[size]
        segment.used = 0

    def _add_segment(self, nbytes: int, *, recycled: bool) -> Segment:
        segment = Segment.create(next(self._idents), nbytes, recycled=recycled)
        self._segments[segment.ident] = segment
        self._sorted = sorted(((s.address, s) for s in self._segments.values()), key=lambda entry: entry[0])
        return segment

    def _drop(self, segment: Segment) -> None:
        self._reset(segment)
        del self._segments[segment.ident]
        self._sorted = [entry for entry in self._sorted if entry[1] is not segment]
        self.retired.append(segment.ident)


_default: dict[int, SharedArena] = {}


def default_arena() -> SharedArena:
    """The arena of this process; a forked child gets a fresh one."""
    return _default.setdefault(os.getpid(), SharedArena())


def _check_shareable(tensor: torch.Tensor) -> None:
    if tensor.device.type != "cpu" or tensor.layout is not torch.strided or tensor.is_quantized:
        found = f"{tensor.layout} on {tensor.device} of shape {tuple(tensor.shape)}"
        raise InputError(f"only dense CPU tensors can lie in shared memory; found {found}")
    if not isinstance(tensor, torch.nn.Parameter) and type(tensor) is not torch.Tensor and hasattr(tensor, "__tensor_flatten__"):
        raise InputError(f"a {type(tensor).__name__} wraps other tensors and cannot lie in shared memory; pass the plain tensor")
