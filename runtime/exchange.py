"""Memory that all ranks of one machine map: slots of data, words that say how far one is, and buffers that ranks make on the way.

    bells       per rank a line: a bell (a futex), and whether its owner sleeps
    progress    per rank and mesh axis a line {posted, consumed, tag of each slot}
    signals     per rank, mesh axis and sender a row of words that only the sender writes
    slots       per rank and mesh axis a ring of SLOTS slots; chunk number k lies in slot k % SLOTS
    heaps       per group of ranks a range of its own, far behind, for buffers that the group makes (``Heap``)

Every word has one writer, except the bells. Who changes something that a rank may wait for then looks whether that rank sleeps,
and if so rings: it writes a value to the bell that was never there before and wakes its owner (Franke, Russell, Kirkwood, "Fuss,
Futexes and Furwocks", OLS 2002). Who is about to sleep first says so and then looks once more. With a fence between the two steps
of either side one of them sees the other (Dekker), so nobody sleeps through what it waits for, and nobody calls the kernel for a
rank that is awake.

Data is written before the word that announces it; x86 keeps that order for other processors (Intel SDM 3A, 9.2.2), and the fence
covers stores that bypass the caches. On other processors ranks talk through gloo.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import platform
import time
from collections.abc import Callable, Sequence

import torch

from .fence import new_fence, writes_stay_in_order
from .mesh import Mesh

SLOTS = 8
SLOT_BYTES = 512 << 10
"""Large enough that the words between two chunks cost little, small enough that a chunk stays in a cache while it is passed on."""

SIGNALS = 520
"""Words in a row of signals."""

SPIN_ALONE, SPIN_CROWDED = 1e-3, 2e-5
"""Seconds that a rank looks for what it waits for before it sleeps: where every rank has its core, and where ranks share cores."""

_NAP = 0.1
"""Seconds after which a sleeping rank looks up by itself, though nobody rang."""

POSTED, CONSUMED, TAGS = 0, 1, 2
"""Words of a line of progress: chunks put into this rank's slots, chunks taken out of everybody's, and from TAGS on what each slot
holds."""

_LINE = 64
_PAGE = 4096
_FUTEX_WAIT, _FUTEX_WAKE, _FUTEX = 0, 1, 202


def is_available(device: torch.device) -> bool:
    """Whether ranks on that device can talk through shared memory."""
    return device.type == "cpu" and platform.system() == "Linux" and writes_stay_in_order()


def why_unavailable(device: torch.device) -> str:
    """In words, for a person; "" where ranks can talk through shared memory."""
    if is_available(device):
        return ""
    if device.type != "cpu":
        return f"ranks on {device.type} have a faster way"
    return f"the order in which {platform.machine()} shows writes to other processors is not relied on"


class Layout:
    """Where things lie in the file, in bytes, for the ranks of a mesh. Axes are numbers."""

    def __init__(self, mesh: Mesh) -> None:
        self.axes = len(mesh.axes)
        self.largest = max(size for _, size in mesh.axes)
        self.progress = mesh.size * _LINE
        self.signals = self.progress + mesh.size * self.axes * _LINE * 2
        self.slots = _pages(self.signals + mesh.size * self.axes * self.largest * SIGNALS * 8)
        self.total = self.slots + mesh.size * self.axes * SLOTS * SLOT_BYTES


def exchange_bytes(mesh: Mesh) -> int:
    """Size of the file for the ranks of a mesh, heaps apart; pages that nobody touches cost nothing."""
    return Layout(mesh).total


def _pages(nbytes: int) -> int:
    return -(-nbytes // _PAGE) * _PAGE


class Exchange:
    """One rank's view of the memory. Axes and ranks are numbers."""

    def __init__(self, fd: int, mesh: Mesh, rank: int, spin: float = SPIN_ALONE) -> None:
        """Map the file ``fd`` of ``exchange_bytes`` bytes, all zero when the first rank comes. Owns the descriptor from now on.

        spin: seconds to look before sleeping."""
        self.mesh, self.rank, self.fd = mesh, rank, fd
        self.layout = layout = Layout(mesh)
        self.spin = spin
        self._map = mmap.mmap(fd, layout.total)
        self.words = memoryview(self._map).cast("q")
        self._bells = memoryview(self._map).cast("i")
        self._address = ctypes.addressof(ctypes.c_char.from_buffer(self._map))
        self._bases: dict[torch.dtype, torch.Tensor] = {}
        self.movers: list[Callable[[], object]] = []
        self.fence = new_fence()
        self._rings = 0
        self._syscall = ctypes.CDLL(None, use_errno=True).syscall
        self._syscall.argtypes = [ctypes.c_long, ctypes.c_void_p, ctypes.c_int, ctypes.c_int, ctypes.c_void_p]

    def progress_word(self, rank: int, axis: int) -> int:
        """Number of the first word of a line of progress."""
        return (self.layout.progress + (rank * self.layout.axes + axis) * _LINE * 2) // 8

    def signal_word(self, rank: int, axis: int, sender: int) -> int:
        """Number of the first word of the row of signals at ``rank`` from the index ``sender`` on the axis."""
        layout = self.layout
        return layout.signals // 8 + ((rank * layout.axes + axis) * layout.largest + sender) * SIGNALS

    # --- chunks

    def slot(
        self,
        rank: int,
        axis: int,
        chunk: int,
        dtype: torch.dtype,
        *,
        shape: tuple[int, ...],
        stride: tuple[int, ...],
        skip: int = 0,
    ) -> torch.Tensor:
        """A view of a slot. stride, skip: in elements."""
        base = self._bases.get(dtype)
        if base is None:
            base = self._bases[dtype] = torch.frombuffer(self._map, dtype=dtype)
        start = self.layout.slots + ((rank * self.layout.axes + axis) * SLOTS + chunk % SLOTS) * SLOT_BYTES
        return base.as_strided(shape, stride, start // dtype.itemsize + skip)

    # --- bells

    def notify(self, ranks: Sequence[int]) -> None:
        """Wake those ranks that sleep; call it after changing what they may wait for."""
        self.fence()
        bells = self._bells
        for rank in ranks:
            line = rank * (_LINE // 4)
            if bells[line + 1]:
                self._rings = (self._rings + 1) & 0x7FFFFF
                bells[line] = self._rings << 8 | (self.rank & 0xFF)
                self._syscall(_FUTEX, self._address + 4 * line, _FUTEX_WAKE, 1, None)

    def until(self, is_done: Callable[[], bool], timeout: float, nap: float = _NAP) -> bool:
        """Look until ``is_done``; False after ``timeout`` seconds.

        Yields the core between looks, and sleeps after ``spin`` seconds, for ``nap`` seconds at a time where nobody rings. Before
        every look the ``movers`` work on whatever else is under way on this rank, so that nobody waits for a rank that waits."""
        now = time.monotonic
        start = now()
        sleep_from = start + self.spin
        line = self.rank * (_LINE // 4)
        bells, movers = self._bells, self.movers
        while True:
            for _ in range(8):
                for move in movers:
                    move()
                if is_done():
                    return True
                os.sched_yield()
            at = now()
            if at < sleep_from:
                continue
            bell = bells[line]
            bells[line + 1] = 1
            self.fence()
            for move in movers:
                move()
            if is_done():
                bells[line + 1] = 0
                return True
            limit = (ctypes.c_long * 2)(0, int(nap * 1e9))
            self._syscall(_FUTEX, self._address + 4 * line, _FUTEX_WAIT, bell, ctypes.addressof(limit))
            bells[line + 1] = 0
            if at - start > timeout:
                return is_done()


def available_bytes() -> int:
    """Memory that this machine can give without taking it from anybody."""
    with open("/proc/meminfo") as file:
        for line in file:
            name, _, figure = line.partition(":")
            if name == "MemAvailable":
                return int(figure.split()[0]) << 10
    return os.sysconf("SC_AVPHYS_PAGES") * mmap.PAGESIZE


def extend(exchange: Exchange, start: int, nbytes: int, *, reserve: bool) -> mmap.mmap:
    """Map a part of the file behind what all ranks map. reserve: take its memory now rather than page by page when it is touched.

    OSError where there is too little: a fault later would end the process, and the kernel itself tries to the last page.
    """
    if nbytes > available_bytes():
        raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))
    if reserve:
        os.posix_fallocate(exchange.fd, start, nbytes)
    else:
        os.posix_fallocate(exchange.fd, start + nbytes - _PAGE, _PAGE)  # never shrinks the file, as truncating it could
    return mmap.mmap(exchange.fd, nbytes, offset=start)


_GROUP_BYTES = 1 << 38


class Heap:
    """Buffers that a group of ranks makes together: every rank asks for the same ones in the same order, so that no rank needs to
    ask where they are. Freed space is used again in the same way."""

    def __init__(self, exchange: Exchange, axis: int) -> None:
        mesh = exchange.mesh
        self._exchange = exchange
        self._members = len(mesh.group(mesh.names[axis], exchange.rank))
        group = axis * mesh.size + mesh.group(mesh.names[axis], exchange.rank)[0]
        self._base = (1 + group) * _GROUP_BYTES
        self._used = 0
        self._free: dict[int, list[int]] = {}

    def take(self, nbytes: int) -> tuple[int, int, mmap.mmap]:
        """(place, bytes per rank, memory of all ranks one after another). OSError when there is no memory."""
        each = max(_pages(nbytes), _PAGE)
        total = each * self._members
        spare = self._free.get(each)
        if spare:
            place = spare.pop()
        else:
            place = self._used
            self._used += total
        return place, each, extend(self._exchange, self._base + place, total, reserve=True)

    def give_back(self, place: int, each: int) -> None:
        """The next buffer of that size may lie there."""
        self._free.setdefault(each, []).append(place)


def mail_place(exchange: Exchange, axis: int, sender: int, receiver: int, nbytes: int) -> int:
    """Where in the file the messages of one rank to another lie: behind all heaps."""
    mesh = exchange.mesh
    pair = (axis * mesh.size + sender) * mesh.size + receiver
    return (1 + len(mesh.axes) * mesh.size) * _GROUP_BYTES + pair * nbytes
