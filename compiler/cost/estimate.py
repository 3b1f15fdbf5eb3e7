"""What a planned program costs on one rank: time, flops, traffic, bytes on the wire, and the most memory held at once.

Everything is counted on local sizes, from the same prices that planning minimises: each op once, and each redistribution once per
distinct (value, layout). Memory follows the life of every buffer: a view shares its base's, a redistributed copy lives from its
first to its last use, inputs and results live throughout.

With ``symbolic=True`` the figures are sympy expressions of the program's named sizes (``symbols.py``); the plan stays the one
made for the example sizes, and ``peak_bytes`` is the memory held at the moment that is fullest at those sizes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import sympy

from ...runtime.mesh import Mesh
from ..layout import Layout
from .cost import Cost, Quantity
from .ops import LocalTensor, Work, is_transposed, is_view, work
from .symbols import NumericSizes, SymbolicSizes
from .transfer import TransferPrices

if TYPE_CHECKING:
    from ..plan.plan import NodePlan
    from ..plan.view import Site, View

Sizes = NumericSizes | SymbolicSizes


@dataclass(frozen=True)
class Redistribution:
    """One value brought to one layout. users: the sites that want it, in program order."""

    value: int
    source: Layout
    target: Layout
    users: tuple[int, ...]


def redistributions(view: View, nodes: Mapping[str, NodePlan], results: Sequence[Layout | None]) -> Iterator[Redistribution]:
    """Every distinct (value, layout) that must be made, in program order of the values."""
    for index, value in enumerate(view.values):
        source = made_layout(view, nodes, index)
        wanted: dict[Layout, list[int]] = {}
        for user, slot in value.uses:
            layout = wanted_layout(view, nodes, results, user, slot)
            if layout != source:
                wanted.setdefault(layout, []).append(user)
        for target, users in wanted.items():
            yield Redistribution(index, source, target, tuple(dict.fromkeys(users)))


def made_layout(view: View, nodes: Mapping[str, NodePlan], value: int) -> Layout:
    """Layout in which a value is made."""
    maker, output = view.values[value].maker
    layout = nodes[view.sites[maker].name].outputs[output]
    assert layout is not None
    return layout


def wanted_layout(view: View, nodes: Mapping[str, NodePlan], results: Sequence[Layout | None], user: int, slot: int) -> Layout:
    """Layout that a site wants in one slot; an input that takes its own update wants it as the input lies."""
    site = view.sites[user]
    if site.is_op:
        return nodes[site.name].inputs[slot]
    layout = nodes[site.name].outputs[0] if site.is_input else results[site.position]
    assert layout is not None
    return layout


class Estimator:
    """Adds up one plan. prices: shared with planning so that nothing is priced twice."""

    def __init__(
        self,
        view: View,
        nodes: Mapping[str, NodePlan],
        results: Sequence[Layout | None],
        prices: TransferPrices,
        *,
        symbolic: bool = False,
    ) -> None:
        self.view, self.nodes, self.results, self.prices = view, nodes, results, prices
        self.mesh: Mesh = prices.mesh
        self.sizes: Sizes = SymbolicSizes(view, self.mesh) if symbolic else NumericSizes(view, self.mesh)
        self.symbolic = symbolic
        self._works: dict[object, tuple[Work, Quantity]] = {}

    def cost(self) -> Cost:
        """The five figures."""
        terms: list[Counter[Any]] = [Counter(), Counter(), Counter(), Counter()]  # equal terms of repeated blocks are added as one
        for site in self.view.sites:
            if site.is_op:
                done, seconds = self._op(site)
                for counter, term in zip(terms, (seconds, done.flops, done.bytes_moved), strict=False):
                    counter[term] += 1
        for move in redistributions(self.view, self.nodes, self.results):
            for counter, term in zip(terms, self._moved(move), strict=True):
                counter[term] += 1
        seconds, flops, moved, wire = (sum(term * count for term, count in counter.items()) for counter in terms)
        return Cost(seconds, flops, moved, wire, self.peak_bytes())

    def _op(self, site: Site) -> tuple[Work, Quantity]:
        planned = self.nodes[site.name]
        key = (site.signature, id(planned), self.sizes.identity((*site.uses, *site.makes)))
        if key not in self._works:
            inputs = [self.sizes.local(v, layout) for v, layout in zip(site.uses, planned.inputs, strict=True)]
            outputs = [
                self.sizes.local(v, layout)
                for v, layout in zip(site.makes, planned.outputs, strict=True)
                if v is not None and layout is not None
            ]
            assert site.node is not None
            done = work(site.node.target, inputs, outputs, transposed=is_transposed(site.node.target, site.node.args))
            self._works[key] = done, self._seconds(site, done)
        return self._works[key]

    def _seconds(self, site: Site, done: Work) -> Quantity:
        tensors = [v for v in (*site.uses, *site.makes) if v is not None]
        if done.is_view or not tensors:
            return 0
        cluster, dtype = self.prices.cluster, self.view.values[tensors[0]].type.dtype
        if not self.symbolic:
            return cluster.op_seconds(float(done.flops), float(done.bytes_moved), dtype)
        busy, traffic = done.flops / cluster.flops_per_second(dtype), done.bytes_moved / cluster.memory_bandwidth
        return cluster.op_overhead + sympy.Max(busy, traffic)

    def _moved(self, move: Redistribution) -> tuple[Quantity, Quantity, Quantity, Quantity]:
        tensor = self.view.values[move.value].type
        transfer = self.prices.price(move.source, move.target, tensor.shape, tensor.itemsize)
        assert transfer is not None
        if isinstance(self.sizes, NumericSizes):
            return transfer.seconds, 0, transfer.bytes_moved, transfer.bytes_on_wire
        return self.sizes.transfer(move.value, transfer, self.prices.cluster)

    def peak_bytes(self) -> Quantity:
        """Most bytes held at once."""
        lives = list(_lives(self.view, self.nodes, self.results, lambda value, layout: self.sizes.local(value, layout)))
        numeric = lives
        if self.symbolic:
            plain = NumericSizes(self.view, self.mesh)
            numeric = list(_lives(self.view, self.nodes, self.results, lambda value, layout: plain.local(value, layout)))
        fullest = _fullest(numeric)
        return sum(life.tensor.nbytes for life in lives if life.born <= fullest <= life.dies)

    def held_at_peak(self) -> frozenset[int]:
        """The values that are held, in the layout in which they are made, when most bytes are."""
        lives = list(_lives(self.view, self.nodes, self.results, lambda value, layout: self.sizes.local(value, layout)))
        fullest = _fullest(lives)
        return frozenset(life.value for life in lives if life.is_as_made and life.born <= fullest <= life.dies)


@dataclass(frozen=True)
class _Life:
    """A buffer and the first and last moment (site index) at which it is held. value: what lies in it; is_as_made: not a copy that
    a redistribution made."""

    tensor: LocalTensor
    born: int
    dies: int
    value: int
    is_as_made: bool


def _fullest(lives: Sequence[_Life]) -> int:
    """The first moment at which most bytes are held."""
    change: Counter[int] = Counter()
    for life in lives:
        change[life.born] += life.tensor.nbytes
        change[life.dies + 1] -= life.tensor.nbytes
    held = peak = fullest = 0
    for moment in sorted(change):
        held += change[moment]
        if held > peak:
            peak, fullest = held, moment
    return fullest


def _lives(
    view: View, nodes: Mapping[str, NodePlan], results: Sequence[Layout | None], local: Callable[[int, Layout], LocalTensor]
) -> Iterator[_Life]:
    end = len(view.sites)
    base: dict[tuple[int, Layout], tuple[int, Layout]] = {}  # a view -> the buffer that it describes
    born: dict[tuple[int, Layout], int] = {}
    dies: dict[tuple[int, Layout], int] = {}

    def hold(value: int, layout: Layout, moment: int) -> None:
        holder = base.get((value, layout), (value, layout))
        if holder not in born:  # a redistributed copy is made when it is first wanted, beside what it is made of
            born[holder] = moment
            hold(value, made_layout(view, nodes, value), moment)
        dies[holder] = max(dies.get(holder, moment), moment)

    for index, site in enumerate(view.sites):
        uses = [] if site.is_input else list(site.uses)
        wanted = [wanted_layout(view, nodes, results, index, slot) for slot in range(len(uses))]
        for value, layout in zip(uses, wanted, strict=True):
            hold(value, layout, index if site.is_op else end)
        for value in (v for v in site.makes if v is not None):
            made = made_layout(view, nodes, value)
            if site.node is not None and uses and is_view(site.node.target):
                source = (uses[0], wanted[0])
                base[(value, made)] = base.get(source, source)
            else:
                born[(value, made)] = index
            hold(value, made, end if site.is_input else index)
    for index, site in enumerate(view.sites):
        for slot, value in enumerate(site.uses if site.is_input else ()):
            hold(value, wanted_layout(view, nodes, results, index, slot), end)
    for (value, layout), first in born.items():
        as_made = layout == made_layout(view, nodes, value)
        yield _Life(local(value, layout), first, dies[(value, layout)], value, as_made)


def estimate(
    view: View,
    nodes: Mapping[str, NodePlan],
    results: Sequence[Layout | None],
    prices: TransferPrices,
    *,
    symbolic: bool = False,
) -> Cost:
    """Cost of a planned program per rank and step; see the module's docstring."""
    return Estimator(view, nodes, results, prices, symbolic=symbolic).cost()
