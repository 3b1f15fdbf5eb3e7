"""From a region of nodes to a tile loop, and from the graph to one in which the loop stands for the region."""

from __future__ import annotations

import heapq
import itertools
import operator
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch.fx as fx

from ...compiler.program import annotate, note, producer, tensor_inputs, tensor_leaves
from ...compiler.rules.localise import localise, names_sizes
from ...compiler.tiles import Call, Cut, Read, Result, TileLoop, check_tile_loop, encode_constant, tile_loop_op
from .cuts import Passage
from .regions import AHEAD, BEHIND, Region, collective_of, cut_of


@dataclass
class Built:
    """A loop with the nodes around it. operands: what it reads; values: the node each result replaces."""

    loop: TileLoop
    operands: list[fx.Node]
    values: list[fx.Node]


@dataclass
class _Builder:
    region: Region
    parts: int
    axis: str
    sizes: list[int] = field(default_factory=list)
    reads: dict[tuple[fx.Node, Read], int] = field(default_factory=dict)
    slots: dict[fx.Node, int] = field(default_factory=dict)
    calls: list[Call] = field(default_factory=list)
    count: int = 0

    def read(self, node: fx.Node, cut: Cut | None, kind: str = "") -> int:
        """The operand slot of a value from outside, read in this way."""
        how = Read(kind or ("whole" if cut is None else "tiled"), cut)
        if (node, how) not in self.reads:
            self.reads[node, how] = len(self.reads)
        return self.reads[node, how]

    def number(self, value: int) -> dict[str, int]:
        """An integer of the region."""
        self.sizes.append(value)  # equal ones too: which are equal depends on the sizes, and the text must not
        return {"n": len(self.sizes) - 1}

    def tiled_size(self, cut: Cut) -> dict[str, list[int]]:
        """The size of a cut dimension of a tile."""
        return {"tile": [self.number(cut.outer)["n"], self.number(cut.inner)["n"]]}

    def template(self, argument: Any, slots: dict[fx.Node, int]) -> Any:
        """An argument as data."""
        if isinstance(argument, fx.Node):
            return {"slot": slots[argument]}
        if isinstance(argument, (list, tuple)):
            return [self.template(item, slots) for item in argument]
        if isinstance(argument, dict):
            return argument
        if isinstance(argument, int) and not isinstance(argument, bool):
            return self.number(argument)
        return encode_constant(argument)

    def call(self, node: fx.Node, passage: Passage) -> None:
        """One member."""
        slots: dict[fx.Node, int] = {}
        for source, cut in zip(tensor_inputs(node), passage.inputs, strict=True):
            slot = self.slots.get(source)
            slots[source] = self.read(source, cut) if slot is None else slot
        target: Any = node.target
        args, kwargs = node.args, dict(node.kwargs)
        cut = passage.outputs[0]
        if names_sizes(target) and cut is not None:
            size: list[Any] = [self.number(n) for n in tensor_leaves(node.meta["val"])[0].shape]
            size[cut.dim] = self.tiled_size(cut)
            target, args, kwargs = localise(target, args, kwargs, size)
        leaves = tensor_leaves(node.meta["val"])
        spread = isinstance(node.meta["val"], (tuple, list))
        outputs = []
        for index, _ in enumerate(leaves):
            used = not spread or any(user.target is operator.getitem and user.args[1] == index for user in node.users)
            outputs.append(self.count if used else -1)
            self.count += used
        op = f"{target.namespace}.{target._schema.name.split('::')[1]}.{target._overloadname}"
        written = [self.template(arg, slots) for arg in args]
        self.calls.append(Call(op, written, {k: self.template(v, slots) for k, v in kwargs.items()}, tuple(outputs), spread))
        if not spread:
            self.slots[node] = outputs[0]
        for user in node.users:
            if spread and user.target is operator.getitem:
                self.slots[user] = outputs[user.args[1]]  # type: ignore[index]


def build(region: Region, parts: int, axis: str) -> Built | str:
    """The loop of a region, one tile a chunk, or why there can be none."""
    clash = _clash(region)
    if clash:
        return clash
    builder = _Builder(region, parts, axis)
    if region.ahead is not None:
        collective = collective_of(region.ahead)
        operand, ahead = tensor_inputs(collective)[0], region.cuts[region.ahead, 0]
        builder.slots[region.ahead] = builder.read(operand, ahead, AHEAD[collective.target])
    for node, passage in region.members.items():  # operands have the first slots
        for source, cut in zip(tensor_inputs(node), passage.inputs, strict=True):
            if producer(source)[0] not in region.members and source is not region.ahead:
                builder.read(source, cut)
    builder.count = len(builder.reads)
    for node, passage in region.members.items():
        builder.call(node, passage)
    results, values = _results(builder)
    kinds = tuple(how for _, how in builder.reads)
    loop = TileLoop(axis, parts, region.rows, 1, tuple(builder.sizes), kinds, tuple(builder.calls), results)
    check_tile_loop(loop)
    return Built(loop, [node for node, _ in builder.reads], values)


