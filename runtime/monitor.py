"""Where every rank is, readable at any moment by the controller: one page of shared memory a rank, written by the rank alone.

    page = header (what runs, which instruction, since when) + ring of the last collectives entered (axis, number, fingerprint)
           + mailbox (``mailbox``)

Writing costs some hundred nanoseconds an instruction and about a microsecond a collective; nobody polls. The controller looks only
while it waits for an answer, and when something has gone wrong. Two ranks of a group that enter collective number k of their axis
with different fingerprints disagree; stock gloo would pair them silently, or hang (the idea of C4D, arXiv 2406.04594: compare
what each rank has entered).
"""

from __future__ import annotations

import enum
import mmap
import struct
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from .mailbox import MAILBOX_BYTES, OFFSET
from .mesh import Mesh
from .program import RankProgram

PAGE_BYTES = OFFSET + MAILBOX_BYTES
RING = 128
"""Collectives remembered per rank."""

_RUN = struct.Struct("<qqqqq")  # state, handle, sequence, segment, base instruction
_AT = struct.Struct("<qqd")  # instruction, waiting, time
_ENTRY = struct.Struct("<qqqq")  # axis, number, fingerprint, instruction
_AT_OFFSET = 64
_COUNT_OFFSET = 128  # per axis: collectives entered; then the total
_COUNT = struct.Struct("<q")
_RING_OFFSET = 1024
MAX_STAMPS = 2_000_000
"""A trace stops growing at the first segment after this many stamps."""

MAX_AXES = (_RING_OFFSET - _COUNT_OFFSET) // _COUNT.size - 1


class State(enum.IntEnum):
    """What a rank is doing."""

    STARTING = 0
    IDLE = 1
    LOADING = 2
    RUNNING = 3
    WRITING = 4
    """Writing results and updates into shared memory."""


class Stamp(enum.IntEnum):
    """What a time stamp marks: a segment begins, an instruction starts, a collective starts, waiting starts, a state is entered."""

    BEGIN = 0
    AT = 1
    ISSUE = 2
    WAIT = 3
    END = 4


class Entry(NamedTuple):
    """One collective that a rank entered: its axis, its number on that axis, fingerprint and instruction."""

    axis: int
    number: int
    fingerprint: int
    instruction: int


@dataclass(frozen=True)
class Position:
    """A snapshot of one page."""

    state: State
    handle: int
    sequence: int
    segment: int
    instruction: int
    waiting: bool
    time: float
    counts: tuple[int, ...]
    entries: tuple[Entry, ...]

    @property
    def mark(self) -> tuple[object, ...]:
        """Changes exactly when the rank makes progress."""
        return (self.state, self.sequence, self.instruction, self.waiting, self.counts)


class PageWriter:
    """The rank's side. ``at``, ``issue`` and ``wait`` are the hooks of the executors (``flat.Monitor``)."""

    at: Callable[[int], None]
    issue: Callable[[int, int], None]
    wait: Callable[[int], None]

    def __init__(self, page: mmap.mmap, axes: int) -> None:
        self.page = page
        self._axes: dict[int, int] = {}
        self._handle = -1
        self._counts = [0] * (axes + 1)
        self._stamps: list[list[tuple[int, int, float]]] = []  # empty while nobody traces, else one list
        page[:OFFSET] = bytes(OFFSET)
        self._bind()
        self.state(State.STARTING)

    def _bind(self) -> None:
        """The three hooks as closures: they run once per instruction, so every attribute lookup counts."""
        page, now, pack_at, pack_entry, pack_count = self.page, time.monotonic, _AT.pack_into, _ENTRY.pack_into, _COUNT.pack_into
        axes, counts, last, stamps = self._axes, self._counts, len(self._counts) - 1, self._stamps

        def at(index: int) -> None:
            time = now()
            pack_at(page, _AT_OFFSET, index, 0, time)
            if stamps:
                stamps[0].append((Stamp.AT, index, time))

        def wait(index: int) -> None:
            time = now()
            pack_at(page, _AT_OFFSET, index, 1, time)
            if stamps:
                stamps[0].append((Stamp.WAIT, index, time))

        def issue(index: int, fingerprint: int) -> None:
            time = now()
            pack_at(page, _AT_OFFSET, index, 1, time)
            if stamps:
                stamps[0].append((Stamp.ISSUE, index, time))
            axis = axes.get(index, -1)
            if axis < 0:  # point to point: both ends differ by nature
                return
            total = counts[last]
            counts[last] = total + 1
            number = counts[axis] = counts[axis] + 1
            pack_entry(page, _RING_OFFSET + total % RING * _ENTRY.size, axis, number, fingerprint, index)
            pack_count(page, _COUNT_OFFSET + axis * 8, number)
            pack_count(page, _COUNT_OFFSET + last * 8, total + 1)

        self.at, self.wait, self.issue = at, wait, issue

    def begin(self, handle: int, sequence: int, segment: int, collective_axes: dict[int, int]) -> None:
        """A segment starts; ``collective_axes``: instruction -> number of its mesh axis, for the collectives of the program."""
        if self._handle != handle:
            self._handle = handle
            self._axes.clear()
            self._axes.update(collective_axes)
        _RUN.pack_into(self.page, 0, State.RUNNING, handle, sequence, segment, 0)
        if self._stamps and len(self._stamps[0]) < MAX_STAMPS:
            self._stamps[0].append((Stamp.BEGIN, handle, time.monotonic()))

    def state(self, state: State) -> None:
        """Between segments."""
        stamp = time.monotonic()
        _COUNT.pack_into(self.page, 0, state)
        _AT.pack_into(self.page, _AT_OFFSET, -1, 0, stamp)
        if self._stamps:
            self._stamps[0].append((Stamp.END, state, stamp))

    def start_stamps(self) -> None:
        """Record the time of every hook from now on."""
        self._stamps[:] = [[]]

    def stop_stamps(self) -> list[tuple[int, int, float]]:
        """What was recorded: (Stamp, instruction or handle or state, monotonic seconds)."""
        found = self._stamps.pop() if self._stamps else []
        return found


