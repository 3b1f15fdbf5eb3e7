"""A tile loop: the ops around a collective, run chunk by chunk, each chunk sent or received while the next one is computed.

    whole     y = reduce_scatter(f(x))                  f acts on the rows of x one by one (a *map* along the loop)
    loop      for every chunk c of rows:  f(x[c]) is added to the buffer of rank c

One instruction holds the loop: its operands, the region as a list of calls on numbered slots, and what becomes of the results.
All integers of the region stand in a list of their own: the loop of a large program and that of its small copy are the same text.

A value is cut as ``(dim, outer, inner)``: its dimension of size ``outer * rows * inner`` read as three, of which the middle one is
the loop. Chunk c of the loop is ``rows / parts`` of it, rank c's; a chunk may be run in several tiles, of equal length or each
``growth`` times as long as the one before: a short first one puts a link to work early.

    reads     whole     the operand as it is              tiled     the operand, cut
              gather    all ranks' operands in a row      exchange  piece c of rank c's operand
    results   map       tiles side by side                sum       tiles added up
              all_reduce, reduce_scatter, all_to_all      what the collective makes of the tiles side by side
"""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from .errors import ProgramError

TILE_LOOP = "hocket.tile_loop.default"
SCHEMA = "tile_loop(Tensor[] operands, str region, int[] sizes, str axis, int parts) -> Tensor[]"
READS = ("whole", "tiled", "gather", "exchange")
RESULTS = ("map", "sum", "all_reduce", "reduce_scatter", "all_to_all")
SUMMED = ("all_reduce", "reduce_scatter")
"""Results that are added up over ranks."""

MOST_SLOTS = 448
"""Tiles of all chunks together, and"""

MOST_TILES = 32
"""tiles per chunk: what the signal slots of a transport leave room for."""


@functools.cache
def tile_loop_op() -> Any:
    """The op that stands for a tile loop in a graph. It cannot be called: executors run it, verifiers write it out."""
    library = torch.library.Library("hocket", "FRAGMENT")
    library.define(SCHEMA)
    _KEPT.append(library)
    return torch.ops.hocket.tile_loop.default


_KEPT: list[torch.library.Library] = []


class Cut(NamedTuple):
    """Where the loop lies in a value: dimension ``dim`` is ``[outer, rows, inner]``."""

    dim: int
    outer: int = 1
    inner: int = 1


class Read(NamedTuple):
    """How the region reads an operand; ``cut`` is None for a whole one."""

    kind: str
    cut: Cut | None = None


class Call(NamedTuple):
    """One op of the region. args, kwargs: templates as in ``templates``, with ``{"n": k}`` for the k-th integer and
    ``{"tile": [k, l]}`` for ``sizes[k] * (length of the tile) * sizes[l]``; outputs: slots, -1 for elements nobody reads."""

    op: str
    args: list[Any]
    kwargs: dict[str, Any]
    outputs: tuple[int, ...]
    spread: bool


class Result(NamedTuple):
    """What leaves the loop: the slot of the region, and what is made of its tiles. reduce_op: of reducing collectives."""

    kind: str
    slot: int
    cut: Cut | None
    reduce_op: str = ""


