"""Anonymous files that the controller and its ranks map: the two ends of shared memory."""

from __future__ import annotations

import contextlib
import mmap
import os
import sys
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch

from .errors import RunError

_LARGE_PAGE = 2 << 20


class Location(NamedTuple):
    """Where a tensor's first element lies: segment number and byte offset in it."""

    segment: int
    offset: int


@dataclass(eq=False)
class Segment:
    """One anonymous file, mapped to be read and written. recycled: freed blocks are used again; else it dies with its last one."""

    ident: int
    fd: int
    nbytes: int
    recycled: bool
    map: mmap.mmap = field(repr=False)
    address: int = 0
    used: int = 0
    live: int = 0

    @classmethod
    def create(cls, ident: int, nbytes: int, *, recycled: bool) -> Segment:
        """Raises RunError where the system cannot give that much memory or has no ``memfd_create``."""
        if not hasattr(os, "memfd_create"):
            raise RunError(f"local ranks share memory through memfd_create, which {sys.platform} lacks; use engine='sim' here")
        nbytes = -(-nbytes // mmap.PAGESIZE) * mmap.PAGESIZE
        fd = os.memfd_create("hocket", os.MFD_CLOEXEC)
        try:
            os.ftruncate(fd, nbytes)
            mapping = _mapped(fd, nbytes)
        except (OSError, ValueError) as error:
            os.close(fd)
            raise RunError(f"no {nbytes:,} bytes of shared memory to be had: {error}") from error
        address = int(np.frombuffer(mapping, np.uint8, 1).ctypes.data)
        segment = cls(ident, fd, nbytes, recycled, mapping, address)
        weakref.finalize(segment, os.close, fd)
        return segment


def _mapped(fd: int, nbytes: int) -> mmap.mmap:
    """Map a file, with large pages where the system has them for shared memory: a fault then brings 2 MiB instead of 4 KiB."""
    mapping = mmap.mmap(fd, nbytes)
    if hasattr(mmap, "MADV_HUGEPAGE") and nbytes >= _LARGE_PAGE:
        with contextlib.suppress(OSError):  # a kernel without large pages refuses the advice
            mapping.madvise(mmap.MADV_HUGEPAGE)
    return mapping


class MappedSegments:
    """A rank's view of the controller's segments."""

    def __init__(self) -> None:
        self._maps: dict[int, mmap.mmap] = {}
        self._bases: dict[tuple[int, torch.dtype], torch.Tensor] = {}

    def add(self, ident: int, fd: int, nbytes: int) -> None:
        """Map a segment and close its descriptor."""
        try:
            self._maps[ident] = _mapped(fd, nbytes)
        finally:
            os.close(fd)

    def drop(self, ident: int) -> None:
        """Forget a segment; it is unmapped when the last view of it dies."""
        self._maps.pop(ident, None)
        for key in [key for key in self._bases if key[0] == ident]:
            del self._bases[key]

    def read(self, where: Location, nbytes: int) -> bytes:
        """A copy of raw bytes."""
        return self._maps[where.segment][where.offset : where.offset + nbytes]

    def tensor(self, where: Location, shape: Sequence[int], stride: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """A view; ``stride`` in elements, as in torch."""
        key = (where.segment, dtype)
        base = self._bases.get(key)
        if base is None:
            base = self._bases[key] = torch.frombuffer(self._maps[where.segment], dtype=dtype)
        return base.as_strided(tuple(shape), tuple(stride), where.offset // dtype.itemsize)

    def hold(self, tensor: torch.Tensor) -> bool:
        """Whether a tensor is a view of a segment."""
        address = tensor.untyped_storage().data_ptr()
        return any(base.untyped_storage().data_ptr() == address for base in self._bases.values())