def collective_axes(program: RankProgram) -> dict[int, int]:
    """instruction -> number of its mesh axis, for the collectives that all ranks of a group enter alike (no send, no recv)."""
    names = program.mesh.names
    return {
        c.instruction: names.index(c.axis)
        for c in program.collectives
        if c.axis in names and "send" not in c.op and "recv" not in c.op
    }


def read_page(page: mmap.mmap, axes: int) -> Position:
    """The controller's side. A page may be read while it is written, so whoever blames a rank looks twice."""
    state, handle, sequence, segment, _ = _RUN.unpack_from(page, 0)
    instruction, waiting, stamp = _AT.unpack_from(page, _AT_OFFSET)
    counts = struct.unpack_from(f"<{axes + 1}q", page, _COUNT_OFFSET)
    total = counts[-1]
    ring = [Entry(*entry) for entry in _ENTRY.iter_unpack(page[_RING_OFFSET : _RING_OFFSET + RING * _ENTRY.size])] if total else []
    start, stop = max(0, total - RING + 2) % RING, total % RING
    entries = tuple(ring[start:stop] if start <= stop else ring[start:] + ring[:stop])
    return Position(State(state), handle, sequence, segment, instruction, bool(waiting), stamp, counts[:-1], entries)


@dataclass(frozen=True)
class Disagreement:
    """Ranks of a group entered collective ``number`` of ``axis`` differently. odd: the fewest of a kind, in doubt the last ones."""

    axis: str
    number: int
    odd: tuple[int, ...]
    entries: dict[int, Entry]


def find_disagreement(positions: Sequence[Position], mesh: Mesh) -> Disagreement | None:
    """The earliest collective that the ranks of one group entered with different fingerprints or instructions."""
    worst: Disagreement | None = None
    for axis_number, axis in enumerate(mesh.names):
        for group in mesh.groups(axis):
            found = _compare(positions, group, axis_number, axis)
            if found is not None and (worst is None or found.number < worst.number):
                worst = found
    return worst


def _compare(positions: Sequence[Position], group: tuple[int, ...], axis_number: int, axis: str) -> Disagreement | None:
    seen: dict[int, dict[int, Entry]] = {}
    for rank in group:
        for entry in positions[rank].entries:
            if entry.axis == axis_number:
                seen.setdefault(entry.number, {})[rank] = entry
    for number in sorted(seen):
        kinds: dict[tuple[int, int], list[int]] = {}
        for rank, entry in seen[number].items():
            kinds.setdefault((entry.fingerprint, entry.instruction), []).append(rank)
        if len(kinds) > 1:
            odd = min(kinds.values(), key=lambda ranks: (len(ranks), -ranks[0]))
            return Disagreement(axis, number, tuple(odd), seen[number])
    return None
