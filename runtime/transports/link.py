"""The transport of a network that moves bytes by itself, emulated on one machine: shared memory that is seen late.

    leaves   = max(now, when the message before it had left) + nbytes / bandwidth        one message after the other
    arrives  = leaves + latency

Bytes lie at the peer as soon as they are written, but a signal is seen only when a wire of that latency and bandwidth would have
delivered it and everything announced with it. No processor works while something is on its way, in both directions at once: what
the ranks compute meanwhile is hidden for the same reason as on a real network. For measuring overlap where there is no network,
and for tests of what is late; between machines it is of no use.

A cut-through wire of fixed latency and bandwidth is the LogGP model (Alexandrov et al., SPAA 1995) without its gap per message.
"""

from __future__ import annotations

import re
import time
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch

from ..errors import InputError
from .buffers import checked_slot
from .shm import ShmTransfer, ShmTransport
from .transport import SLOTS, Capability, LinkCost, Symmetric, TransportTimeout

_FORM = re.compile(r"link:(?P<latency>[0-9.eE+-]+)(?P<time>us|ms|s),(?P<speed>[0-9.eE+-]+)(?P<size>[kMG]?)B/s")
_PER_SECOND = {"us": 1e6, "ms": 1e3, "s": 1.0}
_BYTES = {"": 1.0, "k": 1e3, "M": 1e6, "G": 1e9}
_WORDS = 4
"""Per slot: value and time of arrival of the last two signals. There are never more under way that somebody still waits for: the
sender of a third has seen an answer to the first."""

_OVERSLEPT = 1.5e-4
"""Seconds that the kernel may wake a sleeper late; the rest of a wait is spent looking."""


class LinkSpec(NamedTuple):
    """A wire: seconds until the first byte arrives, and bytes per second."""

    latency: float
    bandwidth: float

    @classmethod
    def parse(cls, text: str) -> LinkSpec:
        """Read ``link:20us,1GB/s``. InputError for anything else, and for figures that are not positive."""
        found = _FORM.fullmatch(text)
        try:
            if found is None:
                raise ValueError
            spec = cls(float(found["latency"]) / _PER_SECOND[found["time"]], float(found["speed"]) * _BYTES[found["size"]])
            if spec.latency < 0 or not 0 < spec.bandwidth < float("inf"):
                raise ValueError
        except ValueError:
            raise InputError(f"expected a link like 'link:20us,1GB/s' (latency, bandwidth), found {text!r}") from None
        return spec

    @property
    def cost(self) -> LinkCost:
        """Of one message."""
        return LinkCost(self.latency, 1 / self.bandwidth)

    def __str__(self) -> str:
        """As ``parse`` reads it."""
        return f"link:{self.latency * 1e6:g}us,{self.bandwidth / 1e9:g}GB/s"


def check_transport(transport: str) -> str:
    """The link to emulate, "" for ``"auto"``. InputError for any other transport."""
    if transport == "auto":
        return ""
    if not isinstance(transport, str) or not transport.startswith("link:"):
        raise InputError(f"transport must be 'auto' or a link to emulate such as 'link:20us,1GB/s'; found {transport!r}")
    LinkSpec.parse(transport)
    return transport


@dataclass
class VirtualWire:
    """Outbound side of a rank: messages leave one after the other. free: when the last of them will have left, in nanoseconds."""

    spec: LinkSpec
    free: int = 0

    def arrival(self, nbytes: float, hops: int = 1) -> int:
        """Put a message on the wire; when its last byte is there (of ``time.monotonic_ns``, which all processes share)."""
        self.free = max(time.monotonic_ns(), self.free) + int(nbytes / self.spec.bandwidth * 1e9)
        return self.free + int(hops * self.spec.latency * 1e9)


@dataclass
class LinkTransfer:
    """See ``Transfer``: a message, and the note of its arrival that came before it; None where this rank sends."""

    transport: LinkTransport
    inner: ShmTransfer
    note: torch.Tensor | None

    def wait(self, timeout: float | None = None) -> torch.Tensor:
        """See ``Transfer``."""
        found = self.inner.wait(timeout)
        if self.note is not None:
            self.transport.rest(int(self.note))
        return found


