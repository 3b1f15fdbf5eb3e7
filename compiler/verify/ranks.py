"""One SPMD program out of one graph per rank, where the graphs differ in nothing but integers and constants.

    x + 0 | x + 4 | x + 8      becomes   x + (0 + 4 * coordinate("tp"))            integers that grow along the axes
    C_0   | C_1   | C_2        becomes   piece r of an input of shape [3, ...]     tensors baked into the graphs

Then everything that is known about lowered programs (types, erasure, localisation) applies. Ranks that run different ops, the
stages of a pipeline say, stay apart and are run in lockstep.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.fx as fx

from ...runtime.mesh import Mesh
from ..layout import Layout, Shard, coordinate
from ..program import Program

aten = torch.ops.aten


@dataclass(frozen=True)
class RankGraphs(Program):
    """A lowered program whose ranks run different graphs. ``graph`` is that of rank 0; all have the same signature and notes."""

    graphs: tuple[fx.GraphModule, ...] = ()


@dataclass(frozen=True)
class Lifted:
    """A flat graph without attributes. constants: name of a placeholder at the front -> the tensor that stood in the module."""

    graph: fx.Graph
    constants: dict[str, torch.Tensor]


@dataclass(frozen=True)
class Merged:
    """One graph for all ranks. layouts: of those constants that differ from rank to rank, stacked over the mesh."""

    graph: fx.Graph
    constants: dict[str, torch.Tensor]
    layouts: dict[str, Layout]


def merge(ranks: Sequence[Lifted], mesh: Mesh) -> Merged | None:
    """The SPMD graph of all ranks; None where they differ in more than integers and the values of constants."""
    if any(rank.graph is not ranks[0].graph for rank in ranks):
        return _Merge(ranks, mesh).run()
    return Merged(ranks[0].graph, dict(ranks[0].constants), {})


class _Differ(Exception):
    """The ranks run different programs."""


class _Merge:
    def __init__(self, ranks: Sequence[Lifted], mesh: Mesh) -> None:
        self.ranks = ranks
        self.mesh = mesh
        self.graph = fx.Graph()
        self.positions = [{node: i for i, node in enumerate(rank.graph.nodes)} for rank in ranks]
        self.made: list[Any] = []
        self.constants: dict[str, torch.Tensor] = {}
        self.layouts: dict[str, Layout] = {}
        self.stacked: dict[int, str] = {}

    def run(self) -> Merged | None:
        rows = list(itertools.zip_longest(*(rank.graph.nodes for rank in self.ranks)))
        try:
            for row in rows:
                self._row(row)
        except _Differ:
            return None
        return Merged(self.graph, self.constants, self.layouts)

    def _row(self, row: Sequence[fx.Node | None]) -> None:
        first = row[0]
        if first is None or any(
            n is None or (n.op, n.target) != (first.op, first.target) for n in row if first.op == "call_function"
        ):
            raise _Differ
        if any(n is None or n.op != first.op for n in row):
            raise _Differ
        nodes = [n for n in row if n is not None]
        if first.op == "placeholder":
            self._placeholder(nodes)
        elif first.op == "output":
            self.graph.output(self._argument([n.args[0] for n in nodes]))
        else:
            if self.stacked:
                self._unstack()
            args = tuple(self._argument(list(items)) for items in _aligned([n.args for n in nodes]))
            if any(n.kwargs.keys() != first.kwargs.keys() for n in nodes):
                raise _Differ
            kwargs = {name: self._argument([n.kwargs[name] for n in nodes]) for name in first.kwargs}
            new = self.graph.create_node("call_function", first.target, args, kwargs, first.name)
            new.meta.update(first.meta)
            self.made.append(new)

    def _placeholder(self, nodes: Sequence[fx.Node]) -> None:
        new = self.graph.placeholder(nodes[0].name)
        new.meta.update(nodes[0].meta)
        found = [rank.constants.get(node.name) for rank, node in zip(self.ranks, nodes, strict=True)]
        tensors = [tensor for tensor in found if tensor is not None]
        if tensors and len(tensors) != len(found):
            raise _Differ
        if tensors:
            first = tensors[0]
            if any(t.shape != first.shape or t.dtype != first.dtype for t in tensors):
                raise _Differ
            if all(torch.equal(t, first) for t in tensors):
                self.constants[new.name] = first
            else:
                self.constants[new.name] = torch.stack(tensors).reshape(*self.mesh.shape, *first.shape)
                self.layouts[new.name] = tuple(Shard(dim) for dim in range(len(self.mesh.axes)))
                self.stacked[len(self.made)] = new.name
        self.made.append(new)

    def _unstack(self) -> None:
        """Every rank's own constant, out of its piece of shape [1, ..., 1, *shape]; after all placeholders."""
        for position in self.stacked:
            for _ in self.mesh.axes:
                self.made[position] = self.graph.call_function(aten.select.int, (self.made[position], 0, 0))
        self.stacked = {}

    def _argument(self, found: Sequence[Any]) -> Any:
        first = found[0]
        if isinstance(first, fx.Node):
            places = {positions.get(node) for positions, node in zip(self.positions, found, strict=True)}
            if len(places) != 1:
                raise _Differ
            return self.made[self.positions[0][first]]
        if isinstance(first, (list, tuple)):
            if any(not isinstance(other, (list, tuple)) for other in found):
                raise _Differ
            return type(first)(self._argument(list(items)) for items in _aligned(found))
        if all(type(other) is type(first) and other == first for other in found) or all(other is first for other in found):
            return first
        if all(isinstance(other, int) and not isinstance(other, bool) for other in found):
            return self._integer(found)
        raise _Differ

    def _integer(self, found: Sequence[int]) -> Any:
        """a + b * coordinate, summed over the axes."""
        slopes = {}
        for axis in self.mesh.names:
            if self.mesh.axis_size(axis) > 1:
                step = self.mesh.rank({name: int(name == axis) for name in self.mesh.names})
                slopes[axis] = found[step] - found[0]
        for rank, value in enumerate(found):
            where = self.mesh.coordinate(rank)
            if value != found[0] + sum(slope * where[axis] for axis, slope in slopes.items()):
                raise _Differ
        total: Any = found[0]
        for axis, slope in slopes.items():
            if slope:
                index = self.graph.call_function(coordinate, (axis,))
                total = self.graph.call_function(operator.add, (total, self.graph.call_function(operator.mul, (index, slope))))
        return total


def _aligned(rows: Sequence[Sequence[Any]]) -> list[tuple[Any, ...]]:
    if len({len(row) for row in rows}) != 1:
        raise _Differ
    return list(zip(*rows, strict=True))
