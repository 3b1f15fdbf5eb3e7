"""The ranks of one engine as a whole: messages to all of them, answers from all of them, and what happens when one fails.

Every wait here is bounded and reacts at once to an answer, to the end of a rank, and to Ctrl-C; while it lasts, the pages of the
ranks are looked at twenty times a second. Any failure ends all ranks and becomes one exception.
"""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import struct
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from . import wire
from .errors import RunError
from .exchange import exchange_bytes
from .faults import AFTERWARDS, Evidence, describe_exit, diagnose
from .fence import new_fence, writes_stay_in_order
from .launcher import RankProcess, launcher
from .mailbox import Outbox, Watch
from .mesh import Mesh
from .monitor import Position, read_page
from .patience import LOOK_EVERY, Limits, Patience
from .program import RankProgram

HOLD_BACK = 0.3
"""Seconds to wait for the cause of what looks like its shadow: a closed connection, an error of the network."""

SHUTDOWN = 1.0
"""Seconds that ranks are given to end by themselves."""


_BY_PAGE = frozenset((wire.Op.FORWARD, wire.Op.BACKWARD, wire.Op.COMMIT))
"""Messages whose answer says nothing but that they are done: ranks say it on their page, and by packet only to a sleeper."""


@dataclass
class _Round:
    """One message and the answers to it."""

    missing: set[int]
    answers: dict[int, wire.Packet]
    files: dict[int, int]
    by_page: bool = False


