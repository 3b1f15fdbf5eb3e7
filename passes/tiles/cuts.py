"""How a cut travels through an op: the rule table, read for time instead of space.

    rule  inputs S(i), R -> output S(o)        tile k of the input (and the whole rest) makes tile k of the output      (map)
    rule  inputs S(i), S(j) -> output P(sum)   the tiles of both make a part of the output, and the parts add up        (sum)
    view  [.., a, ..] -> [.., b, ..]           a factor of a dimension stays a factor: (dim, outer, inner) is recomputed

A tile is a shard in time. Rules are those that sharding uses; all of them have been executed on pieces.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.fx as fx

from ...compiler.layout import Partial, Placement, Replicate, Shard
from ...compiler.program import tensor_inputs, tensor_leaves
from ...compiler.rules.table import RuleTable
from ...compiler.rules.views import RESHAPES
from ...compiler.tiles import Cut

aten = torch.ops.aten

HEAVY = frozenset({aten.mm.default, aten.addmm.default, aten.bmm.default, aten.baddbmm.default})
"""Products, worth hiding a collective behind."""


@dataclass(frozen=True)
class Passage:
    """How one op takes a cut. inputs: per tensor input its cut, None for a whole one; outputs: per output its cut, None where it is
    no tensor or adds up (``sums``)."""

    inputs: tuple[Cut | None, ...]
    outputs: tuple[Cut | None, ...]
    sums: bool = False


class Order:
    """The nodes of a graph and where each stands."""

    def __init__(self, graph: fx.Graph) -> None:
        self.nodes: list[fx.Node] = list(graph.nodes)
        self.position = {node: i for i, node in enumerate(self.nodes)}

    def between(self, first: fx.Node, last: fx.Node | None = None) -> list[fx.Node]:
        """The nodes after one and before another (the end of the graph)."""
        return self.nodes[self.position[first] + 1 : None if last is None else self.position[last]]

    def before(self, node: fx.Node) -> list[fx.Node]:
        """The nodes before one, the nearest first."""
        return self.nodes[: self.position[node]][::-1]


class Cuts:
    """Passages of cuts of a loop of ``rows`` rows through the nodes of a graph."""

    def __init__(self, rules: RuleTable, rows: int, order: Order) -> None:
        self.rules, self.rows, self.order = rules, rows, order

    def forward(self, node: fx.Node, given: Sequence[Cut | None]) -> Passage | None:
        """With these cuts on its inputs (None: not cut by the loop, and free to be read whole or in tiles)."""
        if _reads_integers(node):
            return None
        if node.target in RESHAPES:
            cut = given[0]
            moved = None if cut is None else carried(shape_of(tensor_inputs(node)[0]), shape_of(node), cut, self.rows)
            return None if moved is None else Passage((cut,), (moved,))
        factor = next(((c.outer, c.inner) for c in given if c is not None), (1, 1))
        found = [p for rule in self.rules.rules(node, 2) if (p := self._passage(node, rule.inputs, rule.outputs, factor))]
        fitting = [p for p in found if all(want is None or want == have for want, have in zip(given, p.inputs, strict=True))]
        return min(fitting, key=lambda p: (p.sums, sum(c is not None for c in p.inputs)), default=None)

    def backward(self, node: fx.Node, output: int, cut: Cut) -> Passage | None:
        """With this cut on one of its outputs."""
        if _reads_integers(node):
            return None
        if node.target in RESHAPES:
            moved = carried(shape_of(node), shape_of(tensor_inputs(node)[0]), cut, self.rows)
            return None if moved is None else Passage((moved,), (cut,))
        found = [
            p for rule in self.rules.rules(node, 2) if (p := self._passage(node, rule.inputs, rule.outputs, (cut.outer, cut.inner)))
        ]
        fitting = [p for p in found if not p.sums and p.outputs[output] == cut and any(c is not None for c in p.inputs)]
        return min(fitting, key=lambda p: -sum(c is not None for c in p.inputs), default=None)

    def _passage(
        self, node: fx.Node, inputs: Sequence[Placement], outputs: Sequence[Placement | None], factor: tuple[int, int]
    ) -> Passage | None:
        """A rule as a passage: every cut dimension must hold the loop with the same factors."""
        length = factor[0] * self.rows * factor[1]
        leaves = tensor_leaves(node.meta["val"])
        cuts: list[Cut | None] = []
        shapes = [shape_of(n) for n in tensor_inputs(node)]
        shapes += [list(leaf.shape) if isinstance(leaf, torch.Tensor) else [] for leaf in leaves]
        for placement, shape in zip((*inputs, *outputs), shapes, strict=True):
            if isinstance(placement, Shard):
                if shape[placement.dim] != length:
                    return None
                cuts.append(Cut(placement.dim, *factor))
            else:
                cuts.append(None)
        made = [p for p in outputs if p is not None]
        sums = all(isinstance(p, Partial) and p.reduce_op == "sum" for p in made)
        if not sums and not all(isinstance(p, Shard) for p in made):
            return None
        if any(not isinstance(p, Shard | Replicate) for p in inputs) or not any(isinstance(p, Shard) for p in inputs):
            return None
        return Passage(tuple(cuts[: len(inputs)]), tuple(cuts[len(inputs) :]), sums)


def _reads_integers(node: fx.Node) -> bool:
    """Whether an argument differs from rank to rank, or is a tuple: such nodes stay outside."""
    return any(not isinstance(source.meta.get("val"), torch.Tensor) for source in node.all_input_nodes)


def shape_of(node: fx.Node) -> list[int]:
    """Sizes of a node's only output."""
    return list(node.meta["val"].shape)


def carried(before: Sequence[int], after: Sequence[int], cut: Cut, rows: int) -> Cut | None:
    """The same cut after a reshape; None where the loop no longer lies within one dimension."""
    outer = math.prod(before[: cut.dim]) * cut.outer
    inner = math.prod(before[cut.dim + 1 :]) * cut.inner
    for dim, size in enumerate(after):
        left, right = math.prod(after[:dim]), math.prod(after[dim + 1 :])
        if outer % left == 0 and inner % right == 0 and size >= rows and (outer // left) * rows * (inner // right) == size:
            return Cut(dim, outer // left, inner // right)
    return None
