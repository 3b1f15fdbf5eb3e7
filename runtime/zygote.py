"""The process from which local ranks are forked: torch is imported once, a new rank costs a fork.

It runs one thread and never touches a device, so forking it is safe. It does not run the user's script (a script needs no
``__main__`` guard) and unpickles nothing. It ends when the controller does, however that ends: it waits on a pidfd of it.

    controller --- packet: JSON configuration + descriptors ---> zygote --- fork ---> rank
    controller <-- packet: {pid} + pidfd of the rank ----------- zygote
    controller <-- status pipe of the rank: its wait status ---- zygote, when the rank is gone
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import gc
import json
import os
import select
import signal
import socket
import struct
import sys
import threading
from importlib import import_module
from typing import Any, NoReturn

from . import wire

STATUS = struct.Struct("<i")
_PR_SET_PDEATHSIG = 1
_PR_SET_NAME = 15
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3
_LARGEST_KEPT = 32 << 20
"""Bytes: the largest block that the C library agrees to take from its heap rather than from fresh pages."""


def serve(sock_fd: int, controller_pidfd: int) -> NoReturn:
    """Fork a rank for every request until the controller is gone."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(_PR_SET_NAME, b"hocket-zygote")
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    sock = socket.socket(fileno=sock_fd)
    worker = import_module("hocket.runtime.worker")  # with torch and the executors: the reason for this process to exist

    keep_freed_memory(libc)
    gc.collect()
    gc.freeze()  # the collector leaves inherited objects alone, so their pages stay shared
    server = _Server(sock, controller_pidfd, libc, worker)
    try:
        server.loop()
    finally:
        os._exit(0)


def keep_freed_memory(libc: Any) -> None:
    """Let ranks use freed memory again instead of giving it back to the system and taking it anew, a fault a page, at every step.

    A step allocates and frees what it allocated and freed the step before; on a virtual machine the faults alone can cost more than
    the arithmetic on these pages. C libraries without ``mallopt`` keep their own policy.
    """
    if hasattr(libc, "mallopt"):
        libc.mallopt(_M_MMAP_THRESHOLD, _LARGEST_KEPT)
        libc.mallopt(_M_TRIM_THRESHOLD, -1)
        libc.mallopt(_M_TOP_PAD, _LARGEST_KEPT)


class _Server:
    def __init__(self, sock: socket.socket, controller: int, libc: Any, worker: Any) -> None:
        self.sock, self.controller, self.libc, self.worker = sock, controller, libc, worker
        self.inbox = wire.Inbox(sock)
        self.children: dict[int, tuple[int, int]] = {}  # pidfd -> (pid, status pipe)

    def loop(self) -> None:
        poll = select.poll()
        poll.register(self.sock, select.POLLIN)
        poll.register(self.controller, select.POLLIN)
        while True:
            for descriptor, _ in poll.poll():
                if descriptor == self.controller:
                    return
                if descriptor in self.children:
                    poll.unregister(descriptor)
                    self._reap(descriptor)
                    continue
                try:
                    packet, descriptors = self.inbox.receive()
                except wire.Closed:
                    return
                poll.register(self._fork(packet, descriptors), select.POLLIN)

    def _reap(self, pidfd: int) -> None:
        pid, pipe = self.children.pop(pidfd)
        _, status = os.waitpid(pid, 0)
        with contextlib.suppress(BrokenPipeError):  # nobody asks any more
            os.write(pipe, STATUS.pack(status))
        wire.close_all([pidfd, pipe])

    def _fork(self, packet: wire.Packet, descriptors: list[int]) -> int:
        control, page, log, pipe, store, exchange = descriptors
        zygote = os.getpid()
        pid = os.fork()
        if pid == 0:
            self._become_rank(json.loads(packet.payload), zygote, descriptors)
        pidfd = os.pidfd_open(pid)
        self.children[pidfd] = (pid, pipe)
        wire.close_all([control, page, log, store, exchange])
        wire.send(self.sock, packet._replace(payload=json.dumps({"pid": pid}).encode()), [pidfd])
        return pidfd

    def _become_rank(self, config: dict[str, Any], zygote: int, descriptors: list[int]) -> NoReturn:
        control, page, log, pipe, store, exchange = descriptors
        try:
            self.libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
            if os.getppid() != zygote:
                os._exit(1)
            self.libc.prctl(_PR_SET_NAME, f"hocket-rank-{config['rank']}".encode()[:15])
            os.dup2(log, 1)
            os.dup2(log, 2)
            self.sock.detach()
            others = [fd for pidfd, (_, status) in self.children.items() for fd in (pidfd, status)]
            wire.close_all([*others, pipe, log, self.sock.fileno() if self.sock.fileno() >= 0 else pipe])
            self._guard()
            self.worker.main(socket.socket(fileno=control), page, (store, exchange), config)
        finally:
            sys.stderr.flush()
            os._exit(1)

    def _guard(self) -> None:
        """Crashes leave a Python traceback in the log, so does SIGUSR1; the end of the controller ends the rank."""
        faulthandler.enable()
        faulthandler.register(signal.SIGUSR1, all_threads=True)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as score:
            score.write("500")  # where memory runs out the kernel should take a rank, not the user's process
        threading.Thread(target=_die_with, args=(self.controller,), name="hocket-watch", daemon=True).start()


def _die_with(controller_pidfd: int) -> None:
    poll = select.poll()
    poll.register(controller_pidfd, select.POLLIN)
    while not poll.poll():
        pass
    os.kill(os.getpid(), signal.SIGKILL)