class Crew:
    """Ranks of one mesh. Not thread-safe; the engine holds a lock."""

    def __init__(self, mesh: Mesh, config: dict[str, Any], limits: Limits) -> None:
        """Start the ranks and wait until their groups are up. ``config``: threads, devices (one per rank), hook, link."""
        self.mesh = mesh
        self.limits = limits
        self.owner = os.getpid()
        self.programs: dict[int, RankProgram] = {}
        self.closed = ""
        self._by_memory = writes_stay_in_order()
        self._sequence = 0
        self._rounds: dict[int, _Round] = {}
        self._poll = select.poll()
        self._by_fd: dict[int, tuple[RankProcess, Callable[[RankProcess], None]]] = {}
        self._everybody = set(range(mesh.size))
        self._failures: dict[int, dict[str, Any]] = {}
        self._dead: dict[int, str] = {}
        self._silent: set[int] = set()
        shared = [os.memfd_create(name, os.MFD_CLOEXEC) for name in ("hocket-store", "hocket-exchange")]
        try:
            os.ftruncate(shared[1], exchange_bytes(mesh))
            self.ranks = launcher().start_ranks([self._config(rank, config) for rank in range(mesh.size)], shared, limits.start)
        finally:
            wire.close_all(shared)
        self._boxes = [Outbox(rank.page, by_memory=self._by_memory) for rank in self.ranks]
        self._fence = new_fence()
        self._answers = Watch()
        self._watch()
        self._rounds[0] = _Round(self._everybody.copy(), {}, {})
        self.wait(0, limits.start)

    def _config(self, rank: int, config: dict[str, Any]) -> dict[str, Any]:
        return {
            "rank": rank,
            "mesh": self.mesh.axes,
            "threads": config["threads"],
            "device": config["devices"][rank],
            "hook": config["hook"],
            "link": config.get("link", ""),
            "by_memory": self._by_memory,
            "timeout": 2 * max(self.limits.first, self.limits.step) + 60,
        }

    def _watch(self) -> None:
        for rank in self.ranks:
            _send_within(rank, int(self.limits.step) + 1)
            for descriptor, action in ((rank.sock.fileno(), self._take), (rank.status_pipe, self._bury)):
                self._by_fd[descriptor] = (rank, action)
                self._poll.register(descriptor, select.POLLIN)

    # --- messages

    def check_open(self) -> None:
        """RunError when the ranks are gone, or when this process is a forked child of the one that started them."""
        if os.getpid() != self.owner:
            raise RunError(
                f"this engine belongs to process {self.owner}, and {os.getpid()} is a fork of it; "
                "make a new engine in the child, or start children before the engine is used"
            )
        if self.closed:
            raise RunError(f"this engine is closed: {self.closed}. Make a new one; {AFTERWARDS[0].lower()}{AFTERWARDS[1:]}")

    def post(self, packet: wire.Packet, descriptors: tuple[int, ...] = (), *, answered: bool = True) -> int:
        """Send a message to every rank (its sequence number is set here) and return its number."""
        self.check_open()
        self._sequence += 1
        packet = wire.Packet(packet.op, packet.handle, self._sequence, packet.ticket, packet.payload)
        if answered:
            self._rounds[self._sequence] = _Round(self._everybody.copy(), {}, {}, self._by_memory and packet.op in _BY_PAGE)
        try:
            self._send(wire.encode(packet), descriptors)
        except BaseException:
            self.kill("it was interrupted")
            raise
        if self._silent:
            raise self._fail()
        return self._sequence

    def _send(self, data: bytes, descriptors: tuple[int, ...] = ()) -> None:
        number = self._sequence
        for rank, box in zip(self.ranks, self._boxes, strict=True):
            try:
                if box.is_full(number):
                    self._make_room(box, number)
                parcel = box.put(number, data, by_socket=bool(descriptors))
                if parcel is not None:
                    wire.send_encoded(rank.sock, parcel, descriptors)
            except wire.Closed:
                self._silent.add(rank.rank)
            except BlockingIOError:
                raise self._fail(stalled=self.limits.step) from None

    def _make_room(self, box: Outbox, number: int) -> None:
        """Wait until a rank has taken older letters out of its box."""
        deadline = time.monotonic() + self.limits.step
        while box.is_full(number):
            self._listen(LOOK_EVERY / 50)
            if time.monotonic() > deadline:
                raise self._fail(stalled=self.limits.step)

    def _listen(self, seconds: float) -> None:
        """Take in what ranks send within some seconds at most. Raises RunError when one of them has failed."""
        for descriptor, _ in self._poll.poll(seconds * 1000):
            rank, action = self._by_fd[descriptor]
            action(rank)
        if self._failures or self._dead or self._silent:
            raise self._fail()

    def wait(self, sequence: int, patience: float) -> dict[int, wire.Packet]:
        """The answers of all ranks to one message. Raises RunError for any failure; then, and on Ctrl-C, the ranks are gone."""
        current = self._rounds[sequence]
        try:
            if not (current.by_page and self._look(sequence, current)):
                self._doze(current, patience)
            if current.by_page:
                self._answers.end()
        except BaseException:
            self.kill("it was interrupted")
            raise
        del self._rounds[sequence]
        return current.answers

    def _look(self, sequence: int, current: _Round) -> bool:
        """Look at the pages for a moment; whether all ranks are done."""
        end = self._answers.begin()
        waiting = [self._boxes[rank] for rank in current.missing]
        while waiting:
            if waiting[-1].done() >= sequence:
                waiting.pop()
            elif time.monotonic() > end:
                return False
            else:
                os.sched_yield()
        current.missing.clear()
        return True

    def _doze(self, current: _Round, patience: float) -> None:
        """Sleep until something happens, again and again, until all ranks have answered."""
        watch = Patience(patience)
        for box in self._boxes:
            box.sleep(1)
        self._fence()
        while True:
            self._read_pages()
            if not current.missing:
                break
            self._listen(LOOK_EVERY)
            if current.missing and watch.due():
                stalled = watch.look(self.positions())
                if stalled or self._disagree():
                    raise self._fail(stalled=stalled)
        for box in self._boxes:
            box.sleep(0)

    def _read_pages(self) -> None:
        """Ranks that say on their page that they are done are missing no more."""
        done = [box.done() for box in self._boxes]
        for sequence, current in self._rounds.items():
            if current.by_page:
                current.missing.difference_update([rank for rank in current.missing if done[rank] >= sequence])

    def files(self, sequence: int) -> dict[int, int]:
        """Descriptors that came with the answers to a message that is still waited for."""
        return self._rounds[sequence].files

    def _take(self, rank: RankProcess) -> None:
        try:
            packet, descriptors = rank.inbox.receive()
        except wire.Closed:
            self._silent.add(rank.rank)
            self._poll.unregister(rank.sock)
            return
        if packet.op == wire.Op.FAILED:
            wire.close_all(descriptors)
            self._failures[rank.rank] = json.loads(packet.payload)
            return
        current = self._rounds.get(packet.sequence)
        if current is None:  # its page had told already
            wire.close_all(descriptors)
            return
        current.missing.discard(rank.rank)
        current.answers[rank.rank] = packet
        if descriptors:
            current.files[rank.rank] = descriptors[0]

    def _bury(self, rank: RankProcess) -> None:
        rank.read_status()
        self._poll.unregister(rank.status_pipe)
        self._dead[rank.rank] = describe_exit(rank.status)

    # --- failure

    def positions(self) -> list[Position]:
        """Where every rank is."""
        return [read_page(rank.page, len(self.mesh.axes)) for rank in self.ranks]

    def _evidence(self) -> Evidence:
        self._read_pages()
        waited = frozenset(rank for current in self._rounds.values() for rank in current.missing)
        pids = [rank.pid for rank in self.ranks]
        return Evidence(self.mesh, pids, self.positions(), self.programs, self._failures, self._dead, 0.0, waited, self._dump)

    def _disagree(self) -> bool:
        """Whether two ranks entered different collectives; looks twice, for a page may have been read while it was written."""
        return self._evidence().disagreement is not None and self._evidence().disagreement is not None

    def _fail(self, stalled: float = 0.0) -> RunError:
        """Wait a moment for the first cause, end all ranks, and return the exception."""
        deadline = time.monotonic() + HOLD_BACK
        evidence = self._evidence()
        while not stalled and not evidence.decisive and (left := deadline - time.monotonic()) > 0:
            for descriptor, _ in self._poll.poll(min(left, LOOK_EVERY) * 1000):
                rank, action = self._by_fd[descriptor]
                action(rank)
            evidence = self._evidence()
        for silent in self._silent - set(self._dead):
            if not self._failures and not stalled:
                self._dead[silent] = describe_exit(None)
        evidence.stalled = stalled
        error = diagnose(evidence)
        self.kill(str(error).partition(AFTERWARDS)[0].rstrip(". "))
        return error

    def _dump(self, number: int) -> str:
        """The Python stack of a rank that lives (asked for with SIGUSR1), or what it left when it crashed."""
        rank = self.ranks[number]
        if rank.gone:
            return rank.output()
        before = rank.output()
        rank.signal(signal.SIGUSR1)
        deadline = time.monotonic() + HOLD_BACK
        while time.monotonic() < deadline and rank.output() == before:
            time.sleep(0.01)
        time.sleep(0.02)
        return rank.output()[len(before) :]

    def kill(self, reason: str) -> None:
        """End all ranks at once, collect them, and close every descriptor. Does nothing the second time, or in a forked child."""
        if self.closed or os.getpid() != self.owner:
            return
        self.closed = reason
        for rank in self.ranks:
            rank.kill()
        deadline = time.monotonic() + SHUTDOWN
        for rank in self.ranks:
            rank.wait_gone(deadline)
        for rank, box in zip(self.ranks, self._boxes, strict=True):
            box.release()
            rank.release()
        for current in self._rounds.values():
            wire.close_all(list(current.files.values()))

    def close(self) -> None:
        """Let the ranks finish what they were told, then end them: by themselves within a second, by force after it."""
        if self.closed or os.getpid() != self.owner:
            return
        deadline = time.monotonic() + SHUTDOWN
        self._sequence += 1
        try:
            if not any(box.is_full(self._sequence) for box in self._boxes):  # else a rank hangs, and would not read it
                for rank in self.ranks:
                    _send_within(rank, int(SHUTDOWN))
                self._send(wire.encode(wire.Packet(wire.Op.CLOSE, 0, self._sequence, 0)))
                for rank in self.ranks:
                    rank.wait_gone(deadline)
        except RunError:
            pass  # some rank is gone already; the rest is ended below
        finally:
            self.kill("it was closed")


def _send_within(rank: RankProcess, seconds: int) -> None:
    """From now on a packet to a rank that does not read is given up after that time, with BlockingIOError."""
    rank.sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("ll", seconds, 0))
