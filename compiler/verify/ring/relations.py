"""What wrong results are, read off exact values: no names, layouts or provenance are needed.

Values over the ring are equal or they are not, so a relation can be tried: is the sum over the ranks the right value (a reduction
is missing)? is it the right value times the number of ranks (counted once a rank)? are all pieces there, in another order? And for
every node of a program of unknown origin: is there a value of the original that its pieces make? The first node that makes none,
out of inputs that all do, is where the error enters.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

import torch.fx as fx

from ....runtime.mesh import Mesh
from ...errors import HocketError
from ...layout import Layout, Partial, Replicate, Shard, format_layout
from ...program import Program, note, output_node
from ..ranks import RankGraphs
from .algebra import Algebra
from .arithmetic import ring_of
from .collectives import reduce_values
from .compare import ONE_RANK, evaluate
from .equality import differing, same
from .inputs import draw_inputs
from .interpret import interpret_ranks
from .pieces import cut_value
from .readings import concatenated, fingerprint, joined, keys_of
from .tables import PRIMES
from .value import RingTensor, Value

_SHOWN = 3
_SEEDS = 8
"""Draws after which a fault that shows on few inputs is given up."""
_PARTS = 4
"""Values are looked up as pieces of an original value cut into up to so many parts."""
_ORDERS = 4
"""Groups of more ranks than this are not searched for a change of order."""


def explain(original: Program, transformed: Program) -> str:
    """The wrong results of ``transformed`` in words, and the node where the error enters; empty where nothing can be said."""
    try:
        return next(filter(None, (_Explanation(original, transformed, seed).text() for seed in range(_SEEDS))), "")
    except (HocketError, RuntimeError, IndexError):  # the verdict stands without an explanation
        return ""


@dataclass
class _Explanation:
    original: Program
    transformed: Program
    seed: int
    algebra: Algebra = field(init=False)
    mesh: Mesh = field(init=False)
    known: dict[int, list[tuple[str, str, Value]]] = field(default_factory=dict)
    related: dict[fx.Node, str] = field(default_factory=dict)
    parts: set[int] = field(default_factory=set)
    on_rank: dict[fx.Node, int] = field(default_factory=dict)
    outputs: list[list[Value]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.algebra = Algebra(ring_of(PRIMES[0]), self.seed)
        self.mesh = self.transformed.mesh or ONE_RANK

    def text(self) -> str:
        first = Algebra(ring_of(PRIMES[0]), self.seed)
        inputs = draw_inputs(self.original, self.transformed, first, self.seed)
        expected = evaluate(self.original, inputs, first, watch=lambda node, values: self._remember(node, values[0]))
        pieces = []
        for node, role in zip(self.transformed.placeholders, self.transformed.signature.inputs, strict=True):
            value = inputs[role]
            pieces.append(
                cut_value(self.algebra, value, self._layout(node), self.mesh)
                if hasattr(value, "shape")
                else [value] * self.mesh.size
            )
        by_rank = [[piece[rank] for piece in pieces] for rank in range(self.mesh.size)]
        apart = isinstance(self.transformed, RankGraphs)
        graphs = self.transformed.graphs if isinstance(self.transformed, RankGraphs) else (self.transformed.graph,)
        self._cut_known()
        watches: Any = {"watch_rank": self._relate_one} if apart else {"watch": self._relate}
        self.outputs = interpret_ranks(graphs, by_rank, self.mesh, self.algebra, **watches)
        sentences: dict[str, list[str]] = {}
        wrong = []
        for position, (role, made) in enumerate(zip(self.transformed.signature.outputs, self.transformed.results, strict=True)):
            found = [output[position] for output in self.outputs]
            if made is None or role not in expected or not hasattr(expected[role], "shape"):
                continue
            sentence = self._result(found, expected[role], self._layout(made))
            if sentence:
                wrong.extend(_nodes_of(graphs, position))
                sentences.setdefault(sentence, []).append(str(role))
        parts = [self._entry(wrong)]
        parts += [f"{_some(roles)} {sentence}" for sentence, roles in sentences.items()][:_SHOWN]
        return "; ".join(part for part in parts if part)

    def _layout(self, node: Any) -> Layout:
        layouts = note(node).layouts
        return (
            layouts[0]
            if layouts and layouts[0] is not None and self.transformed.mesh is not None
            else tuple(Replicate() for _ in self.mesh.axes)
        )

    # ---- values of the original -----------------------------------------------------------------------------------------------

    def _remember(self, node: fx.Node, value: Value) -> None:
        for item in value if isinstance(value, (tuple, list)) else [value]:
            if isinstance(item, RingTensor):
                self.known.setdefault(fingerprint(item), []).append((node.name, note(node).source, item))

    def _name_of(self, value: Value) -> str:
        if not isinstance(value, RingTensor):
            return ""
        return next((name for name, _, other in self.known.get(fingerprint(value), []) if same(self.algebra, other, value)), "")

    # ---- nodes of the other program -------------------------------------------------------------------------------------------

    def _relate(self, node: fx.Node, values: list[Value]) -> None:
        if isinstance(values[0], RingTensor):
            exact = next((f"{format_layout(layout)} of {name}" for layout, name in self._relations(values)), "")
            self.related[node] = exact or ("pieces" if all(self._is_piece(value) for value in values) else "")

    def _cut_known(self) -> None:
        """Pieces of the original's values, whatever the order of their elements: views and strided shards are pieces too."""
        for others in self.known.values():
            for _, _, value in others:
                keys = keys_of(value.data)
                self.parts.add(int(keys.sum()))
                for dim, size in enumerate(value.shape):
                    for parts in range(2, min(size, _PARTS) + 1):
                        if size % parts == 0:
                            self.parts.update(int(piece.sum()) for piece in keys.chunk(parts, dim))

    def _is_piece(self, value: Value) -> bool:
        return isinstance(value, RingTensor) and (not bool(value.data.any()) or int(keys_of(value.data).sum()) in self.parts)

    def _relate_one(self, rank: int, node: fx.Node, value: Value) -> None:
        if isinstance(value, RingTensor):
            self.on_rank[node] = rank
            name = self._name_of(value)
            self.related[node] = f"R of {name}" if name else "a piece" if self._is_piece(value) else ""

    def _relations(self, values: list[Value]) -> Iterator[tuple[Layout, str]]:
        for layout, whole in joined(self.algebra, values, [size for _, size in self.mesh.axes]):
            name = self._name_of(whole)
            if name:
                yield layout, name

    def _entry(self, wrong: Sequence[fx.Node]) -> str:
        """The first node before the wrong results that is no value of the original, though all it is made of are."""
        suspects: set[fx.Node] = set()
        pending = list(wrong)
        while pending:
            node = pending.pop()
            if node not in suspects and (node in wrong or not self.related.get(node)):
                suspects.add(node)
                pending.extend(node.all_input_nodes)
        entries: dict[int, str] = {}
        for node in self.related:  # in the order of execution
            sources = [m for m in node.all_input_nodes if m in self.related]
            rank = self.on_rank.get(node, 0)
            if rank not in entries and node in suspects and not self.related[node] and all(self.related[m] for m in sources):
                maker = node.args[0] if node.target is operator.getitem else node
                assert isinstance(maker, fx.Node)
                sources = [m for m in maker.all_input_nodes if m in self.related]
                made = ", ".join(f"{m.name} ({self.related[m]})" for m in sources) or "constants"
                where = f" on rank {rank}" if node in self.on_rank else ""
                entries[rank] = (
                    f"{node.name} = {maker.target}{where}, made of {made}, is the first value that the original does not have"
                )
                entries[rank] += _at(node)
        return "; ".join(entries[rank] for rank in sorted(entries)[:_SHOWN])

    # ---- results --------------------------------------------------------------------------------------------------------------

    def _result(self, found: list[Value], expected: Value, layout: Layout) -> str:
        """What is wrong with one result, "" if nothing is."""
        choices = list(self._assembled(found, layout))
        if any(same(self.algebra, expected, value) for value in choices) and len(choices) == 1:
            return ""
        for axis, placement in enumerate(layout if len(choices) > 1 else ()):
            if isinstance(placement, Replicate):
                summed = (*layout[:axis], Partial("sum"), *layout[axis + 1 :])
                if any(same(self.algebra, expected, value) for value in self._assembled(found, summed)):
                    return f"is a partial sum over {self.mesh.names[axis]}: its reduction is missing"
        for value in choices[:1]:
            multiple = self._multiple(value, expected)
            if multiple:
                return multiple
        return self._ranks(found, expected, layout) or self._order(found, expected, layout) or self._entries(choices[0], expected)

    def _assembled(self, found: list[Value], layout: Layout) -> Iterator[Value]:
        """Every global value that the ranks hold, if they are read in this layout: several where replicas differ."""
        groups: list[list[Value]] = [found]
        replicas = [axis for axis, placement in enumerate(layout) if isinstance(placement, Replicate)]
        if replicas:
            groups = []
            for where in itertools.product(*(range(self.mesh.axes[axis][1]) for axis in replicas)):
                fixed = {self.mesh.names[axis]: place for axis, place in zip(replicas, where, strict=True)}
                groups.append([v for rank, v in enumerate(found) if fixed.items() <= self.mesh.coordinate(rank).items()])
        seen: list[Value] = []
        sizes = [self.mesh.axes[i][1] for i in range(len(layout)) if i not in replicas]
        places = [layout[i] for i in range(len(layout)) if i not in replicas]
        for group in groups:
            whole = self._whole(group, places, sizes)
            if whole is not None and not any(same(self.algebra, whole, other) for other in seen):
                seen.append(whole)
                yield whole

    def _whole(self, values: list[Value], places: Sequence[Any], sizes: Sequence[int]) -> Value | None:
        for placement, parts in zip(reversed(places), reversed(sizes), strict=True):
            groups = [values[start : start + parts] for start in range(0, len(values), parts)]
            try:
                if isinstance(placement, Shard):
                    values = [concatenated(self.algebra, group, placement.dim) for group in groups]
                else:
                    values = [reduce_values(self.algebra, group, placement.reduce_op) for group in groups]
            except (HocketError, RuntimeError, IndexError):
                return None
        return values[0]

    def _multiple(self, value: Value, expected: Value) -> str:
        if not isinstance(value, RingTensor) or not isinstance(expected, RingTensor) or tuple(value.shape) != tuple(expected.shape):
            return ""
        for axis, ranks in self.mesh.axes:
            for factor, why in (
                (Fraction(ranks), f"counted once for each of the {ranks} ranks of {axis}, or not averaged"),
                (Fraction(1, ranks), f"divided by the {ranks} ranks of {axis} once too often"),
                (Fraction(ranks**2), f"reduced over {axis} twice too often"),
            ):
                if ranks > 1 and same(
                    self.algebra, self.algebra.mul(expected, factor.numerator), self.algebra.mul(value, factor.denominator)
                ):
                    return f"is {factor} times the original's: it is {why}"
        if same(self.algebra, self.algebra.mul(value, 0), value):
            return "is zero"
        other = self._name_of(value)
        return f"holds the value of {other} instead" if other else ""

    def _ranks(self, found: list[Value], expected: Value, layout: Layout) -> str:
        """Which ranks are wrong, where some are right."""
        if any(isinstance(placement, Partial) for placement in layout):
            return ""
        true = cut_value(self.algebra, expected, layout, self.mesh)
        wrong = [rank for rank, (a, b) in enumerate(zip(true, found, strict=True)) if not same(self.algebra, a, b)]
        if len(wrong) == self.mesh.size or not wrong:
            return ""
        right = [rank for rank in range(self.mesh.size) if rank not in wrong]
        return f"is wrong on rank {_numbers(wrong)} and right on rank {_numbers(right)}"

    def _order(self, found: list[Value], expected: Value, layout: Layout) -> str:
        """Whether the pieces are right but lie on other ranks."""
        if len(layout) != 1 or not isinstance(layout[0], Shard) or self.mesh.size > _ORDERS:
            return ""
        for order in itertools.permutations(range(self.mesh.size)):
            whole = self._whole([found[i] for i in order], layout, [self.mesh.size])
            if whole is not None and same(self.algebra, expected, whole):
                return f"holds the right pieces in the order of ranks {_numbers(order)}"
        return ""

    def _entries(self, value: Value, expected: Value) -> str:
        mask = differing(self.algebra, expected, value)
        if mask is None:
            return f"has shape {list(value.shape)} instead of {list(expected.shape)}"
        wrong = int(mask.sum())
        if not wrong:
            return "differs between ranks that should hold the same"
        return f"differs in {wrong} of {mask.numel()} entries"


def _nodes_of(graphs: Sequence[fx.GraphModule], position: int) -> list[fx.Node]:
    """The nodes that a result comes from, on every rank."""
    found = [output_node(graph.graph).args[0][position] for graph in graphs]  # type: ignore[index]
    return [node for node in found if isinstance(node, fx.Node)]


def _some(roles: Sequence[str]) -> str:
    shown = ", ".join(roles[:_SHOWN])
    return shown if len(roles) <= _SHOWN else f"{shown} and {len(roles) - _SHOWN} more: each"


def _numbers(ranks: Sequence[int]) -> str:
    return ", ".join(map(str, ranks))


def _at(node: fx.Node) -> str:
    source = note(node).source
    return f" (at {source})" if source else ""
