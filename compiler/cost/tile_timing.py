"""What tile loops cost on this machine: timed on real ranks, and fitted into ``TileCosts``.

    begin + W n turn    a loop of tiny products between W ranks, with n tiles a chunk: a line through n = 1 and n = 8
    repack              products of few and of many rows: seconds = a * rows + repack * bytes of what is read whole

A loop of tiny products does nothing but begin and turn, so what is left when its products are taken off is the loop itself.
"""

from __future__ import annotations

import functools
import operator
import time
from collections.abc import Callable

import torch
import torch.fx as fx
from torch._subclasses import FakeTensorMode

from ...runtime.engines.base import Engine
from ..emit import emit
from ..errors import InputError
from ..layout import Layout, Replicate
from ..program import Program, Role, RoleKind, Signature, annotate
from ..tiles import Call, Cut, Read, Result, TileLoop, tile_loop_op
from .cluster import TileCosts
from .fit import fit_line, median_seconds

TimeLoop = Callable[[int], float]
"""Tiles per chunk -> median seconds of one loop of tiny products on the ranks, the products taken off."""

_FEW_TILES, _MANY_TILES = 1, 8
_FEW, _MANY = 1, 9
_REPEATS = 15
_CHUNK, _WIDTH = 32, 16
_HEIGHTS, _WHOLE = (32, 64, 128, 256, 512), (512, 1024)


def fit_tiles(time_loop: TimeLoop, ranks: int, budget: float) -> TileCosts:
    """Measure for about ``budget`` seconds. ranks: how many ``time_loop`` runs on. InputError for times that are not positive."""
    times = {tiles: time_loop(tiles) for tiles in (_FEW_TILES, _MANY_TILES)}
    if not all(seconds > 0 for seconds in times.values()):
        raise InputError(f"times of tile loops must be positive seconds; found {times}")
    turn = max(0.0, times[_MANY_TILES] - times[_FEW_TILES]) / ranks / (_MANY_TILES - _FEW_TILES)
    begin = max(0.0, times[_FEW_TILES] - ranks * _FEW_TILES * turn)
    return TileCosts(begin=begin, turn=turn, repack=repack_seconds(budget), measured=True)


def repack_seconds(budget: float) -> float:
    """Seconds that a product takes, whatever its rows, for each byte of its right operand."""
    right = torch.ones(_WHOLE)
    points = {}
    for rows in _HEIGHTS:
        left, out = torch.ones(rows, _WHOLE[0]), torch.empty(rows, _WHOLE[1])
        points[float(rows)] = median_seconds(functools.partial(torch.mm, left, right, out=out), "cpu", budget / len(_HEIGHTS))
    return fit_line(points)[1] / right.nbytes


class LoopTimer:
    """``timer(tiles)``: see ``TimeLoop``. engine: of one axis.

    The time of a program with one loop is taken off that of a program with many, so that what a step costs by itself drops out.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def __call__(self, tiles: int) -> float:
        """Seconds of one loop."""
        parts = self._engine.mesh.size
        value, weight = torch.ones(_CHUNK * parts, _WIDTH), torch.zeros(_WIDTH, _WIDTH)
        programs = [repeated_loop(tiles, count, self._engine) for count in (_FEW, _MANY)]
        few, many = (self._step_seconds(program, value, weight) for program in programs)
        tile = torch.ones(_CHUNK // tiles, _WIDTH)
        products = parts * tiles * median_seconds(lambda: torch.mm(tile, weight), "cpu", 0.05)
        return max((many - few) / (_MANY - _FEW) - products, 1e-9)

    def _step_seconds(self, program: Program, *inputs: torch.Tensor) -> float:
        handle = self._engine.load(emit(program), {})
        times = []
        for _ in range(_REPEATS):
            start = time.perf_counter()
            ticket, _results = self._engine.forward(handle, list(inputs))
            times.append(time.perf_counter() - start)
            self._engine.release(ticket)
        return sorted(times[1:])[
            _REPEATS // 4
        ]  # whoever is interrupted here makes the others wait: most of the slow ones are noise


def repeated_loop(tiles: int, count: int, engine: Engine) -> Program:
    """A lowered program that runs a loop, product and all-reduce, ``count`` times. Its numbers are of no use."""
    ((axis, parts),) = engine.mesh.axes
    rows = _CHUNK * parts
    calls = (Call("aten.mm.default", [{"slot": 0}, {"slot": 1}], {}, (2,), spread=False),)
    reads = (Read("tiled", Cut(0)), Read("whole"))
    loop = TileLoop(axis, parts, rows, tiles, (), reads, calls, (Result("all_reduce", 2, Cut(0), "sum"),))
    whole: Layout = tuple(Replicate() for _ in engine.mesh.axes)
    graph = fx.Graph()

    def described(node: fx.Node, *shape: int) -> fx.Node:
        with mode:
            node.meta["val"] = torch.empty(shape)
        annotate(node, layouts=(whole,), global_shapes=(shape,))
        return node

    mode = FakeTensorMode()
    value = described(graph.placeholder("value"), rows, _WIDTH)
    weight = described(graph.placeholder("weight"), _WIDTH, _WIDTH)
    roles = tuple(Role(RoleKind.INPUT, f"args[{i}]") for i in range(2))
    for node, role in zip((value, weight), roles, strict=True):
        annotate(node, role=role)
    for _ in range(count):
        looped = graph.call_function(tile_loop_op(), ([value, weight], *loop.words()))
        looped.meta["val"] = (value.meta["val"],)
        annotate(looped, layouts=(whole,), global_shapes=((rows, _WIDTH),))
        value = described(graph.call_function(operator.getitem, (looped, 0)), rows, _WIDTH)
    graph.output((value,))
    return Program(fx.GraphModule(torch.nn.Module(), graph), Signature(roles, (Role(RoleKind.OUTPUT, "out"),)), mesh=engine.mesh)
