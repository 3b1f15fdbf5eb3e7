"""A link between two rank processes that moves bytes by itself, emulated: shared memory whose signals arrive late."""

from __future__ import annotations

import time
from typing import Any

import torch

from hocket.runtime.executors.tile_runner import AxisLoops
from hocket.runtime.executors.tiles import LoopRun, ReadyLoop


class EmulatedLink:
    """Shared memory whose signals arrive late; no CPU is used while they travel."""

    def __init__(self, bench: Any, arrivals: Any, line: tuple[float, float]) -> None:
        """bench: the rank's ``Bench``; arrivals: times of arrival by slot, at every rank; line: alpha and beta."""
        self.bench, self.arrivals, (self.alpha, self.beta) = bench, arrivals, line
        self.free = 0.0
        self.axis = bench.shm.mesh.names[0]

    def send(self, peer: int, slot: int, value: int, nbytes: float) -> None:
        """Signal that arrives late."""
        self.free = max(time.perf_counter(), self.free) + self.beta * nbytes
        self.arrivals.at(peer)[slot] = self.free + self.alpha
        self.bench.transport.signal(peer, slot, value, self.axis)

    def wait(self, peer: int, slot: int, value: int) -> None:
        """Wait for the signal, then for its arrival."""
        self.bench.transport.wait(peer, slot, value, self.axis)
        there = float(self.arrivals.local[slot])
        left = there - time.perf_counter()
        if left > 2e-4:
            time.sleep(left - 1.5e-4)
        while time.perf_counter() < there:
            pass

    def loop(self, ready: ReadyLoop, operands: tuple[torch.Tensor, ...]) -> None:
        """A tile loop over the link."""
        run = LoopRun(ready, self.bench.rank, self._next(), operands)
        run.memory = self._buffer(run.arena_bytes)
        each = run.chunk_bytes / ready.loop.tiles
        for step in run.work():
            if step.kind == "signal":
                self.send(step.peer, step.slot, step.value, each)
            else:
                self.wait(step.peer, step.slot, step.value)
        run.results()

    def apart(self, x: torch.Tensor, w: torch.Tensor) -> None:
        """The product, then the ring: the same bytes, nothing hidden."""
        parts, rank, y = self.bench.parts, self.bench.rank, torch.mm(x, w)
        chunks = y.chunk(parts)
        base = self._next() * (parts + 1)
        memory = self._buffer(2 * y.nbytes)
        inbox = [memory.at(p)[: chunks[0].nbytes].view(y.dtype).view(chunks[0].shape) for p in range(parts)]
        for step in range(parts - 1):
            peer, chunk = (rank + 1) % parts, (rank - 1 - step) % parts
            held = chunks[chunk] if not step else chunks[chunk] + inbox[rank]
            inbox[peer].copy_(held)
            self.send(peer, chunk, base + step + 1, held.nbytes)
            self.wait((rank - 1) % parts, (rank - 2 - step) % parts, base + step + 1)
        torch.add(chunks[rank], inbox[rank])

    def _next(self) -> int:
        """Epochs of the link follow those of the runner, whose signal slots it shares."""
        axis = self.bench.runner.axes.setdefault(self.axis, AxisLoops())
        axis.epoch += 1
        return axis.epoch - 1

    def _buffer(self, nbytes: int) -> Any:
        axis = self.bench.runner.axes.setdefault(self.axis, AxisLoops())
        return self.bench.runner.buffer(axis, self.axis, nbytes)
