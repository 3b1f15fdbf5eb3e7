"""Letters from the controller to one rank, and the rank's word that it is done, through the page of memory they share.

A process that is woken up by another one costs both of them more than a short step takes. So both look at the page for a while
before they sleep, and whoever writes there wakes the other only if it sleeps:

    controller                               rank
    letter k into slot k; POSTED = k         until POSTED >= k: look; after a while RANK_SLEEPS = 1, look once more, receive
    RANK_SLEEPS? ring at its socket          READ = k; do it; DONE = k
    until DONE >= k: look; after a while     CONTROLLER_SLEEPS? say so at the socket
    CONTROLLER_SLEEPS = 1, look once more, receive

Between a write and the look at whether the other one sleeps stands a fence, on both sides, so one of the two sees the other.
A letter that is too long, or brings descriptors, goes by the socket; its slot says so.

All this relies on words being seen after the data they announce (``fence.writes_stay_in_order``). On other processors every letter
and every answer goes by the socket, and the page only counts.
"""

from __future__ import annotations

import mmap
import os
import struct
import time
from collections.abc import Callable, Sequence

from . import wire
from .fence import new_fence, writes_stay_in_order

OFFSET = 8192
"""Where the mailbox begins on the page; ``monitor`` has what lies before."""

SLOTS = 32
SLOT_BYTES = 1024
MAILBOX_BYTES = 512 + SLOTS * SLOT_BYTES

_POSTED, _READ, _DONE, _RANK_SLEEPS, _CONTROLLER_SLEEPS = ((OFFSET + 64 * line) // 8 for line in range(5))
"""Words on cache lines of their own: number of the last letter written, taken out, and done; who sleeps."""

_FIRST_SLOT = OFFSET + 512
_LENGTH = struct.Struct("<q")
_BY_SOCKET = -1

LONGEST = SLOT_BYTES - _LENGTH.size
"""Bytes of the longest letter that fits a slot."""

_DOORBELL = wire.encode(wire.Packet(wire.Op.DOORBELL, 0, 0, 0))


class Watch:
    """How long to look for something before sleeping: for long when the last wait was short, else for a moment.

    A wait that lasts longer than ``LONG`` costs a moment of looking more than going to sleep at once; waits that do not never cost
    the sleep, whose end takes longer than many a step and leaves the caches cold.
    """

    MOMENT, LONG = 1e-4, 2e-3
    """Seconds."""

    def __init__(self) -> None:
        self._began = 0.0
        self._seconds = self.MOMENT

    def begin(self) -> float:
        """The wait begins; until when to look, on the monotonic clock."""
        self._began = time.monotonic()
        return self._began + self._seconds

    def end(self) -> None:
        """The wait is over."""
        self._seconds = self.LONG if time.monotonic() - self._began < self.LONG else self.MOMENT


class Outbox:
    """The controller's side of one rank. by_memory: whether letters may go through the page; the rank must think the same."""

    def __init__(self, page: mmap.mmap, *, by_memory: bool = writes_stay_in_order()) -> None:
        self._page = page
        self._by_memory = by_memory
        self._words = memoryview(page).cast("q")
        self._fence = new_fence()

    def is_full(self, number: int) -> bool:
        """Whether letter ``number`` would overwrite one that the rank has not taken out."""
        return number - self._words[_READ] > SLOTS

    def put(self, number: int, letter: bytes, *, by_socket: bool) -> bytes | None:
        """Write letter ``number``, or the note that it comes by the socket; what must be sent there now, if anything."""
        if not self._by_memory:
            return letter
        words, at = self._words, _FIRST_SLOT + number % SLOTS * SLOT_BYTES
        if by_socket or len(letter) > LONGEST:
            _LENGTH.pack_into(self._page, at, _BY_SOCKET)
            words[_POSTED] = number  # before the letter is sent: a rank that it wakes finds the note
            return letter
        self._page[at : at + 8 + len(letter)] = _LENGTH.pack(len(letter)) + letter
        words[_POSTED] = number
        self._fence()
        return _DOORBELL if words[_RANK_SLEEPS] else None

    def done(self) -> int:
        """Number of the last letter that the rank has done."""
        return self._words[_DONE]

    def sleep(self, asleep: int) -> None:
        """Whether the controller sleeps (1) until the rank sends a packet, or looks by itself (0)."""
        self._words[_CONTROLLER_SLEEPS] = asleep

    def release(self) -> None:
        """Let go of the page."""
        self._words.release()


class Inbox:
    """The rank's side. watch: how long it looks for a letter before it sleeps, None: not at all; by_memory: see ``Outbox``."""

    def __init__(
        self, page: mmap.mmap, socket: wire.Inbox, watch: Watch | None, *, by_memory: bool = writes_stay_in_order()
    ) -> None:
        self._page = page
        self._by_memory = by_memory
        self._words = memoryview(page).cast("q")
        self._socket = socket
        self._fence: Callable[[], None] = new_fence()
        self._watch = watch
        self._number = 0
        self._parcels: list[tuple[wire.Packet, list[int]]] = []

    def receive(self) -> tuple[wire.Packet, Sequence[int]]:
        """The next letter, in order, and its descriptors. Raises wire.Closed when the controller is gone."""
        words = self._words
        self._number = number = self._number + 1
        if not self._by_memory:
            words[_READ] = number
            return self._parcel()
        if words[_POSTED] < number:
            self._wait(number)
        at = _FIRST_SLOT + number % SLOTS * SLOT_BYTES
        (length,) = _LENGTH.unpack_from(self._page, at)
        letter = self._page[at + 8 : at + 8 + length] if length >= 0 else b""
        words[_READ] = number
        return (wire.decode(letter), ()) if length >= 0 else self._parcel()

    def finish(self, number: int) -> bool:
        """Letter ``number`` is done; whether the controller must be told: it sleeps, or does not rely on the page."""
        words = self._words
        words[_DONE] = number
        self._fence()
        return not self._by_memory or bool(words[_CONTROLLER_SLEEPS])

    def _wait(self, number: int) -> None:
        watch = self._watch
        if watch is None:
            self._sleep(number)
            return
        if not self._look(number, watch.begin()):
            self._sleep(number)
        watch.end()

    def _look(self, number: int, end: float) -> bool:
        """Look, and leave the core to others between looks."""
        words = self._words
        while True:
            for _ in range(4):
                os.sched_yield()
                if words[_POSTED] >= number:
                    return True
            if time.monotonic() > end:
                return False

    def _sleep(self, number: int) -> None:
        words = self._words
        while words[_POSTED] < number:
            words[_RANK_SLEEPS] = 1
            self._fence()
            if words[_POSTED] < number:
                self._take_from_socket()
            words[_RANK_SLEEPS] = 0

    def _parcel(self) -> tuple[wire.Packet, Sequence[int]]:
        while not self._parcels:
            self._take_from_socket()
        return self._parcels.pop(0)

    def _take_from_socket(self) -> None:
        packet, descriptors = self._socket.receive()
        if packet.op != wire.Op.DOORBELL:
            self._parcels.append((packet, descriptors))
