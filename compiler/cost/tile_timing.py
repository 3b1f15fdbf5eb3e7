"""What tile loops cost on this machine: timed on real ranks, and fitted into ``TileCosts``.

    begin + W n turn    what a loop of W ranks with n tiles a chunk takes longer than the same product and collective one after the
                        other, and what the collective itself takes: a line through n = 1 and n = 8
    repack              products of few and of many rows: seconds = a * rows + repack * bytes of what is read whole

The products are tiny, so there is nothing to gain and only the cost is seen. Between any two of them stands a product that is the
same in all programs and larger than a cache: a loop in a model comes after other work, and is slower than one that follows itself.

On a busy machine times are too long, and differences of them anything: so costs are differences of undisturbed times
(``fit.quiet``), how far single differences lie apart is the ``doubt`` that a loop must overcome twice, and how far times lie above
the undisturbed ones is kept as ``spread``.
"""

from __future__ import annotations

import functools
import operator
import time
from collections.abc import Callable, Mapping, Sequence

import torch
import torch.fx as fx
from torch._subclasses import FakeTensorMode

from ...runtime.engines.base import Engine
from ..emit import emit
from ..errors import InputError
from ..layout import Layout, Replicate
from ..program import Program, Role, RoleKind, Signature, annotate
from ..tiles import Call, Cut, Read, Result, TileLoop, tile_loop_op
from .cluster import BUSY, TileCosts
from .fit import fit_line, quiet, quiet_seconds, spread

TimeLoops = Callable[[], Mapping[int, Sequence[float]]]
"""Tiles per chunk -> seconds of a loop of tiny products, and under ``APART`` those of the same product and all-reduce one after the
other: measurement by measurement, taken in turns."""

APART = 0

ATTEMPTS = 4
"""Times that loops are measured where the machine is too busy."""

TILES = (1, 8)
SENT = 4 * 32 * 16
"""Bytes of a rank's chunk of the tiny product's result."""

_CHUNK, _WIDTH, _OTHER = 32, 16, 256
_COUNT, _REPEATS = 8, 24
_HEIGHTS, _WHOLE = (32, 64, 128, 256, 512), (512, 1024)


def fit_tiles(time_loops: TimeLoops, ranks: int, collective: float, budget: float) -> TileCosts:
    """Measure for about ``budget`` seconds. ranks: how many the loops run on; collective: seconds that the cost model gives to the
    all-reduce. InputError where ``time_loops`` has not timed loops of one and of eight tiles and none."""
    few, many = TILES
    times = _calmest(time_loops)
    longer = {tiles: quiet(times[tiles]) - quiet(times[APART]) for tiles in TILES}
    turn = max(0.0, longer[many] - longer[few]) / ranks / (many - few)
    begin = max(0.0, longer[few] + collective - ranks * few * turn)
    pairs = sorted(loop - apart for loop, apart in zip(times[few], times[APART], strict=True))
    quarter = len(pairs) // 4
    doubt = max(TileCosts().doubt, (pairs[-1 - quarter] - pairs[quarter]) / 2)
    return TileCosts(begin=begin, turn=turn, repack=repack_seconds(budget), doubt=doubt, measured=True, spread=_spread(times))


def _calmest(time_loops: TimeLoops) -> dict[int, list[float]]:
    """Times from a moment in which other work disturbed little: the first such of ``ATTEMPTS``, else the best of them."""
    found: list[dict[int, list[float]]] = []
    while len(found) < ATTEMPTS and (not found or _spread(found[-1]) > BUSY):
        times = {tiles: list(seconds) for tiles, seconds in time_loops().items()}
        if set(times) != {APART, *TILES} or not all(times.values()) or min(map(min, times.values())) <= 0:
            expected = f"expected times of loops of {TILES[0]} and {TILES[1]} tiles and of none, in positive seconds"
            raise InputError(f"{expected}; found {times}")
        found.append(times)
    return min(found, key=_spread)


def _spread(times: Mapping[int, Sequence[float]]) -> float:
    return max(map(spread, times.values()))