@dataclass(frozen=True)
class TileLoop:
    """See the module. rows: length of the loop; tiles: per chunk; slots 0 .. len(reads)-1 hold the operands; growth: of the
    tiles of a chunk, from one to the next; eager: whether a rank computes its own chunk without waiting for what the others add."""

    axis: str
    parts: int
    rows: int
    tiles: int
    sizes: tuple[int, ...]
    reads: tuple[Read, ...]
    calls: tuple[Call, ...]
    results: tuple[Result, ...]
    growth: int = 1
    eager: bool = False

    @property
    def chunk(self) -> int:
        """Rows of the loop that belong to one rank."""
        return self.rows // self.parts

    @functools.cached_property
    def fetches(self) -> int | None:
        """The operand that comes from all ranks, None where each rank has all it reads."""
        return next((i for i, read in enumerate(self.reads) if read.kind in ("gather", "exchange")), None)

    @functools.cached_property
    def delivers(self) -> int | None:
        """The result that goes to other ranks, None where each keeps what it makes."""
        return next((i for i, result in enumerate(self.results) if result.kind not in ("map", "sum")), None)

    def tile(self, chunk: int, tile: int) -> tuple[int, int]:
        """(first row, number of rows) of a tile. Of equal tiles the last may be a row shorter; no tile is empty."""
        first = self._edges[tile]
        return chunk * self.chunk + first, self._edges[tile + 1] - first

    @functools.cached_property
    def _edges(self) -> tuple[int, ...]:
        return tuple(self._edge(tile) for tile in range(self.tiles + 1))

    def _edge(self, tile: int) -> int:
        """Rows of a chunk before a tile."""
        if self.growth == 1:
            each, longer = divmod(self.chunk, self.tiles)
            return tile * each + min(tile, longer)
        share: int = (self.growth**tile - 1) * self.chunk // (self.growth**self.tiles - 1)
        return max(tile, share)

    def arguments(self, call: Call, length: int) -> tuple[list[Any], dict[str, Any]]:
        """Templates of a call for tiles of ``length`` rows, as ``templates.fold`` reads them."""
        args = [_sized(template, self.sizes, length) for template in call.args]
        return args, {name: _sized(template, self.sizes, length) for name, template in call.kwargs.items()}

    def region(self) -> str:
        """The text of the region, without its integers (``sizes``, preceded by rows, tiles and growth)."""
        body = {
            "reads": [[r.kind, None if r.cut is None else list(r.cut)] for r in self.reads],
            "calls": [[c.op, c.args, c.kwargs, list(c.outputs), c.spread] for c in self.calls],
            "results": [[r.kind, r.slot, None if r.cut is None else list(r.cut), r.reduce_op] for r in self.results],
            "eager": self.eager,
        }
        return json.dumps(_without_factors(body), separators=(",", ":"), sort_keys=True)

    def integers(self) -> list[int]:
        """rows, tiles, growth, the factors of all cuts, and the integers of the calls."""
        cuts = [cut for cut in (*(r.cut for r in self.reads), *(r.cut for r in self.results)) if cut is not None]
        return [self.rows, self.tiles, self.growth, *(n for cut in cuts for n in (cut.outer, cut.inner)), *self.sizes]

    def words(self) -> tuple[str, list[int], str, int]:
        """The arguments of the op after its operands."""
        return self.region(), self.integers(), self.axis, self.parts


def read_tile_loop(region: str, integers: Sequence[int], axis: str, parts: int) -> TileLoop:
    """Inverse of ``words``. ProgramError when the text is no tile loop."""
    try:
        body = json.loads(region)
        rows, tiles, growth, *rest = integers
        numbers = iter(rest)

        def cut(found: Any) -> Cut | None:
            return None if found is None else Cut(int(found), next(numbers), next(numbers))

        reads = tuple(Read(kind, cut(where)) for kind, where in body["reads"])
        results = tuple(Result(kind, slot, cut(where), op) for kind, slot, where, op in body["results"])
        calls = tuple(Call(op, args, kwargs, tuple(outputs), spread) for op, args, kwargs, outputs, spread in body["calls"])
        eager = bool(body["eager"])
        loop = TileLoop(axis, parts, rows, tiles, tuple(numbers), reads, calls, results, growth, eager)
    except (ValueError, TypeError, KeyError, StopIteration) as error:
        raise ProgramError(f"malformed tile loop: {error!r}") from error
    check_tile_loop(loop)
    return loop


