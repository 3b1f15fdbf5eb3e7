"""Start ranks from the zygote and end them. One zygote serves all engines of this process.

    warm_up()              start the zygote in the background; returns at once
    start_ranks(configs)   fork one rank per configuration

A forked child of this process starts its own zygote. The zygote and all ranks live in a session of their own, so Ctrl-C in the
terminal reaches the user's process only.
"""

from __future__ import annotations

import atexit
import contextlib
import fcntl
import json
import mmap
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from . import wire
from .errors import RunError
from .monitor import PAGE_BYTES
from .zygote import STATUS

LOG_BYTES = 256 << 10
"""What the ranks print is kept for error messages, up to this much."""

_BOOT = (
    "import sys, json; sys.path[:] = json.loads(sys.argv[3]); "
    "from hocket.runtime.zygote import serve; serve(int(sys.argv[1]), int(sys.argv[2]))"
)
_ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
_LARGE_PAGES = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
"""Ask for large pages behind large allocations, where the system gives them to those who ask. The user's own tunables win."""


@dataclass(eq=False)
class RankProcess:
    """The controller's end of one rank."""

    rank: int
    pid: int
    pidfd: int
    sock: socket.socket
    status_pipe: int
    page: mmap.mmap = field(repr=False)
    log: mmap.mmap = field(repr=False)
    status: int | None = None
    gone: bool = False

    def __post_init__(self) -> None:
        self.inbox = wire.Inbox(self.sock)

    def kill(self) -> None:
        """SIGKILL; a process that is already gone is left alone."""
        self.signal(signal.SIGKILL)

    def signal(self, number: int) -> None:
        """Send a signal to exactly this process, whatever its pid has become."""
        if not self.gone:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self.pidfd, number)

    def read_status(self) -> None:
        """The status pipe is readable: the rank is gone, and perhaps the zygote says how."""
        data = os.read(self.status_pipe, STATUS.size)
        self.status = STATUS.unpack(data)[0] if len(data) == STATUS.size else None
        self.gone = True

    def wait_gone(self, deadline: float) -> bool:
        """Wait until the process is gone, at most until ``deadline`` (monotonic seconds)."""
        poll = select.poll()
        poll.register(self.status_pipe, select.POLLIN)
        while not self.gone:
            left = deadline - time.monotonic()
            if left <= 0:
                return False
            if poll.poll(left * 1000):
                self.read_status()
        return True

    def output(self) -> str:
        """What the rank printed, crash tracebacks included."""
        return self.log[:LOG_BYTES].rstrip(b"\0").decode(errors="replace")

    def release(self) -> None:
        """Close every descriptor of ours."""
        self.sock.close()
        wire.close_all([self.pidfd, self.status_pipe])
        self.page.close()
        self.log.close()