class LinkTransport:
    """See ``Transport`` and the module. All ranks make it at the same time; they meet."""

    capabilities = frozenset({Capability.REMOTE_VIEW, Capability.ASYNC_PROGRESS})

    def __init__(self, shm: ShmTransport, spec: LinkSpec) -> None:
        self.mesh, self.rank, self.default_timeout = shm.mesh, shm.rank, shm.default_timeout
        self.shm, self.spec = shm, spec
        self.tile_axes = shm.tile_axes  # the signals are those of the shared memory
        self.wire = VirtualWire(spec)
        self._written: dict[tuple[str, int], int] = {}
        self._arrivals: dict[str, list[Any]] = {}
        self._own: dict[str, int] = {}
        for axis in self.mesh.names:
            members = self.mesh.group(axis, self.rank)
            if len(members) > 1:
                table = shm.symmetric(f"arrivals {axis}", (len(members) * SLOTS * _WORDS,), torch.int64, axis)
                self._arrivals[axis] = [memoryview(cast(Any, table.at(peer).numpy())) for peer in range(len(members))]
                self._own[axis] = members.index(self.rank)

    # --- buffers

    def symmetric(self, name: str, shape: tuple[int, ...], dtype: torch.dtype, axis: str) -> Symmetric:
        """See ``Transport``."""
        return self.shm.symmetric(name, shape, dtype, axis)

    def release(self, buffer: Symmetric) -> None:
        """See ``Transport``."""
        self.shm.release(buffer)

    def put(self, buffer: Symmetric, peer: int, source: torch.Tensor, row: int = 0) -> None:
        """See ``Transport``."""
        self.shm.put(buffer, peer, source, row)
        self._announce(buffer.axis, peer, source)

    def accumulate(self, buffer: Symmetric, peer: int, source: torch.Tensor, row: int = 0) -> None:
        """See ``Transport``."""
        self.shm.accumulate(buffer, peer, source, row)
        self._announce(buffer.axis, peer, source)

    def _announce(self, axis: str, peer: int, source: torch.Tensor) -> None:
        self._written[axis, peer] = self._written.get((axis, peer), 0) + source.nbytes

    def get(self, buffer: Symmetric, peer: int, out: torch.Tensor, row: int = 0) -> torch.Tensor:
        """See ``Transport``. Takes a request there and the rows back; the wire of the peer is not charged with them."""
        self.shm.get(buffer, peer, out, row)
        self.rest(time.monotonic_ns() + int((2 * self.spec.latency + out.nbytes / self.spec.bandwidth) * 1e9))
        return out

    # --- signals

    def signal(self, peer: int, slot: int, value: int, axis: str, nbytes: int = 0) -> None:
        """See ``Transport``."""
        self.signal_over(peer, checked_slot(slot), value, axis, nbytes)

    def signal_over(self, peer: int, slot: int, value: int, axis: str, nbytes: float, hops: int = 1) -> None:
        """``signal`` with bytes that take several hops to be complete, as those of a ring do."""
        sent = nbytes + self._written.pop((axis, peer), 0)
        row, own = self._arrivals[axis][peer], self._own[axis]
        first = (own * SLOTS + slot) * _WORDS
        place = first if row[first] <= row[first + 2] else first + 2
        row[place + 1] = self.wire.arrival(sent, hops)
        row[place] = value
        self.shm.signal(peer, slot, value, axis)

    def _when(self, peer: int, slot: int, value: int, axis: str) -> int:
        """When the first signal of at least ``value`` arrives; it has been sent."""
        row = self._arrivals[axis][self._own[axis]]
        first = (peer * SLOTS + slot) * _WORDS
        return min(int(row[place + 1]) for place in (first, first + 2) if row[place] >= value)

    def test(self, peer: int, slot: int, value: int, axis: str) -> bool:
        """See ``Transport``."""
        return self.shm.test(peer, slot, value, axis) and self._when(peer, slot, value, axis) <= time.monotonic_ns()

    def wait(self, peer: int, slot: int, value: int, axis: str, timeout: float | None = None) -> None:
        """See ``Transport``."""
        limit = self.default_timeout if timeout is None else timeout
        start = time.monotonic_ns()
        self.shm.wait(peer, slot, value, axis, limit)
        when = self._when(peer, slot, value, axis)
        if when - start > limit * 1e9:
            self.rest(start + int(limit * 1e9))
            member = self.mesh.group(axis, self.rank)[peer]
            late = (when - start) / 1e9 - limit
            raise TransportTimeout(
                f"rank {self.rank} waited {limit:g} s for signal {value} in slot {slot} of axis {axis!r}: "
                f"rank {member} has sent it, and {self.spec} delivers it {late:.3g} s later"
            )
        self.rest(when)

    def rest(self, when: int) -> None:
        """Let time pass until ``when``; what else is under way on this rank goes on."""
        left = (when - time.monotonic_ns()) / 1e9
        while left > 0:
            self.shm.move()
            if left > 2 * _OVERSLEPT:
                time.sleep(min(left - _OVERSLEPT, 2e-3))
            left = (when - time.monotonic_ns()) / 1e9

    def barrier(self, axis: str, timeout: float | None = None) -> None:
        """See ``Transport``. A message to everybody: one latency more than in shared memory."""
        self.shm.barrier(axis, timeout)
        self.rest(time.monotonic_ns() + int(self.spec.latency * 1e9))

    # --- messages

    def isend(self, tensor: torch.Tensor, peer: int, tag: int, axis: str) -> LinkTransfer:
        """See ``Transport``. A note of eight bytes goes ahead: when the message arrives."""
        note = torch.tensor([self.wire.arrival(tensor.nbytes)])
        self.shm.isend(note, peer, tag, axis)
        return LinkTransfer(self, self.shm.isend(tensor, peer, tag, axis), None)

    def irecv(self, out: torch.Tensor, peer: int, tag: int, axis: str) -> LinkTransfer:
        """See ``Transport``."""
        note = torch.empty(1, dtype=torch.int64)
        self.shm.irecv(note, peer, tag, axis)
        return LinkTransfer(self, self.shm.irecv(out, peer, tag, axis), note)

    # --- the rest

    def cost(self, axis: str) -> LinkCost:  # noqa: ARG002  (all pairs are alike)
        """See ``Transport``."""
        return self.spec.cost

    def close(self) -> None:
        """See ``Transport``."""
        self._arrivals.clear()
        self.shm.close()
