"""Messages between the controller and a rank: one Unix socket pair a rank, one packet a message, no pickle.

Most of the controller's messages travel through shared memory instead (``mailbox``), in the same form.

    packet = header (operation, handle, ticket, count) + payload

The payload of RUN and its kin is an array of int64 (segment and offset of every tensor); texts and small tables are UTF-8 or JSON.
Tensors never travel here. A socket of type SEQPACKET keeps packets whole, passes file descriptors, and tells at once when the other
side is gone.
"""

from __future__ import annotations

import array
import enum
import errno
import os
import socket
import struct
from collections.abc import Sequence
from typing import NamedTuple

from .errors import RunError

HEADER = struct.Struct("<iiqq")
MAX_PACKET = 128 << 10
"""Bytes; below the kernel's default socket buffer. Larger payloads go through a block of shared memory."""

_MAX_DESCRIPTORS = 64
_ANCILLARY = socket.CMSG_LEN(_MAX_DESCRIPTORS * 4)


class Op(enum.IntEnum):
    """What a packet asks for, or answers."""

    READY = 1  # rank -> controller: groups are up
    SEGMENTS = 2  # payload: JSON [[number, bytes], ...], one file descriptor each
    FORGET = 3  # payload: segment numbers to unmap
    LOAD = 4  # payload: location and length of the JSON request in shared memory
    FORWARD = 5
    BACKWARD = 6
    COMMIT = 7  # write the updates of a ticket, held back until every rank had computed them
    RELEASE = 8  # forget a ticket
    UNLOAD = 9  # forget a program
    TRACE = 10  # count: 1 start stamping, 0 stop; the answer carries what was stamped
    WIRE = 11  # the answer carries the bytes on the wire
    CLOSE = 12
    LOAD_PIPELINE = 13  # payload: location and length of the JSON request in shared memory
    STEP_PIPELINE = 14
    COMMIT_PIPELINE = 15  # write the updates of the latest step, held back until every rank had computed them
    UNLOAD_PIPELINE = 16  # forget it
    DOORBELL = 17  # a letter lies in the mailbox
    DONE = 20  # rank -> controller: the operation `ticket` of this sequence number is complete
    FAILED = 21  # payload: JSON {type, message, traceback, memory, communication, instruction}


class Packet(NamedTuple):
    """One message. ``sequence`` numbers the controller's messages; a rank executes strictly in that order."""

    op: int
    handle: int
    sequence: int
    ticket: int
    payload: bytes = b""


class Closed(Exception):
    """The other side is gone."""


def pair() -> tuple[socket.socket, socket.socket]:
    """A connected pair of packet sockets."""
    return socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)


def send(sock: socket.socket, packet: Packet, descriptors: Sequence[int] = ()) -> None:
    """Send one packet. Raises Closed; BlockingIOError or TimeoutError if the socket has a timeout and the peer does not read."""
    send_encoded(sock, encode(packet), descriptors)


def encode(packet: Packet) -> bytes:
    """A packet as it travels. RunError when it is too long."""
    data = HEADER.pack(packet.op, packet.handle, packet.sequence, packet.ticket) + packet.payload
    if len(data) > MAX_PACKET:
        raise RunError(f"a message of {len(data):,} bytes is too long; a step can have some {MAX_PACKET // 16:,} tensors")
    return data


def decode(data: bytes | memoryview) -> Packet:
    """What ``encode`` made."""
    op, handle, sequence, ticket = HEADER.unpack_from(data)
    return Packet(op, handle, sequence, ticket, bytes(data[HEADER.size :]))


def send_encoded(sock: socket.socket, data: bytes, descriptors: Sequence[int] = ()) -> None:
    """Send a packet that was encoded before, as ``send`` does."""
    try:
        if descriptors:
            rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors))]
            sock.sendmsg([data], rights)
        else:
            sock.send(data)
    except OSError as error:
        if error.errno in (errno.EPIPE, errno.ECONNRESET, errno.ENOTCONN, errno.EBADF):
            raise Closed from error
        raise


class Inbox:
    """Receives the packets of one socket into a buffer of its own (a fresh one per packet would cost more than the packet)."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self._buffer = bytearray(MAX_PACKET)
        self._view = memoryview(self._buffer)

    def receive(self) -> tuple[Packet, list[int]]:
        """One packet and the descriptors that came with it. Raises Closed."""
        try:
            size, ancillary, _, _ = self.sock.recvmsg_into([self._buffer], _ANCILLARY, socket.MSG_CMSG_CLOEXEC)
        except ConnectionError as error:
            raise Closed from error
        if not size:
            raise Closed
        return decode(self._view[:size]), _descriptors(ancillary) if ancillary else []


def _descriptors(ancillary: Sequence[tuple[int, int, bytes]]) -> list[int]:
    found = array.array("i")
    for level, kind, content in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            found.frombytes(content[: len(content) - len(content) % found.itemsize])
    return found.tolist()


def max_descriptors() -> int:
    """Descriptors that fit one packet."""
    return _MAX_DESCRIPTORS


def close_all(descriptors: Sequence[int]) -> None:
    """Close descriptors, ignoring those already closed."""
    for descriptor in descriptors:
        try:
            os.close(descriptor)
        except OSError as error:
            if error.errno != errno.EBADF:
                raise
