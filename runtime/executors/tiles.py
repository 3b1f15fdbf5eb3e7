"""Run tile loops on a rank: the steps of ``tile_schedule`` on buffers that all ranks of an axis see.

The peers' memory is used in place: a product is accumulated into the buffer of the rank that owns its chunk, an operand is read
from the rank that holds it. Where a transport offers no such view of a peer, or there is none, the loop is run as what it stands
for: the whole region, and the collective by the communicator (``tile_whole``).

A loop of a small layer lasts a few hundred microseconds, so what is the same at every run is kept (``tile_ready``): the steps, the
views of the buffers, and which views of the operands each step takes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import torch

from ..tile_loop import Cut, narrow, place
from ..tile_schedule import HALVES, Step
from .tile_body import Sink
from .tile_ready import ALIGN, ReadyLoop, tile_of


class Memory(Protocol):
    """Bytes that every rank of an axis has a copy of, seen by all."""

    def at(self, peer: int) -> torch.Tensor:
        """The bytes (uint8, one dimension) of a rank, by its index on the axis."""
        ...


class LoopRun:
    """One rank's run of one loop. ``work`` yields before every step that may have to wait; everything else happens in between."""

    def __init__(
        self,
        ready: ReadyLoop,
        rank: int,
        epoch: int,
        operands: Sequence[torch.Tensor],
        memory: Memory | None = None,
        script: Sequence[Step] | None = None,
    ) -> None:
        """rank: index on the axis; memory: None until sizes are known; script: other steps than those of ``tile_schedule``."""
        self.ready, self.loop = ready, ready.loop
        self.rank, self.epoch, self.operands = rank, epoch, operands
        self.memory, self.script = memory, script
        self.form = tuple([(o.dtype, o.shape) for o in operands])
        self.sizes = ready.sizes(self.form, operands)
        self.whole: dict[int, torch.Tensor] = {}
        self._known: dict[Any, Any] | None = None

    def work(self) -> Iterator[Step]:
        """Do all steps; a ``wait`` or ``signal`` is yielded for the caller to carry out."""
        base = 0 if self.script is not None else self.epoch * (self.loop.parts + 1)
        for step in self.ready.script(self.rank) if self.script is None else self.script:
            kind = step.kind
            if kind == "compute":
                self._compute(step)
            elif kind in ("wait", "signal"):
                yield step if not base else Step(kind, step.peer, step.slot, step.value + base, step.chunk, step.tile)
            elif kind == "publish":
                self._publish(step.tile)
            elif kind == "merge":
                self._merge(step.tile)
            else:
                self._collect(step)

    def results(self) -> list[torch.Tensor]:
        """What the loop makes, once ``work`` is at its end."""
        for number, result in enumerate(self.loop.results):
            if result.reduce_op == "avg":
                self.whole[number].div_(self.loop.parts)
        return [self.whole[number] for number in range(len(self.loop.results))]

    def carried(self, step: Step) -> int:
        """Bytes of the tile that a signal announces."""
        published, delivered = self.sizes.carried
        return int(self.loop.tile(0, step.tile)[1] * (published if step.chunk < 0 else delivered))

    # --- buffers

    def _views(self) -> dict[Any, Any]:
        """Views of the buffers and operands that were made before, for operands of these sizes in this memory."""
        if self._known is None:
            assert self.memory is not None
            mine = self.memory.at(self.rank)
            self._known = self.ready.views(self.rank, (mine.data_ptr(), mine.numel(), self.form))
        return self._known

    def _bytes(self, owner: int, offset: int, dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
        """Memory of a rank in the half of this epoch."""
        assert self.memory is not None
        bytes_ = self.memory.at(owner)
        start = self.epoch % HALVES * (bytes_.numel() // HALVES // ALIGN * ALIGN)
        size = dtype.itemsize * torch.Size(shape).numel()
        return bytes_.narrow(0, start + offset, size).view(dtype).view(shape)

    def _published(self, owner: int) -> torch.Tensor:
        key = ("in", self.epoch % HALVES, owner)
        found = self._views().get(key)
        if found is None:
            assert self.loop.fetches is not None
            operand = self.operands[self.loop.fetches]
            found = self._views()[key] = self._bytes(owner, 0, operand.dtype, tuple(operand.shape))
        return found

    def _delivered(self, owner: int, section: int, tile: int) -> torch.Tensor:
        """The place of a tile in the buffer of its owner."""
        key = (self.epoch % HALVES, owner, section, tile)
        found = self._views().get(key)
        if found is None:
            offset = self.sizes.published + section * self.sizes.chunk_bytes
            chunk = self._bytes(owner, offset, self.sizes.dtype, self.sizes.shape)
            start, length = self.loop.tile(0, tile)
            inner = self._delivered_cut().inner
            found = self._views()[key] = chunk.narrow(0, start * inner, length * inner)
        return found

    def _delivered_cut(self) -> Cut:
        assert self.loop.delivers is not None
        cut = self.loop.results[self.loop.delivers].cut
        assert cut is not None
        return cut

    # --- steps

    def _publish(self, tile: int) -> None:
        fetched = self.loop.fetches
        assert fetched is not None
        read = self.loop.reads[fetched]
        assert read.cut is not None
        start, length = self.loop.tile(0, tile)
        pieces = range(self.loop.parts) if read.kind == "exchange" else (0,)
        mine, operand = self._published(self.rank), self.operands[fetched]
        for piece in pieces:
            rows = (piece * self.loop.chunk + start) * read.cut.inner
            mine.narrow(0, rows, length * read.cut.inner).copy_(operand.narrow(0, rows, length * read.cut.inner))

    def _compute(self, step: Step) -> None:
        start, length = self.loop.tile(step.chunk, step.tile)
        views = []
        for index, operand in enumerate(self.operands):
            read = self.loop.reads[index]
            if read.cut is None:
                views.append(operand)
            elif read.kind == "tiled" and read.cut.outer == 1:
                cut = read.cut
                views.append(operand.narrow(cut.dim, start * cut.inner, length * cut.inner))
            else:
                views.append(self._fetched(index, operand, step, (start, length)))
        found = self.ready.body(length).run(views, self._sinks(step, start, length))
        for number, value in found.items():
            self._keep(number, value, start)

    def _fetched(self, index: int, operand: torch.Tensor, step: Step, span: tuple[int, int]) -> torch.Tensor:
        """A tile of an operand that lies otherwise; of one that comes from a peer, in that peer's memory."""
        where = (step.chunk, *span)
        if index != self.loop.fetches or step.chunk == self.rank:
            return tile_of(self.loop, index, operand, where, self.rank)
        key = ("tile", self.epoch % HALVES, step.chunk, step.tile)
        found = self._views().get(key)
        if found is None:
            found = self._views()[key] = tile_of(self.loop, index, self._published(step.chunk), where, self.rank)
        return found

    def _sinks(self, step: Step, start: int, length: int) -> dict[int, Sink]:
        found: dict[int, Sink] = {}
        for number, result in enumerate(self.loop.results):
            if number == self.loop.delivers:
                found[number] = self._delivery(step)
            elif number not in self.whole:
                continue
            elif result.kind == "sum":
                found[number] = Sink("add", self.whole[number])
            elif result.cut is not None and result.cut.outer == 1:
                found[number] = Sink("first", narrow(self.whole[number], result.cut, self.loop.rows, start, length))
        return found

    def _delivery(self, step: Step) -> Sink:
        if step.how == "finish":
            return Sink("finish", self._delivered(self.rank, 0, step.tile), self._finished(0, step.tile))
        if step.how == "own":
            return Sink("first", self._finished(self._own_section(), step.tile))
        section = self.rank if step.how == "send" else 0
        return Sink("add" if step.how == "add" else "first", self._delivered(step.chunk, section, step.tile))

    def _own_section(self) -> int:
        """Where this rank's chunk lies in the result."""
        assert self.loop.delivers is not None
        return 0 if self.loop.results[self.loop.delivers].kind == "reduce_scatter" else self.rank

    def _finished(self, section: int, tile: int) -> torch.Tensor:
        """The place of a tile in the result: in chunk ``section``, or in the only chunk of a reduce-scatter."""
        number = self.loop.delivers
        assert number is not None
        whole = self.whole.get(number)
        if whole is None:
            chunks = 1 if self.loop.results[number].kind == "reduce_scatter" else self.loop.parts
            shape = (chunks * self.sizes.shape[0], *self.sizes.shape[1:])
            whole = self.whole[number] = torch.empty(shape, dtype=self.sizes.dtype, device=self.operands[0].device)
        start, length = self.loop.tile(section, tile)
        inner = self._delivered_cut().inner
        return whole.narrow(0, start * inner, length * inner)

    def _merge(self, tile: int) -> None:
        """Own part and what arrived: into the result where nobody else needs it, else into the buffer that all read."""
        own, arrived = self._finished(self._own_section(), tile), self._delivered(self.rank, 0, tile)
        assert self.loop.delivers is not None
        if self.loop.results[self.loop.delivers].kind == "reduce_scatter":
            own.add_(arrived)
        else:
            torch.add(own, arrived, out=arrived)

    def _collect(self, step: Step) -> None:
        section = step.chunk if step.peer == self.rank and step.chunk != self.rank else 0
        self._finished(step.chunk, step.tile).copy_(self._delivered(step.peer, section, step.tile))

    def _keep(self, number: int, value: torch.Tensor, start: int) -> None:
        """The first tile of a result, and those that cannot be written in place."""
        result = self.loop.results[number]
        if result.kind == "sum":
            self.whole[number] = value.clone(memory_format=torch.contiguous_format)  # it may be a view of an operand
            return
        assert result.cut is not None
        if number not in self.whole:
            shape = list(value.shape)
            shape[result.cut.dim] = result.cut.outer * self.loop.rows * result.cut.inner
            self.whole[number] = torch.empty(shape, dtype=value.dtype, device=value.device)
        place(self.whole[number], value, result.cut, self.loop.rows, start)