def _clash(region: Region) -> str:
    """A value of the region that is read both whole and in tiles, or added up and read."""
    for node, passage in region.members.items():
        seen: dict[fx.Node, Cut | None] = {}
        for source, wanted in zip(tensor_inputs(node), passage.inputs, strict=True):
            inside = producer(source)[0] in region.members or source is region.ahead
            if inside and cut_of(source, region) != wanted:
                return f"{node.name} needs the whole of {source.name}, of which a tile is there"
            if seen.setdefault(source, wanted) != wanted:
                return f"{node.name} reads {source.name} in two ways"
    return ""


def _results(builder: _Builder) -> tuple[tuple[Result, ...], list[fx.Node]]:
    """Everything that somebody outside reads; the collective's first."""
    region = builder.region
    found: list[Result] = []
    values: list[fx.Node] = []
    inside = set(region.members)
    if region.behind is not None:
        collective = collective_of(region.behind)
        root = tensor_inputs(collective)[0]
        inside.add(collective)
        kind = BEHIND[collective.target]
        operation = str(collective.args[1]) if kind != "all_to_all" else ""
        found.append(Result(kind, builder.slots[root], cut_of(root, region), operation))
        values.append(region.behind)
    for value, slot in builder.slots.items():
        if all(user in inside or user in builder.slots for user in value.users):
            continue
        cut = cut_of(value, region)
        found.append(Result("sum" if producer(value)[0] in region.sums else "map", slot, cut))
        values.append(value)
    return tuple(found), values


def insert(graph: fx.Graph, region: Region, built: Built) -> fx.Node:
    """Put the loop into the graph in place of the region."""
    last = region.behind or list(region.members)[-1]
    with graph.inserting_after(last):
        node = graph.call_function(tile_loop_op(), (list(built.operands), *built.loop.words()))
    node.meta["val"] = tuple(value.meta["val"] for value in built.values)
    node.meta["hocket"] = note(last)
    annotate(
        node,
        layouts=tuple((note(value).layouts or (None,))[0] for value in built.values),
        global_shapes=tuple((note(value).global_shapes or (None,))[0] for value in built.values),
        added_by="tiles",
        origin="",
        carries="",
    )
    anchor, made = node, []
    for index, value in enumerate(built.values):
        with graph.inserting_after(anchor):
            anchor = graph.call_function(operator.getitem, (node, index))
        anchor.meta.update(value.meta)
        made.append(anchor)
    for value, new in zip(built.values, made, strict=True):
        value.replace_all_uses_with(new, delete_user_cb=lambda user: not _inside(user, region), propagate_meta=False)
    _remove(graph, region)
    sort(graph)
    return node


def _inside(user: fx.Node, region: Region) -> bool:
    if user.target is operator.getitem and user.args[0] in region.members:
        return True
    behind = None if region.behind is None else collective_of(region.behind)
    return user in region.members or user is behind


def _remove(graph: fx.Graph, region: Region) -> None:
    dead = [] if region.behind is None else [region.behind, collective_of(region.behind)]
    for member in reversed(list(region.members)):
        dead += [user for user in member.users if user.target is operator.getitem and user not in dead]
        dead.append(member)
    if region.ahead is not None:
        dead += [region.ahead, collective_of(region.ahead)]
    for node in dead:
        if not node.users:
            graph.erase_node(node)


def sort(graph: fx.Graph) -> None:
    """Bring the nodes into an order in which everything is made before it is read, as near to the present one as can be."""
    nodes: Sequence[fx.Node] = list(graph.nodes)
    position = {node: i for i, node in enumerate(nodes)}
    missing = {node: len(set(node.all_input_nodes)) for node in nodes}
    ready = [position[node] for node in nodes if not missing[node]]
    heapq.heapify(ready)
    order = []
    while ready:
        node = nodes[heapq.heappop(ready)]
        order.append(node)
        for user in node.users:
            missing[user] -= 1
            if not missing[user]:
                heapq.heappush(ready, position[user])
    if len(order) != len(nodes):
        raise AssertionError("a tile loop would read what it makes")
    for before, after in itertools.pairwise(order):
        if before.next is not after:
            before.append(after)
