"""Memory that all ranks of one machine map, to hand each other pieces of tensors: slots of data, and words that say how far one is.

    control     per rank a line of memory with its bell, then per mesh axis a line {posted, consumed, tag of each slot}
    slots       per rank and mesh axis a ring of SLOTS slots; chunk number k lies in slot k % SLOTS

Every word has one writer, except the bells: whoever changes something that a rank may wait for writes a value that was never there
before and wakes it (a futex: Franke, Russell, Kirkwood, "Fuss, Futexes and Furwocks", OLS 2002). So a rank that looks, finds
nothing, and goes to sleep on the value it saw before looking cannot miss it.

Data is written before the word that announces it; x86 keeps that order for other processors without a fence (Intel SDM 3A, 9.2.2).
On other processors ranks talk through gloo.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import platform
from collections.abc import Sequence

import torch

from .mesh import Mesh

SLOTS = 4
SLOT_BYTES = 1 << 20
"""Large enough that the words between two chunks cost little, small enough that a chunk stays in a cache while it is passed on."""

_LINE = 64
_PAGE = 4096
_POSTED, _CONSUMED, _TAGS = 0, 1, 2
_FUTEX_WAIT, _FUTEX_WAKE, _FUTEX = 0, 1, 202


def is_available(device: torch.device) -> bool:
    """Whether ranks on that device can talk through shared memory."""
    return device.type == "cpu" and platform.system() == "Linux" and platform.machine() == "x86_64"


def exchange_bytes(mesh: Mesh) -> int:
    """Size of the file for the ranks of a mesh; pages that nobody touches cost nothing."""
    return _control_bytes(mesh) + mesh.size * len(mesh.axes) * SLOTS * SLOT_BYTES


def _control_bytes(mesh: Mesh) -> int:
    used = mesh.size * (1 + len(mesh.axes)) * _LINE
    return -(-used // _PAGE) * _PAGE


class Exchange:
    """One rank's view of the memory. Axes and ranks are numbers."""

    def __init__(self, fd: int, mesh: Mesh, rank: int) -> None:
        """Map the file ``fd`` of ``exchange_bytes`` bytes, all zero when the first rank comes. The descriptor is closed."""
        self.rank = rank
        self._axes = len(mesh.axes)
        self._data = _control_bytes(mesh)
        try:
            self._map = mmap.mmap(fd, exchange_bytes(mesh))
        finally:
            os.close(fd)
        self._words = memoryview(self._map).cast("q")
        self._bells = memoryview(self._map).cast("i")
        self._address = ctypes.addressof(ctypes.c_char.from_buffer(self._map))
        self._bases: dict[torch.dtype, torch.Tensor] = {}
        self._rings = 0
        self._syscall = ctypes.CDLL(None, use_errno=True).syscall
        self._syscall.argtypes = [ctypes.c_long, ctypes.c_void_p, ctypes.c_int, ctypes.c_int, ctypes.c_void_p]

    def _line(self, rank: int, axis: int) -> int:
        """Number of the first word of a line; axis -1: the line of the bell."""
        return (rank * (1 + self._axes) + 1 + axis) * (_LINE // 8)

    # --- how far ranks are

    def posted(self, rank: int, axis: int) -> int:
        """Chunks that a rank has put into its slots."""
        return self._words[self._line(rank, axis) + _POSTED]

    def consumed(self, rank: int, axis: int) -> int:
        """Chunks that a rank has taken out of everybody's slots."""
        return self._words[self._line(rank, axis) + _CONSUMED]

    def tag(self, rank: int, axis: int, chunk: int) -> int:
        """What a rank says of its chunk."""
        return self._words[self._line(rank, axis) + _TAGS + chunk % SLOTS]

    def post(self, axis: int, chunk: int, tag: int) -> None:
        """The chunk is in this rank's slot."""
        line = self._line(self.rank, axis)
        self._words[line + _TAGS + chunk % SLOTS] = tag
        self._words[line + _POSTED] = chunk + 1

    def consume(self, axis: int, chunk: int) -> None:
        """This rank needs that chunk of others no longer."""
        self._words[self._line(self.rank, axis) + _CONSUMED] = chunk + 1

    def slot(
        self, rank: int, axis: int, chunk: int, dtype: torch.dtype, shape: tuple[int, ...], stride: tuple[int, ...], skip: int = 0
    ) -> torch.Tensor:
        """A view of a slot. stride, skip: in elements."""
        base = self._bases.get(dtype)
        if base is None:
            base = self._bases[dtype] = torch.frombuffer(self._map, dtype=dtype)
        start = self._data + ((rank * self._axes + axis) * SLOTS + chunk % SLOTS) * SLOT_BYTES
        return base.as_strided(shape, stride, start // dtype.itemsize + skip)

    # --- bells

    def bell(self) -> int:
        """The value of this rank's bell; take it before looking for what ``sleep`` would wait for."""
        return self._bells[2 * self._line(self.rank, -1)]

    def ring(self, ranks: Sequence[int]) -> None:
        """Wake ranks."""
        self._rings = (self._rings + 1) & 0x7FFFFF
        value = self._rings << 8 | (self.rank & 0xFF)
        for rank in ranks:
            index = 2 * self._line(rank, -1)
            self._bells[index] = value
            self._syscall(_FUTEX, self._address + 4 * index, _FUTEX_WAKE, 1, None)

    def sleep(self, bell: int, seconds: float) -> None:
        """Until this rank's bell is no longer ``bell``, at most ``seconds``."""
        limit = (ctypes.c_long * 2)(int(seconds), int(seconds % 1 * 1e9))
        address = self._address + 8 * self._line(self.rank, -1)
        self._syscall(_FUTEX, address, _FUTEX_WAIT, bell, ctypes.addressof(limit))
