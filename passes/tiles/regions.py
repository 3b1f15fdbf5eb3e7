"""Regions: the nodes that one loop runs, grown from a collective through its producers or its consumers.

    before   all_gather, all_to_all: everything that reads its result row by row, up to the products
    after    reduce_scatter, all_reduce, all_to_all: everything that makes its operand row by row, down to the products
    both     a region that begins at one collective and ends at another: a whole layer in one loop

Nothing is matched: a node belongs to a region because a rule lets the cut through. What stays outside becomes an operand (whole, or
read tile by tile) or a result of the loop.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.fx as fx

from ...compiler.program import Note, Phase, note, producer, tensor_inputs
from ...compiler.tiles import Cut
from .cuts import HEAVY, Cuts, Order, Passage, shape_of

c10d = torch.ops._c10d_functional
AHEAD: dict[Any, str] = {c10d.all_gather_into_tensor.default: "gather", c10d.all_to_all_single.default: "exchange"}
BEHIND: dict[Any, str] = {
    c10d.reduce_scatter_tensor.default: "reduce_scatter",
    c10d.all_reduce.default: "all_reduce",
    c10d.all_to_all_single.default: "all_to_all",
}


@dataclass
class Region:
    """ahead, behind: the waits of the collectives before and after; members: the nodes inside, with how they take the cut; cuts: of
    values of members that are cut, by (node, output); sums: members whose tiles add up. rows: of the loop."""

    rows: int
    ahead: fx.Node | None = None
    behind: fx.Node | None = None
    members: dict[fx.Node, Passage] = field(default_factory=dict)
    cuts: dict[tuple[fx.Node, int], Cut] = field(default_factory=dict)
    sums: set[fx.Node] = field(default_factory=set)

    @property
    def heavy(self) -> list[fx.Node]:
        """The products inside."""
        return [node for node in self.members if node.target in HEAVY]


def collective_of(wait: fx.Node) -> fx.Node:
    """The collective that a wait ends."""
    return wait.all_input_nodes[0]


def cut_of(node: fx.Node, region: Region) -> Cut | None:
    """The cut of a value in a region, through ``getitem``."""
    return region.cuts.get(producer(node))


def grow_ahead(wait: fx.Node, cuts: Cuts, inner: int, until: fx.Node | None = None) -> Region:
    """All nodes that take the cut of a collective's result: not beyond products, or all that stand before ``until``."""
    region = Region(cuts.rows, ahead=wait, cuts={(wait, 0): Cut(0, 1, inner)})
    late = _segment(wait)
    for node in cuts.order.between(wait, until):
        if node.op != "call_function" or _segment(node) != late or _is_foreign(node):
            continue
        if node.target is operator.getitem:
            continue
        inputs = tensor_inputs(node)
        given = [cut_of(n, region) for n in inputs]
        if not any(given) or any(producer(n)[0] in region.sums for n in inputs):
            continue
        if until is None and any(producer(n)[0].target in HEAVY and producer(n)[0] in region.members for n in inputs):
            continue
        passage = cuts.forward(node, given)
        if passage is not None:
            _admit(region, node, passage)
    return region


def grow_behind(wait: fx.Node, cuts: Cuts, inner: int) -> Region | str:
    """The products that make a collective's operand row by row, and what lies between; a reason where there are none."""
    collective = collective_of(wait)
    root = tensor_inputs(collective)[0]
    region = Region(cuts.rows, behind=wait)
    wanted: dict[tuple[fx.Node, int], Cut] = {producer(root): Cut(0, 1, inner)}
    late = _segment(collective)
    for node in cuts.order.before(collective):
        outputs = [(key, cut) for key, cut in wanted.items() if key[0] is node]
        if not outputs or node.op != "call_function" or _is_foreign(node) or _segment(node) != late:
            continue
        (_, output), cut = outputs[0]
        passage = cuts.backward(node, output, cut)
        if passage is None or any(passage.outputs[key[1]] != other for key, other in outputs):
            continue
        _admit(region, node, passage)
        if node.target in HEAVY:
            continue
        for source, needed in zip(tensor_inputs(node), passage.inputs, strict=True):
            if needed is not None and wanted.setdefault(producer(source), needed) != needed:
                return f"{source.name} would be needed under two cuts"
    _keep_what_products_feed(region)
    if not region.heavy:
        return f"no product makes {root.name} in rows that the collective could take one by one"
    return region