def check_tile_loop(loop: TileLoop) -> None:
    """ProgramError unless the loop can be run: known kinds, chunks of whole rows, slots written before they are read."""
    if loop.parts < 2 or loop.rows < 1 or loop.rows % loop.parts or not 1 <= loop.tiles <= min(MOST_TILES, loop.chunk):
        raise ProgramError(f"a tile loop of {loop.rows} rows cannot be run by {loop.parts} ranks in {loop.tiles} tiles each")
    if loop.growth < 1 or (loop.eager and (loop.delivers is None or loop.results[loop.delivers].kind not in SUMMED)):
        raise ProgramError(
            "tiles of a loop must not shrink, and only a loop that adds up over ranks can compute its own chunk eagerly"
        )
    if any(r.kind not in READS for r in loop.reads) or any(r.kind not in RESULTS for r in loop.results):
        raise ProgramError("a tile loop reads or makes something of an unknown kind")
    if sum(r.kind in READS[2:] for r in loop.reads) > 1 or sum(r.kind in RESULTS[2:] for r in loop.results) > 1:
        raise ProgramError("a tile loop has at most one collective before and one after it")
    known = set(range(len(loop.reads)))
    for call in loop.calls:
        missing = [slot for slot in slots_of((call.args, call.kwargs)) if slot not in known]
        if missing:
            raise ProgramError(f"{call.op} in a tile loop reads slot {missing[0]}, which nothing has written")
        known.update(slot for slot in call.outputs if slot >= 0)
    if any(result.slot not in known for result in loop.results):
        raise ProgramError("a result of a tile loop is a slot that nothing has written")


def slots_of(template: Any) -> list[int]:
    """The slots that templates read, in order."""
    if isinstance(template, dict):
        return [template["slot"]] if set(template) == {"slot"} else slots_of(list(template.values()))
    if isinstance(template, (list, tuple)):
        return [slot for item in template for slot in slots_of(item)]
    return []


def narrow(value: torch.Tensor, cut: Cut, rows: int, start: int, length: int) -> torch.Tensor:
    """Rows ``start`` .. of a value, in place where its memory allows a view."""
    if cut.outer == 1:
        return value.narrow(cut.dim, start * cut.inner, length * cut.inner)
    shape = list(value.shape)
    apart = _apart(value, cut, rows).narrow(cut.dim + 1, start * cut.inner, length * cut.inner)
    shape[cut.dim] = cut.outer * length * cut.inner
    return apart.reshape(shape)


def place(target: torch.Tensor, value: torch.Tensor, cut: Cut, rows: int, start: int) -> None:
    """Write a tile into the whole value."""
    length = value.shape[cut.dim] // (cut.outer * cut.inner)
    if cut.outer == 1:
        target.narrow(cut.dim, start * cut.inner, length * cut.inner).copy_(value)
        return
    apart = _apart(target, cut, rows).narrow(cut.dim + 1, start * cut.inner, length * cut.inner)
    apart.copy_(_apart(value, cut, length))


def _apart(value: torch.Tensor, cut: Cut, rows: int) -> torch.Tensor:
    """The cut dimension as two: outer, and rows * inner."""
    shape = [*value.shape[: cut.dim], cut.outer, rows * cut.inner, *value.shape[cut.dim + 1 :]]
    return value.view(shape) if value.is_contiguous() else value.reshape(shape)


def _sized(template: Any, sizes: Sequence[int], length: int) -> Any:
    if isinstance(template, dict):
        if "n" in template:
            return sizes[template["n"]]
        if "tile" in template:
            outer, inner = template["tile"]
            return sizes[outer] * length * sizes[inner]
        return template
    return [_sized(item, sizes, length) for item in template] if isinstance(template, list) else template


def _without_factors(body: dict[str, Any]) -> dict[str, Any]:
    """Cuts by their dimension only; the factors are among the integers."""
    for entry in body["reads"]:
        entry[1] = None if entry[1] is None else entry[1][0]
    for entry in body["results"]:
        entry[2] = None if entry[2] is None else entry[2][0]
    return body
