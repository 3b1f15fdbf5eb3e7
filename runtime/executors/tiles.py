"""Run tile loops on a rank: the steps of ``tile_schedule`` on buffers that all ranks of an axis see.

The peers' memory is used in place: a product is accumulated into the buffer of the rank that owns its chunk, an operand is read
from the rank that holds it. Where a transport offers no such view of a peer, or there is none, the loop is run as what it stands
for: the whole region, and the collective by the communicator (``tile_whole``).

A loop of a small layer lasts a few hundred microseconds, so what is the same at every run is kept (``tile_ready``): the steps, the
views of the buffers, and which views of the operands each step takes.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import torch

from ..tile_loop import Cut, TileLoop, narrow, place
from ..tile_schedule import HALVES, Step
from .tile_body import Sink, TileBody
from .tile_ready import ALIGN, ReadyLoop, tile_of

_Read = tuple[int, int, int] | torch.Tensor | Callable[[torch.Tensor], torch.Tensor] | None


class _Turn(NamedTuple):
    """A ``compute`` step, ready: how it sees the operands; its sinks (result, how, memory of a buffer, span of the result)."""

    body: TileBody
    reads: tuple[_Read, ...]
    sinks: tuple[tuple[int, str, torch.Tensor | None, tuple[int, int, int] | None], ...]
    candidates: dict[int, int]


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
        device = operands[0].device
        self.whole = [torch.empty(shape, dtype=dtype, device=device) for shape, dtype in self.sizes.whole]
        self._known: dict[Any, Any] | None = None

    def work(self) -> Iterator[Step]:
        """Do all steps; a ``wait`` or ``signal`` is yielded for the caller to carry out."""
        base = 0 if self.script is not None else self.epoch * (self.loop.parts + 1)
        for index, step in enumerate(self.ready.script(self.rank) if self.script is None else self.script):
            kind = step.kind
            if kind == "compute":
                self._compute(index, step)
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
        return self.whole

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

    def _compute(self, index: int, step: Step) -> None:
        if self.script is not None:
            turn = self._turn(step)
        else:
            key, known = (self.epoch % HALVES, index), self._views()
            turn = known.get(key) or known.setdefault(key, self._turn(step))
        views = []
        for operand, read in zip(self.operands, turn.reads, strict=True):
            if read is None:
                views.append(operand)
            elif isinstance(read, tuple):
                views.append(operand.narrow(*read))
            else:
                views.append(read if isinstance(read, torch.Tensor) else read(operand))
        sinks = {}
        for number, how, memory, spot in turn.sinks:
            place_ = self.whole[number] if spot is None else self.whole[number].narrow(*spot)
            sinks[number] = Sink(how, place_) if memory is None else Sink(how, memory, place_ if how == "finish" else None)
        for number, value in turn.body.run(views, sinks, turn.candidates).items():
            cut = self.loop.results[number].cut
            assert cut is not None
            place(self.whole[number], value, cut, self.loop.rows, self.loop.tile(step.chunk, step.tile)[0])

    def _turn(self, step: Step) -> _Turn:
        """What a step reads and writes, in the half of this epoch."""
        start, length = self.loop.tile(step.chunk, step.tile)
        body = self.ready.body(length)
        reads = tuple(self._read(index, step, (start, length)) for index in range(len(self.loop.reads)))
        sinks: list[tuple[int, str, torch.Tensor | None, tuple[int, int, int] | None]] = []
        for number, result in enumerate(self.loop.results):
            if number == self.loop.delivers:
                sinks.append((number, *self._delivery(step)))
            elif result.kind == "sum":
                sinks.append((number, "first" if self._is_first(step) else "add", None, None))
            elif result.cut is not None and result.cut.outer == 1:
                inner = result.cut.inner
                sinks.append((number, "first", None, (result.cut.dim, start * inner, length * inner)))
        return _Turn(body, reads, tuple(sinks), body.candidates({number: how for number, how, *_ in sinks}))

    def _is_first(self, step: Step) -> bool:
        script = self.ready.script(self.rank) if self.script is None else self.script
        return next(s for s in script if s.kind == "compute")[4:6] == step[4:6]

    def _read(self, index: int, step: Step, span: tuple[int, int]) -> _Read:
        """How a step sees an operand: None for the whole, a span of one dimension, a peer's memory, or a function of it."""
        read, (start, length) = self.loop.reads[index], span
        if read.cut is None:
            return None
        cut = read.cut
        if read.kind == "tiled":
            if cut.outer == 1:
                return (cut.dim, start * cut.inner, length * cut.inner)
            return functools.partial(narrow, cut=cut, rows=self.loop.rows, start=start, length=length)
        where = (step.chunk, start, length)
        if step.chunk != self.rank:
            return tile_of(self.loop, index, self._published(step.chunk), where, self.rank)
        return functools.partial(_own_tile, self.loop, index, where, self.rank)  # kept: it must not hold this run's operands

    def _delivery(self, step: Step) -> tuple[str, torch.Tensor | None, tuple[int, int, int] | None]:
        """How the delivered tile of a step is taken, its place in a buffer, and in the result."""
        if step.how == "finish":
            return "finish", self._delivered(self.rank, 0, step.tile), self._spot(0, step.tile)
        if step.how == "own":
            return "first", None, self._spot(self._own_section(), step.tile)
        section = self.rank if step.how == "send" else 0
        return "add" if step.how == "add" else "first", self._delivered(step.chunk, section, step.tile), None

    def _spot(self, section: int, tile: int) -> tuple[int, int, int]:
        """A tile in the delivered result: in chunk ``section``, or in the only chunk of a reduce-scatter."""
        start, length = self.loop.tile(section, tile)
        inner = self._delivered_cut().inner
        return 0, start * inner, length * inner

    def _finished(self, section: int, tile: int) -> torch.Tensor:
        assert self.loop.delivers is not None
        return self.whole[self.loop.delivers].narrow(*self._spot(section, tile))

    def _own_section(self) -> int:
        """Where this rank's chunk lies in the result."""
        assert self.loop.delivers is not None
        return 0 if self.loop.results[self.loop.delivers].kind == "reduce_scatter" else self.rank

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


def _own_tile(loop: TileLoop, index: int, where: tuple[int, int, int], rank: int, operand: torch.Tensor) -> torch.Tensor:
    return tile_of(loop, index, operand, where, rank)
