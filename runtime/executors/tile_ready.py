"""A tile loop made ready on a rank: everything about it that is the same at every run, worked out once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import torch

from ..templates import Site
from ..tile_loop import TileLoop, narrow
from ..tile_schedule import HALVES, Step, steps
from .tile_body import TileBody

ALIGN = 64

Form = tuple[tuple[torch.dtype, torch.Size], ...]
"""Dtype and shape of every operand."""


@dataclass(frozen=True)
class Sizes:
    """What a loop needs for operands of one form.

    shape, dtype, chunk_bytes: of one delivered chunk; whole: shape and dtype of every result; published, delivered: bytes of
    the two parts of a half of a buffer; sent: (collective, bytes that a rank sends) by the usual formulas; carried: bytes of a row
    of a published and of a delivered chunk.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    chunk_bytes: int
    whole: tuple[tuple[tuple[int, ...], torch.dtype], ...]
    published: int
    delivered: int
    sent: tuple[tuple[str, Fraction], ...]
    carried: tuple[float, float]

    @property
    def arena(self) -> int:
        """Bytes of the buffer that a rank needs."""
        return HALVES * (self.published + self.delivered + ALIGN)


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
    """A loop on a rank: its region for tiles of any length, its steps, and its sizes, each worked out once."""

    def __init__(self, loop: TileLoop, site: Site) -> None:
        self.loop, self._site = loop, site
        self._bodies: dict[int, TileBody] = {}
        self._views: dict[int, tuple[tuple[Any, ...], dict[Any, Any]]] = {}
        self._sizes: dict[Form, Sizes] = {}
        self._scripts: dict[int, list[Step]] = {}
        self.is_agreed = False

    def body(self, length: int) -> TileBody:
        """The region for tiles of ``length`` rows."""
        if length not in self._bodies:
            self._bodies[length] = TileBody(self.loop, self._site, length)
        return self._bodies[length]

    def script(self, rank: int) -> list[Step]:
        """The steps of a rank in the first loop of its axis; values of signals grow by ``parts + 1`` from one to the next."""
        if rank not in self._scripts:
            self._scripts[rank] = steps(self.loop, rank, 0)
        return self._scripts[rank]

    def views(self, rank: int, sizes: tuple[Any, ...]) -> dict[Any, Any]:
        """A place for the views of a rank; an empty one whenever ``sizes`` (of operands, and where the memory is) have changed."""
        known = self._views.get(rank)
        if known is None or known[0] != sizes:
            known = self._views[rank] = (sizes, {})
        return known[1]

    def sizes(self, form: Form, operands: Sequence[torch.Tensor]) -> Sizes:
        """For operands of that form."""
        found = self._sizes.get(form)
        if found is None:
            found = self._sizes[form] = self._measured(operands)
        return found

    def _measured(self, operands: Sequence[torch.Tensor]) -> Sizes:
        loop, others = self.loop, self.loop.parts - 1
        sent: list[tuple[str, Fraction]] = []
        published = delivered = 0
        if loop.fetches is not None:
            published = operands[loop.fetches].nbytes
            gathers = loop.reads[loop.fetches].kind == "gather"
            sent.append(("all_gather" if gathers else "all_to_all", Fraction(others * published, 1 if gathers else loop.parts)))
        whole = self._wholes(operands)
        shape, dtype = ((0,), torch.float32) if loop.delivers is None else whole[loop.delivers]
        if loop.delivers is not None:
            kind = loop.results[loop.delivers].kind
            if kind != "reduce_scatter":
                shape = (shape[0] // loop.parts, *shape[1:])
            delivered = dtype.itemsize * torch.Size(shape).numel() * (loop.parts if kind == "all_to_all" else 1)
        chunk_bytes = dtype.itemsize * torch.Size(shape).numel()
        if loop.delivers is not None:
            kind = loop.results[loop.delivers].kind
            sent.append((kind, Fraction(others * chunk_bytes * (2 if kind == "all_reduce" else 1))))
        pieces = loop.parts if loop.fetches is not None and loop.reads[loop.fetches].kind == "exchange" else 1
        carried = (published / pieces / loop.chunk, chunk_bytes / loop.chunk)
        return Sizes(shape, dtype, chunk_bytes, whole, aligned(published), aligned(delivered), tuple(sent), carried)

    def _wholes(self, operands: Sequence[torch.Tensor]) -> tuple[tuple[tuple[int, ...], torch.dtype], ...]:
        """Shape and dtype of every result, found by computing one tile; without values torch would load its compiler for that."""
        loop = self.loop
        start, length = loop.tile(0, 0)
        tiles = self.body(length).run([tile_of(loop, i, o, (0, start, length), 0) for i, o in enumerate(operands)], {})
        found = []
        for number, result in enumerate(loop.results):
            shape = list(tiles[number].shape)
            if result.cut is not None and result.kind != "sum":
                shape[result.cut.dim] = result.cut.outer * loop.rows * result.cut.inner
            if result.kind == "reduce_scatter":
                shape[0] //= loop.parts
            found.append((tuple(shape), tiles[number].dtype))
        return tuple(found)


def aligned(nbytes: int) -> int:
    """Up to the next multiple of a cache line."""
    return -(-nbytes // ALIGN) * ALIGN
