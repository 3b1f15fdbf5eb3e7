"""Tile loops in a program: the node that holds one, and what it means written out in plain ops.

A loop is one ``call_function`` node of the op ``hocket.tile_loop``; its value is a tuple, its arguments are the operands and the
loop as data (``runtime.tile_loop``). ``written_out`` replaces it by its tiles, one after another, the collectives around them:

    tile k      the region on rows k of every operand         result      the tiles side by side, or added up
    gather      all_gather of the operand, before             deliver     the collective of the tiles side by side, after

That is what the verifier reads: equality is shown between the program before and every tile of the loop. What it does not show,
that the ranks' steps on shared buffers deliver those tiles, is the matter of ``runtime.tile_schedule.check_schedule``.
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Sequence
from typing import Any

import torch
import torch.fx as fx
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from ..runtime.mesh import Mesh
from ..runtime.ops import overload_of
from ..runtime.templates import Site, encode_constant, fold
from ..runtime.tile_loop import (
    MOST_SLOTS,
    MOST_TILES,
    SUMMED,
    Call,
    Cut,
    Read,
    Result,
    TileLoop,
    check_tile_loop,
    read_tile_loop,
    tile_loop_op,
)
from ..runtime.tile_schedule import Step, check_schedule, steps
from .program import NOTE, Note, Program, graph_module, note

__all__ = [
    "MOST_SLOTS",
    "MOST_TILES",
    "SUMMED",
    "Call",
    "Cut",
    "Read",
    "Result",
    "Step",
    "TileLoop",
    "check_schedule",
    "check_tile_loop",
    "encode_constant",
    "is_tile_loop",
    "loop_of",
    "steps",
    "tile_loop_op",
    "written_out",
]

aten, c10d = torch.ops.aten, torch.ops._c10d_functional


def is_tile_loop(node: fx.Node) -> bool:
    """Whether a node is a tile loop."""
    return node.op == "call_function" and node.target is tile_loop_op()


def loop_of(node: fx.Node) -> TileLoop:
    """The loop that a node holds."""
    _, region, integers, axis, parts = node.args
    return read_tile_loop(region, integers, axis, parts)  # type: ignore[arg-type]


def written_out(program: Program) -> Program:
    """The program with every tile loop replaced by its tiles; itself where it has none."""
    if not any(is_tile_loop(node) for node in program.nodes):
        return program
    return _WriteOut(program).run()


class _WriteOut:
    """Copies a graph. values: old node -> new node, or the list of results of a loop."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.graph = fx.Graph()
        self.values: dict[fx.Node, Any] = {}
        self.template = Note()
        self.mode = FakeTensorMode()
        self.site = Site.of(program.mesh or Mesh((("d", 1),)), 0)

    def run(self) -> Program:
        for node in self.program.nodes:
            if is_tile_loop(node):
                self.values[node] = self._loop(node)
            elif node.target is operator.getitem and is_tile_loop(node.all_input_nodes[0]):
                made: fx.Node = self.values[node.all_input_nodes[0]][node.args[1]]
                made.meta[NOTE] = note(node)
                self.values[node] = made
            else:
                self.values[node] = self.graph.node_copy(node, lambda n: self.values[n])
        self.graph.lint()
        return self.program.replace(graph=graph_module(self.graph))

    def _loop(self, node: fx.Node) -> list[fx.Node]:
        loop = loop_of(node)
        self.template = dataclasses.replace(note(node), layouts=None, global_shapes=None, added_by="tiles")
        operands: Any = node.args[0]
        given = [self.values[operand] for operand in operands]
        if isinstance(given[0].meta["val"], FakeTensor):
            self.mode = given[0].meta["val"].fake_mode
        if loop.fetches is not None:
            given[loop.fetches] = self._fetched(loop, given[loop.fetches])
        apart = [
            self._apart(value, read.cut, loop.rows) if read.cut is not None and read.cut.outer > 1 else value
            for value, read in zip(given, loop.reads, strict=True)
        ]
        tiles = []
        for chunk in range(loop.parts):
            for tile in range(loop.tiles):
                start, length = loop.tile(chunk, tile)
                views = [self._tile(v, read.cut, start, length) for v, read in zip(apart, loop.reads, strict=True)]
                tiles.append((self._region(loop, views, length), length))
        return [self._result(loop, result, [(slots[result.slot], length) for slots, length in tiles]) for result in loop.results]

    def _call(self, target: Any, *args: Any, val: Any = None, **kwargs: Any) -> fx.Node:
        node = self.graph.call_function(target, args, kwargs)
        if val is None:
            values, named = fx.node.map_arg((args, kwargs), lambda n: n.meta["val"])
            with self.mode:
                val = target(*values, **named)
        node.meta["val"] = val
        node.meta[NOTE] = self.template
        return node

    def _like(self, value: fx.Node, shape: Sequence[int]) -> Any:
        with self.mode:
            return torch.empty(tuple(shape), dtype=value.meta["val"].dtype, device=value.meta["val"].device)

    def _fetched(self, loop: TileLoop, operand: fx.Node) -> fx.Node:
        operand = self._call(aten.contiguous.default, operand)
        shape = list(operand.meta["val"].shape)
        if loop.reads[loop.fetches or 0].kind == "gather":
            val = self._like(operand, [loop.parts * shape[0], *shape[1:]])
            started = self._call(c10d.all_gather_into_tensor.default, operand, loop.parts, loop.axis, val=val)
        else:
            each = [shape[0] // loop.parts] * loop.parts
            started = self._call(c10d.all_to_all_single.default, operand, each, each, loop.axis, val=self._like(operand, shape))
        return self._call(c10d.wait_tensor.default, started, val=started.meta["val"])

    def _apart(self, value: fx.Node, cut: Cut, rows: int) -> fx.Node:
        shape = list(value.meta["val"].shape)
        return self._call(aten.reshape.default, value, [*shape[: cut.dim], cut.outer, rows * cut.inner, *shape[cut.dim + 1 :]])

    def _tile(self, value: fx.Node, cut: Cut | None, start: int, length: int) -> fx.Node:
        if cut is None:
            return value
        dim = cut.dim + (cut.outer > 1)
        piece = self._call(aten.slice.Tensor, value, dim, start * cut.inner, (start + length) * cut.inner)
        if cut.outer == 1:
            return piece
        shape = list(piece.meta["val"].shape)
        return self._call(aten.reshape.default, piece, [*shape[: cut.dim], shape[cut.dim] * shape[dim], *shape[dim + 1 :]])

    def _region(self, loop: TileLoop, views: list[fx.Node], length: int) -> dict[int, fx.Node]:
        slots: dict[int, fx.Node] = dict(enumerate(views))
        for call in loop.calls:
            args, kwargs = loop.arguments(call, length)
            filled = [self._filled(arg, slots) for arg in args]
            made = self._call(overload_of(call.op), *filled, **{name: self._filled(a, slots) for name, a in kwargs.items()})
            if not call.spread:
                slots[call.outputs[0]] = made
                continue
            for index, slot in enumerate(call.outputs):
                if slot >= 0:
                    slots[slot] = self._call(operator.getitem, made, index)
        return slots

    def _filled(self, template: Any, slots: dict[int, fx.Node]) -> Any:
        if isinstance(template, dict) and "slot" in template:
            return slots[template["slot"]]
        if isinstance(template, list):
            return [self._filled(item, slots) for item in template]
        return fold(template, self.site)

    def _result(self, loop: TileLoop, result: Result, tiles: list[tuple[fx.Node, int]]) -> fx.Node:
        if result.kind == "sum":
            total = tiles[0][0]
            for tile, _ in tiles[1:]:
                total = self._call(aten.add.Tensor, total, tile)
            return total
        assert result.cut is not None
        whole = self._whole(result.cut, tiles)
        if result.kind == "map":
            return whole
        whole = self._call(aten.contiguous.default, whole)
        shape = list(whole.meta["val"].shape)
        match result.kind:
            case "all_reduce":
                made = self._call(c10d.all_reduce.default, whole, result.reduce_op, loop.axis, val=whole.meta["val"])
            case "reduce_scatter":
                val = self._like(whole, [shape[0] // loop.parts, *shape[1:]])
                made = self._call(c10d.reduce_scatter_tensor.default, whole, result.reduce_op, loop.parts, loop.axis, val=val)
            case _:
                each = [shape[0] // loop.parts] * loop.parts
                made = self._call(c10d.all_to_all_single.default, whole, each, each, loop.axis, val=whole.meta["val"])
        return self._call(c10d.wait_tensor.default, made, val=made.meta["val"])

    def _whole(self, cut: Cut, tiles: list[tuple[fx.Node, int]]) -> fx.Node:
        if cut.outer == 1:
            return self._call(aten.cat.default, [tile for tile, _ in tiles], cut.dim)
        joined = self._call(aten.cat.default, [self._apart(tile, cut, length) for tile, length in tiles], cut.dim + 1)
        shape = list(joined.meta["val"].shape)
        merged = [*shape[: cut.dim], shape[cut.dim] * shape[cut.dim + 1], *shape[cut.dim + 2 :]]
        return self._call(aten.reshape.default, joined, merged)
