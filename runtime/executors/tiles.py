"""Run tile loops on a rank: the steps of ``tile_schedule`` on buffers that all ranks of an axis see.

The peers' memory is used in place: a product is accumulated into the buffer of the rank that owns its chunk, an operand is read
from the rank that holds it. Where a transport offers no such view of a peer, or there is none, the loop is run as what it stands
for: the whole region, and the collective by the communicator (``run_whole``).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any, Protocol

import torch

from ..communicator import Communicator
from ..templates import Site
from ..tile_loop import TileLoop, narrow, place
from ..tile_schedule import HALVES, Step, steps
from .tile_body import Sink, TileBody

_ALIGN = 64


class Memory(Protocol):
    """Bytes that every rank of an axis has a copy of, seen by all."""

    def at(self, peer: int) -> torch.Tensor:
        """The bytes (uint8, one dimension) of a rank, by its index on the axis."""
        ...


@dataclass
class LoopRun:
    """One rank's run of one loop. ``work`` yields before every step that may have to wait; everything else happens in between.

    rank: index on the axis; memory: None until sizes are known (``needs``).
    """

    ready: ReadyLoop
    rank: int
    epoch: int
    operands: Sequence[torch.Tensor]
    memory: Memory | None = None
    script: Sequence[Step] | None = None
    whole: dict[int, torch.Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.loop = self.ready.loop
        self.tile_shape, self.tile_dtype = self.ready.delivered(self.operands)

    @property
    def chunk_bytes(self) -> int:
        """Of one delivered chunk."""
        size = self.tile_dtype.itemsize
        for n in self.tile_shape:
            size *= n
        return size

    @property
    def needs(self) -> tuple[int, int]:
        """Bytes of the two parts of a half: what is published, and what is delivered."""
        fetched = self.loop.fetches
        published = 0 if fetched is None else self.operands[fetched].nbytes
        if self.loop.delivers is None:
            return _aligned(published), 0
        sections = self.loop.parts if self.loop.results[self.loop.delivers].kind == "all_to_all" else 1
        return _aligned(published), _aligned(self.chunk_bytes * sections)

    @property
    def arena_bytes(self) -> int:
        """Of the buffer that a rank needs for this loop."""
        return HALVES * (sum(self.needs) + _ALIGN)

    def sent(self) -> Iterator[tuple[str, Fraction]]:
        """(collective, bytes that this rank sends) by the usual formulas."""
        others = self.loop.parts - 1
        if self.loop.fetches is not None:
            nbytes = self.operands[self.loop.fetches].nbytes
            if self.loop.reads[self.loop.fetches].kind == "gather":
                yield "all_gather", Fraction(others * nbytes)
            else:
                yield "all_to_all", Fraction(others * nbytes, self.loop.parts)
        if self.loop.delivers is not None:
            kind = self.loop.results[self.loop.delivers].kind
            yield kind, Fraction(others * self.chunk_bytes * (2 if kind == "all_reduce" else 1))

    def work(self) -> Iterator[Step]:
        """Do all steps; a ``wait`` or ``signal`` is yielded for the caller to carry out."""
        for step in self.script if self.script is not None else steps(self.loop, self.rank, self.epoch):
            if step.kind in ("wait", "signal"):
                yield step
            elif step.kind == "publish":
                self._publish(step.tile)
            elif step.kind == "compute":
                self._compute(step)
            else:
                self._collect(step)

    def results(self) -> list[torch.Tensor]:
        """What the loop makes, once ``work`` is at its end."""
        for number, result in enumerate(self.loop.results):
            if result.reduce_op == "avg":
                self.whole[number].div_(self.loop.parts)
        return [self.whole[number] for number in range(len(self.loop.results))]

    # --- buffers

    def _bytes(self, owner: int, offset: int, like: tuple[torch.dtype, tuple[int, ...]]) -> torch.Tensor:
        assert self.memory is not None
        dtype, shape = like
        size = dtype.itemsize
        for n in shape:
            size *= n
        return self.memory.at(owner).narrow(0, offset, size).view(dtype).view(shape)

    def _half(self) -> int:
        """Where the half of this epoch begins."""
        assert self.memory is not None
        return self.epoch % HALVES * (self.memory.at(self.rank).numel() // HALVES // _ALIGN * _ALIGN)

    def _published(self, owner: int) -> torch.Tensor:
        assert self.loop.fetches is not None
        operand, known, key = self.operands[self.loop.fetches], self._views(), (self.epoch % HALVES, owner)
        if key not in known:
            known[key] = self._bytes(owner, self._half(), (operand.dtype, tuple(operand.shape)))
        return known[key]

    def _delivered(self, owner: int, section: int, tile: int) -> torch.Tensor:
        """The place of a tile in the buffer of its owner."""
        assert self.loop.delivers is not None
        cut = self.loop.results[self.loop.delivers].cut
        assert cut is not None
        key = (self.epoch % HALVES, owner, section, tile)
        known = self._views()
        if key not in known:
            offset = self._half() + self.needs[0] + section * self.chunk_bytes
            chunk = self._bytes(owner, offset, (self.tile_dtype, self.tile_shape))
            start, length = self.loop.tile(0, tile)
            known[key] = chunk.narrow(0, start * cut.inner, length * cut.inner)
        return known[key]

    def _views(self) -> dict[tuple[int, ...], torch.Tensor]:
        """Views of the buffers that were made before, for operands of these sizes in this memory."""
        assert self.memory is not None
        mine = self.memory.at(self.rank)
        sizes = (mine.data_ptr(), mine.numel(), *((o.dtype, o.shape) for o in self.operands))
        return self.ready.views(self.rank, sizes)

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
        span = self.loop.tile(step.chunk, step.tile)
        views = []
        for index, operand in enumerate(self.operands):
            fetched = index == self.loop.fetches and step.chunk != self.rank
            source = self._published(step.chunk) if fetched else operand
            views.append(tile_of(self.loop, index, source, (step.chunk, *span), self.rank))
        body = self.ready.body(span[1])
        sinks = self._sinks(step, span[0])
        found = body.run(views, sinks)
        for number, value in found.items():
            self._keep(number, value, span[0])

    def _sinks(self, step: Step, start: int) -> dict[int, Sink]:
        found: dict[int, Sink] = {}
        for number, result in enumerate(self.loop.results):
            if number == self.loop.delivers:
                found[number] = self._delivery(step)
            elif result.kind == "sum" and number in self.whole:
                found[number] = Sink("add", self.whole[number])
            elif result.kind == "map" and number in self.whole and result.cut is not None and result.cut.outer == 1:
                length = self.loop.tile(step.chunk, step.tile)[1]
                memory = narrow(self.whole[number], result.cut, self.loop.rows, start, length)
                found[number] = Sink("first", memory)
        return found

    def _delivery(self, step: Step) -> Sink:
        if step.how == "finish":
            return Sink("finish", self._delivered(self.rank, 0, step.tile), self._finished(0, step.tile))
        if step.how == "own":
            return Sink("first", self._finished(self.rank, step.tile))
        section = self.rank if step.how == "send" else 0
        return Sink("add" if step.how == "add" else "first", self._delivered(step.chunk, section, step.tile))

    def _finished(self, section: int, tile: int) -> torch.Tensor:
        """The place of a tile in the result: in chunk ``section``, or in the only chunk of a reduce-scatter."""
        number = self.loop.delivers
        assert number is not None
        result = self.loop.results[number]
        assert result.cut is not None
        if number not in self.whole:
            chunks = 1 if result.kind == "reduce_scatter" else self.loop.parts
            shape = (chunks * self.tile_shape[0], *self.tile_shape[1:])
            self.whole[number] = torch.empty(shape, dtype=self.tile_dtype, device=self.operands[0].device)
        start, length = self.loop.tile(section, tile)
        return self.whole[number].narrow(0, start * result.cut.inner, length * result.cut.inner)

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


def tile_of(loop: TileLoop, index: int, operand: torch.Tensor, where: tuple[int, int, int], rank: int) -> torch.Tensor:
    """What the region reads of an operand. where: chunk, first row and number of rows; for an exchanged operand, rank ``rank``'s
    piece; for fetched ones ``operand`` is that of the rank whose chunk it is."""
    read, (chunk, start, length) = loop.reads[index], where
    if read.cut is None:
        return operand
    if read.kind == "tiled":
        return narrow(operand, read.cut, loop.rows, start, length)
    row = start - chunk * loop.chunk
    if read.kind == "exchange":
        row += rank * loop.chunk
    return operand.narrow(0, row * read.cut.inner, length * read.cut.inner)


class ReadyLoop:
    """A loop on a rank: its region for tiles of any length, and the size of what it delivers, each worked out once."""

    def __init__(self, loop: TileLoop, site: Site) -> None:
        self.loop, self._site = loop, site
        self._bodies: dict[int, TileBody] = {}
        self._views: dict[int, tuple[tuple[Any, ...], dict[tuple[int, ...], torch.Tensor]]] = {}
        self._delivered: dict[tuple[tuple[torch.dtype, torch.Size], ...], tuple[tuple[int, ...], torch.dtype]] = {}

    def body(self, length: int) -> TileBody:
        """The region for tiles of ``length`` rows."""
        if length not in self._bodies:
            self._bodies[length] = TileBody(self.loop, self._site, length)
        return self._bodies[length]

    def views(self, rank: int, sizes: tuple[Any, ...]) -> dict[tuple[int, ...], torch.Tensor]:
        """A place for the views of a rank; an empty one whenever ``sizes`` (of operands, and where the memory is) have changed."""
        known = self._views.get(rank)
        if known is None or known[0] != sizes:
            known = self._views[rank] = (sizes, {})
        return known[1]

    def delivered(self, operands: Sequence[torch.Tensor]) -> tuple[tuple[int, ...], torch.dtype]:
        """Shape and dtype of a delivered chunk, found by running the region without values; empty where nothing is delivered."""
        if self.loop.delivers is None:
            return (), torch.float32
        key = tuple((o.dtype, o.shape) for o in operands)
        if key not in self._delivered:
            start, length = self.loop.tile(0, 0)
            bare = [torch.empty_strided(o.shape, o.stride(), dtype=o.dtype, device="meta") for o in operands]
            views = [tile_of(self.loop, i, o, (0, start, length), 0) for i, o in enumerate(bare)]
            tile, result = self.body(length).run(views, {})[self.loop.delivers], self.loop.results[self.loop.delivers]
            assert result.cut is not None
            self._delivered[key] = (self.loop.chunk * result.cut.inner, *tile.shape[1:]), tile.dtype
        return self._delivered[key]


def run_whole(loop: TileLoop, body: TileBody, operands: Sequence[torch.Tensor], communicator: Communicator) -> list[torch.Tensor]:
    """What a loop stands for: the collective before, the region on all rows at once, the collective after."""
    given = list(operands)
    if loop.fetches is not None:
        operand = given[loop.fetches].contiguous()
        if loop.reads[loop.fetches].kind == "gather":
            pending = communicator.all_gather(operand, loop.axis)
        else:
            each = [operand.shape[0] // loop.parts] * loop.parts
            pending = communicator.all_to_all(operand, each, each, loop.axis)
        given[loop.fetches] = communicator.wait(pending)
    found = body.run(given, {})
    if loop.delivers is not None:
        result, value = loop.results[loop.delivers], found[loop.delivers].contiguous()
        match result.kind:
            case "all_reduce":
                pending = communicator.all_reduce(value, result.reduce_op, loop.axis)
            case "reduce_scatter":
                pending = communicator.reduce_scatter(value, result.reduce_op, loop.axis)
            case _:
                each = [value.shape[0] // loop.parts] * loop.parts
                pending = communicator.all_to_all(value, each, each, loop.axis)
        found[loop.delivers] = communicator.wait(pending)
    return [found[number] for number in range(len(loop.results))]


def forms_of_loop(loop: TileLoop, site: Site, operands: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """What a loop makes of operands without values."""
    given = list(operands)
    if loop.fetches is not None and loop.reads[loop.fetches].kind == "gather":
        operand = given[loop.fetches]
        given[loop.fetches] = operand.new_empty((loop.parts * operand.shape[0], *operand.shape[1:]))
    found = TileBody(loop, site, loop.rows).run(given, {})
    results = []
    for number, result in enumerate(loop.results):
        shape = list(found[number].shape)
        if result.kind == "reduce_scatter":
            shape[0] //= loop.parts
        results.append(found[number].new_empty(shape))
    return results


def _aligned(nbytes: int) -> int:
    return -(-nbytes // _ALIGN) * _ALIGN