def join(wait: fx.Node, behind: fx.Node, cuts: Cuts, inner: int, after: int) -> Region | None:
    """A region from one collective to another; None where the rows of the first do not become the rows of the second."""
    region = grow_ahead(wait, cuts, inner, behind)
    root = tensor_inputs(collective_of(behind))[0]
    if cut_of(root, region) != Cut(0, 1, after):
        return None
    region.behind = behind
    needed = {producer(root)[0]}
    for node in reversed(list(region.members)):
        if node in needed:
            needed.update(producer(source)[0] for source in tensor_inputs(node))
    _restrict(region, needed)
    return region if region.heavy else None


def keep_products(region: Region) -> None:
    """Of a region ahead, leave only what leads to a product."""
    needed: set[fx.Node] = set()
    for node in reversed(list(region.members)):
        if node.target in HEAVY or node in needed:
            needed.add(node)
            needed.update(producer(source)[0] for source in tensor_inputs(node))
    _restrict(region, needed)


def drop_side_paths(region: Region, order: Order) -> None:
    """Leave out members that read, by a way around, what the region itself makes; and their followers."""
    begin = region.ahead
    inside = set(region.members) | ({begin} if begin is not None else set())
    outside: set[fx.Node] = set()
    dropped: set[fx.Node] = set()
    for node in order.between(min(inside, key=order.position.__getitem__)):
        if node in inside:
            sources = {producer(s)[0] for s in tensor_inputs(node)}
            reads_around = any(s in outside or s in dropped for s in (*node.all_input_nodes, *sources))
            if reads_around and node is not begin:
                dropped.add(node)
                inside.discard(node)
                outside.add(node)
        elif any(s in inside or s in outside for s in node.all_input_nodes) and not _is_output_of(node, inside):
            outside.add(node)
    _restrict(region, set(region.members) - dropped)


def _is_output_of(node: fx.Node, inside: set[fx.Node]) -> bool:
    return node.target is operator.getitem and node.args[0] in inside


def _admit(region: Region, node: fx.Node, passage: Passage) -> None:
    region.members[node] = passage
    if passage.sums:
        region.sums.add(node)
    for index, cut in enumerate(passage.outputs):
        if cut is not None:
            region.cuts[node, index] = cut


def _restrict(region: Region, kept: set[fx.Node]) -> None:
    region.members = {node: passage for node, passage in region.members.items() if node in kept}
    region.sums &= set(region.members)
    region.cuts = {key: cut for key, cut in region.cuts.items() if key[0] in region.members or key[0] is region.ahead}


def _keep_what_products_feed(region: Region) -> None:
    """Of a region behind, leave only products and what follows them; the order of members becomes that of the graph."""
    region.members = dict(reversed(region.members.items()))
    fed: set[fx.Node] = set()
    for node in region.members:
        if node.target in HEAVY or any(producer(s)[0] in fed for s in tensor_inputs(node)):
            fed.add(node)
    _restrict(region, fed)


def _segment(node: fx.Node) -> bool:
    """Whether a node belongs to the forward: a loop must not span two segments."""
    found: Note = note(node)
    return found.phase is Phase.FORWARD


def _is_foreign(node: fx.Node) -> bool:
    """Collectives, waits and other loops are never inside."""
    return getattr(node.target, "namespace", "") in ("_c10d_functional", "hocket") or note(node).phase is Phase.OPTIMIZER


def granularities(value: fx.Node, parts: int) -> list[tuple[int, int]]:
    """(rows, inner) to try for a dimension 0 cut in ``parts`` chunks: row by row, else chunk by chunk."""
    length = shape_of(value)[0]
    return [(length, 1), (parts, length // parts)] if length > parts else [(length, 1)]