class Launcher:
    """The zygote of this process, started when first needed and again after it died."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._process: subprocess.Popen[bytes] | None = None
        self._sock: socket.socket | None = None
        self._log: tuple[int, mmap.mmap] | None = None
        self._inbox: wire.Inbox

    @property
    def pid(self) -> int | None:
        """Process id of the zygote, None before it was started."""
        return self._process.pid if self._process is not None else None

    def warm_up(self) -> None:
        """Start the zygote unless it runs; does not wait for it."""
        with self._lock:
            if self._process is not None and self._process.poll() is None:
                return
            self.stop()
            _check_platform()
            ours, theirs = wire.pair()
            controller = os.pidfd_open(os.getpid())
            log_fd, log = _make_log()
            try:
                self._process = subprocess.Popen(
                    [sys.executable, "-c", _BOOT, str(theirs.fileno()), str(controller), json.dumps(sys.path)],
                    pass_fds=(theirs.fileno(), controller),
                    stdin=subprocess.DEVNULL,
                    stdout=log_fd,
                    stderr=log_fd,
                    start_new_session=True,
                    env={**_LARGE_PAGES, **os.environ, **_ONE_THREAD},
                )
            finally:
                theirs.close()
                wire.close_all([controller, log_fd])
            self._sock, self._log, self._inbox = ours, (log_fd, log), wire.Inbox(ours)

    def start_ranks(self, configs: Sequence[dict[str, Any]], shared: Sequence[int], timeout: float) -> list[RankProcess]:
        """Fork one rank per configuration. ``shared``: descriptors of files for all of them. RunError if the
        zygote cannot be started or does not answer within ``timeout`` seconds."""
        with self._lock:
            self.warm_up()
            assert self._sock is not None
            started: list[RankProcess] = []
            channels = [_Channel(int(config["rank"])) for config in configs]
            try:
                for channel, config in zip(channels, configs, strict=True):
                    packet = wire.Packet(wire.Op.LOAD, channel.rank, 0, 0, json.dumps(config).encode())
                    wire.send(self._sock, packet, channel.theirs(shared))
                    channel.close_theirs()
                deadline = time.monotonic() + timeout
                started.extend(self._adopt(channel, deadline) for channel in channels)
            except BaseException as error:
                for rank in started:
                    rank.kill()
                    rank.release()
                for channel in channels[len(started) :]:
                    channel.close()
                self.stop()  # answers to this call may still be under way: the next call starts afresh
                if isinstance(error, wire.Closed):
                    raise RunError("the process that starts local ranks ended early") from error
                raise
            return started

    def _adopt(self, channel: _Channel, deadline: float) -> RankProcess:
        assert self._sock is not None
        self._sock.settimeout(max(deadline - time.monotonic(), 0.001))
        try:
            packet, descriptors = self._inbox.receive()
        except TimeoutError as error:
            raise RunError("the process that starts local ranks did not answer in time; is the machine overloaded?") from error
        except wire.Closed as error:
            said = self._log[1][:LOG_BYTES].rstrip(b"\0").decode(errors="replace") if self._log else ""
            raise RunError("the process that starts local ranks ended early", remote=said) from error
        assert packet.handle == channel.rank
        return channel.adopt(int(json.loads(packet.payload)["pid"]), descriptors[0])

    def stop(self) -> None:
        """End the zygote; its ranks end with it."""
        with self._lock:
            if self._sock is not None:
                self._sock.close()
            if self._log is not None:
                self._log[1].close()
            process, self._process, self._sock, self._log = self._process, None, None, None
            if process is None:
                return
            try:
                process.wait(1.0)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


class _Channel:
    """The descriptors of a rank that is being started."""

    def __init__(self, rank: int) -> None:
        self.rank = rank
        self.ours, self._theirs = wire.pair()
        self.status, self._status_theirs = os.pipe()
        self._page_fd = os.memfd_create("hocket-page", os.MFD_CLOEXEC)
        os.ftruncate(self._page_fd, PAGE_BYTES)
        self.page = mmap.mmap(self._page_fd, PAGE_BYTES)
        self._log_fd, self.log = _make_log()

    def theirs(self, shared: Sequence[int]) -> list[int]:
        """In the order in which the zygote unpacks them."""
        return [self._theirs.fileno(), self._page_fd, self._log_fd, self._status_theirs, *shared]

    def close_theirs(self) -> None:
        self._theirs.close()
        wire.close_all([self._page_fd, self._log_fd, self._status_theirs])

    def close(self) -> None:
        if self._theirs.fileno() >= 0:
            self.close_theirs()
        self.ours.close()
        os.close(self.status)
        self.page.close()
        self.log.close()

    def adopt(self, pid: int, pidfd: int) -> RankProcess:
        return RankProcess(self.rank, pid, pidfd, self.ours, self.status, self.page, self.log)


def _make_log() -> tuple[int, mmap.mmap]:
    """A file of fixed size for what a process prints; writes beyond its end fail instead of filling the memory."""
    fd = os.memfd_create("hocket-log", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, LOG_BYTES)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK)
    return fd, mmap.mmap(fd, LOG_BYTES)


def _check_platform() -> None:
    missing = [name for name in ("pidfd_open", "memfd_create") if not hasattr(os, name)]
    if missing or not hasattr(socket, "SOCK_SEQPACKET"):
        raise RunError(
            f"engine 'local' needs Linux 5.3 or newer; {sys.platform} lacks {missing or 'packet sockets'}; use engine='sim'"
        )
    if not sys.executable:
        raise RunError("engine 'local' starts Python processes, but sys.executable is empty in this embedded interpreter")


_launchers: dict[int, Launcher] = {}


def launcher() -> Launcher:
    """The launcher of this process; a forked child gets its own."""
    found = _launchers.get(os.getpid())
    if found is None:
        found = _launchers.setdefault(os.getpid(), Launcher())
        atexit.register(_stop_own, os.getpid())
    return found


def _stop_own(pid: int) -> None:
    if os.getpid() == pid and pid in _launchers:
        _launchers[pid].stop()


def warm_up() -> None:
    """Begin to start the process that local ranks are forked from. Returns at once; saves a second or more at the first use."""
    launcher().warm_up()
