"""Tile loops of one rank over its transport: buffers by axis, signals in place of collectives."""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from ..communicator import Communicator
from ..errors import RankHung, RunError
from ..templates import Site
from ..tile_loop import TileLoop
from ..tile_schedule import Step
from ..transports.transport import Symmetric, Transport, TransportError, TransportTimeout
from .tile_ready import ReadyLoop
from .tile_whole import run_whole
from .tiles import LoopRun

_ROUND = 1 << 16
"""Buffers grow by whole multiples of this, so that loops of about one size share one."""


@dataclass
class AxisLoops:
    """The loops of one axis: this rank's index, their buffer, and how many there were."""

    index: int
    buffer: Symmetric | None = None
    epoch: int = 0


@dataclass
class TileRunner:
    """Runs tile loops for executors. transport: None where the ranks share no memory: then a loop is run as what it stands for."""

    communicator: Communicator
    transport: Transport | None
    axes: dict[str, AxisLoops] = field(default_factory=dict)

    @classmethod
    def of(cls, communicator: Communicator) -> TileRunner:
        """The runner of a communicator. All runners over one transport share its axes: signals of a slot only grow, so loops of
        two programs, or of two pipelines, are counted together."""
        transport: Any = getattr(communicator, "peer_memory", None)
        if transport is None:
            return cls(communicator, None)
        axes = getattr(transport, "tile_axes", None)
        if axes is None:
            axes = transport.tile_axes = {}
        return cls(communicator, transport, axes)

    def bind(self, loop: TileLoop, site: Site) -> Callable[..., list[torch.Tensor]]:
        """A function from operands to results."""
        ready = ReadyLoop(loop, site)

        def run(*operands: torch.Tensor) -> list[torch.Tensor]:
            return self.run(ready, operands)

        return run

    def run(self, ready: ReadyLoop, operands: tuple[torch.Tensor, ...]) -> list[torch.Tensor]:
        """One loop. Raises RankHung when a peer does not come in time, TransportError when it is gone."""
        loop = ready.loop
        if self.transport is None:
            return run_whole(loop, ready.body(loop.rows), operands, self.communicator)
        given = list(operands)
        if loop.fetches is not None:
            given[loop.fetches] = given[loop.fetches].contiguous()
        axis = self.axes.get(loop.axis)
        if axis is None:
            axis = self.axes[loop.axis] = AxisLoops(self.transport.mesh.coordinate(self.transport.rank)[loop.axis])
        work = LoopRun(ready, axis.index, axis.epoch, given)
        try:
            if not ready.is_agreed:
                self._agree(loop)
                ready.is_agreed = True
            work.memory = self.buffer(axis, loop.axis, work.sizes.arena)
        except TransportTimeout as error:
            raise RankHung(f"a tile loop on axis {loop.axis!r} cannot begin: {error}", rank=self.transport.rank) from error
        axis.epoch += 1
        for kind, sent in work.sizes.sent:
            self.communicator.wire.count(kind, sent)
        for step in work.work():
            self._carry_out(loop, step, work)
        return work.results()

    def _agree(self, loop: TileLoop) -> None:
        """Meet, once a loop, and compare: ranks that ran different loops would wait for each other's tiles, or take wrong ones."""
        assert self.transport is not None
        text = zlib.crc32(json.dumps(loop.words()).encode())
        what = f"a tile loop of {loop.parts} x {loop.tiles} tiles over {loop.rows} rows ({text:08x})"
        self.transport.release(self.transport.symmetric(what, (1,), torch.uint8, loop.axis))

    def _carry_out(self, loop: TileLoop, step: Step, work: LoopRun) -> None:
        assert self.transport is not None
        if step.kind == "signal":
            self.transport.signal(step.peer, step.slot, step.value, loop.axis, work.carried(step))
            return
        try:
            self.transport.wait(step.peer, step.slot, step.value, loop.axis)
        except TransportError as error:
            raise stopped(self.transport.rank, loop, step, error) from error

    def buffer(self, axis: AxisLoops, name: str, nbytes: int) -> Symmetric:
        """The buffer of an axis, made anew when a loop needs more; every rank does so at the same loop."""
        assert self.transport is not None
        if axis.buffer is None or axis.buffer.shape[0] < nbytes:
            if axis.buffer is not None:
                self.transport.release(axis.buffer)
            size = -(-nbytes // _ROUND) * _ROUND
            axis.buffer = self.transport.symmetric(f"tiles {name}", (size,), torch.uint8, name)
        return axis.buffer


def stopped(rank: int, loop: TileLoop, step: Step, error: TransportError) -> RunError | TransportError:
    """The error of a wait that did not end, with the peer, chunk and tile that it was for."""
    where = f"rank {rank} waits for index {step.peer} of axis {loop.axis!r} in a tile loop, chunk {step.chunk}, tile {step.tile}"
    if isinstance(error, TransportTimeout):
        return RankHung(f"{where}: {error}", rank=rank)
    return type(error)(f"{where}: {error}")