def repack_seconds(budget: float) -> float:
    """Seconds that a product takes, whatever its rows, for each byte of its right operand."""
    right = torch.ones(_WHOLE)
    points = {}
    for rows in _HEIGHTS:
        left, out = torch.ones(rows, _WHOLE[0]), torch.empty(rows, _WHOLE[1])
        points[float(rows)] = quiet_seconds(functools.partial(torch.mm, left, right, out=out), "cpu", budget / len(_HEIGHTS))
    return fit_line(points)[1] / right.nbytes


class LoopTimer:
    """``timer()``: see ``TimeLoops``. engine: of one axis. The programs take turns, so that all see the same machine."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def __call__(self) -> dict[int, list[float]]:
        """See ``TimeLoops``."""
        parts = self._engine.mesh.size
        inputs = [torch.ones(_CHUNK * parts, _WIDTH), torch.zeros(_WIDTH, _WIDTH), torch.zeros(_OTHER, _OTHER)]
        handles = {n: self._engine.load(emit(repeated_loop(n, _COUNT, self._engine)), {}) for n in (APART, *TILES)}
        times: dict[int, list[float]] = {n: [] for n in handles}
        for _ in range(_REPEATS):
            for tiles, handle in handles.items():
                start = time.perf_counter()
                ticket, _results = self._engine.forward(handle, inputs)
                times[tiles].append(time.perf_counter() - start)
                self._engine.release(ticket)
        return {tiles: [seconds / _COUNT for seconds in found] for tiles, found in times.items()}


def repeated_loop(tiles: int, count: int, engine: Engine) -> Program:
    """A lowered program that runs a tiny product and its all-reduce ``count`` times, each after a larger product. tiles: of the
    loop, 0 for the two one after the other. Its numbers are of no use."""
    ((axis, parts),) = engine.mesh.axes
    rows = _CHUNK * parts
    calls = (Call("aten.mm.default", [{"slot": 0}, {"slot": 1}], {}, (2,), spread=False),)
    reads = (Read("tiled", Cut(0)), Read("whole"))
    loop = TileLoop(axis, parts, rows, max(1, tiles), (), reads, calls, (Result("all_reduce", 2, Cut(0), "sum"),))
    whole: Layout = tuple(Replicate() for _ in engine.mesh.axes)
    graph, mode, ops = fx.Graph(), FakeTensorMode(), torch.ops._c10d_functional

    def described(node: fx.Node, *shape: int) -> fx.Node:
        with mode:
            node.meta["val"] = torch.empty(shape)
        annotate(node, layouts=(whole,), global_shapes=(shape,))
        return node

    value = described(graph.placeholder("value"), rows, _WIDTH)
    weight = described(graph.placeholder("weight"), _WIDTH, _WIDTH)
    other = first = described(graph.placeholder("other"), _OTHER, _OTHER)
    roles = tuple(Role(RoleKind.INPUT, f"args[{i}]") for i in range(3))
    for node, role in zip((value, weight, other), roles, strict=True):
        annotate(node, role=role)
    for _ in range(count):
        other = described(graph.call_function(torch.ops.aten.mm.default, (other, first)), _OTHER, _OTHER)
        if tiles:
            looped = graph.call_function(tile_loop_op(), ([value, weight], *loop.words()))
            looped.meta["val"] = (value.meta["val"],)
            annotate(looped, layouts=(whole,), global_shapes=((rows, _WIDTH),))
            value = described(graph.call_function(operator.getitem, (looped, 0)), rows, _WIDTH)
            continue
        product = described(graph.call_function(torch.ops.aten.mm.default, (value, weight)), rows, _WIDTH)
        sent = described(graph.call_function(ops.all_reduce.default, (product, "sum", axis)), rows, _WIDTH)
        value = described(graph.call_function(ops.wait_tensor.default, (sent,)), rows, _WIDTH)
    graph.output((value, other))
    results = tuple(Role(RoleKind.OUTPUT, f"out[{i}]") for i in range(2))
    return Program(fx.GraphModule(torch.nn.Module(), graph), Signature(roles, results), mesh=engine.mesh)
