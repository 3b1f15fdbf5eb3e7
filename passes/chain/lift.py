"""Lift a found chain into one ``hocket::chain`` node.

x[0], x[1], ... of one source  ->  the source itself (a slice of it, or its reverse)      no stacking of what was one tensor
stack(y[0], y[1], ...)         ->  the chain's own result
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
import torch.fx as fx

from ...compiler.chains.bodies import BodyGraph, How, chain_op
from ...compiler.program import ancestors
from .batch import Inserter
from .find import Found

aten = torch.ops.aten
LOOP = How("sequential").to_json()


def lift(graph: fx.Graph, chain: Found, by: str) -> tuple[fx.Node, dict[fx.Node, fx.Node]]:
    """Replace a chain by one node, which means the loop. Returns it, and what stands for each value that was used outside."""
    inserter = Inserter(graph, _ready(graph, chain), by, chain.nodes[0])
    given = [_stream(column, inserter) for column in chain.streams]
    given += [_counted(chain, offset, inserter) for offset in chain.moving]
    same = list(dict.fromkeys(node for kind, node in chain.slots if kind == "same"))
    body, emits = _body(chain, same)
    init = [chain.inits[key] for key in chain.carries]
    node = inserter.call(chain_op(), init, same, given, chain.count, body.data().to_json(), LOOP)
    replacer = _Replacer(chain, node, inserter)
    for offset, index in emits.items():
        replacer.replace(offset, index)
    for old in (*replacer.dead, *reversed(chain.nodes)):
        graph.erase_node(old)
    return node, replacer.stands_for


def _ready(graph: fx.Graph, chain: Found) -> fx.Node:
    """The first place at which all inputs exist: nodes that only feed the chain are moved ahead of its first use."""
    inside = set(chain.nodes)
    inputs = {n for column in chain.streams for n in column} | set(chain.inits.values())
    inputs |= {n for kind, n in chain.slots if kind == "same"}
    place = {node: i for i, node in enumerate(graph.nodes)}
    users = [u for n in chain.nodes for u in n.users if u not in inside]
    first = min(users, key=lambda n: place[n], default=None)
    target = chain.nodes[-1].next if first is None else first
    late = [n for n in ancestors(inputs) if place[n] > place[target]]
    for node in sorted(late, key=lambda n: place[n]):
        target.prepend(node)
    return target


def _body(chain: Found, same: Sequence[fx.Node]) -> tuple[BodyGraph, dict[int, int]]:
    """One step as a body, and offset of a node that is used outside -> which emit it is."""
    graph = fx.Graph()
    carries = {key: _input(graph, f"carry_{i}", chain.inits[key]) for i, key in enumerate(chain.carries)}
    shared = {node: _input(graph, f"shared_{i}", node) for i, node in enumerate(same)}
    slices = [_input(graph, f"slice_{i}", column[0]) for i, column in enumerate(chain.streams)]
    ticks = {offset: _tick(graph, chain.nodes[offset]) for offset in chain.moving}
    made: list[fx.Node] = []
    slots = iter(chain.slots)

    def source() -> fx.Node:
        kind, where = next(slots)
        match kind:
            case "in":
                return made[where]
            case "carry":
                return carries[where]
            case "same":
                return shared[where]
        return slices[where]

    for offset, old in enumerate(chain.nodes[: chain.period]):
        args, kwargs = _refilled((old.args, old.kwargs), source)
        if offset in ticks:
            made.append(_at_tick(graph, old, args, ticks[offset]))
            continue
        made.append(graph.call_function(old.target, args, kwargs))  # type: ignore[arg-type]
        made[-1].meta = dict(old.meta)
    inside = set(chain.nodes)
    used = {i % chain.period for i, node in enumerate(chain.nodes) if any(user not in inside for user in node.users)}
    emits = {offset: i for i, offset in enumerate(sorted(used))}
    following = [made[offset] if distance == 1 else carries[offset, distance - 1] for offset, distance in chain.carries]
    graph.output((tuple(following), tuple(made[offset] for offset in emits)))
    return BodyGraph(graph, len(carries), len(shared)), emits


def _input(graph: fx.Graph, name: str, like: fx.Node) -> fx.Node:
    node = graph.placeholder(name)
    node.meta["val"] = like.meta["val"]
    return node


def _tick(graph: fx.Graph, node: fx.Node) -> fx.Node:
    """The integer that moves, as an input of the step: of shape [1] where it is an index, of [] where it is an operand."""
    tick = graph.placeholder(f"tick_{node.name}")
    tick.meta["val"] = node.meta["val"].new_empty([1] if node.target is aten.select.int else [], dtype=torch.int64)
    return tick


def _counted(chain: Found, offset: int, inserter: Inserter) -> fx.Node:
    """Its values in all steps."""
    (first, step), node = chain.moving[offset], chain.nodes[offset]
    device = node.meta["val"].device
    steps = inserter.call(aten.arange.default, chain.count, dtype=torch.int64, device=device, pin_memory=False)
    values = inserter.call(aten.add.Tensor, inserter.call(aten.mul.Tensor, steps, step), first)
    return inserter.call(aten.unsqueeze.default, values, 1) if node.target is aten.select.int else values


def _at_tick(graph: fx.Graph, old: fx.Node, args: Any, tick: fx.Node) -> fx.Node:
    """x[.., i, ..] -> squeeze(index_select(x, [i]));   x + i -> x + i, with i a tensor."""
    if old.target is not aten.select.int:
        made = graph.call_function(old.target, (args[0], tick))  # type: ignore[arg-type]
    else:
        source, dim = args[0], args[1]
        rows = graph.call_function(aten.index_select.default, (source, dim, tick))
        value = old.meta["val"]
        sizes = list(value.shape)
        at = dim % (len(sizes) + 1)
        rows.meta = {**old.meta, "val": value.new_empty([*sizes[:at], 1, *sizes[at:]])}
        made = graph.call_function(aten.squeeze.dim, (rows, dim))
    made.meta = dict(old.meta)
    return made


def _refilled(value: Any, source: Any) -> Any:
    """The same nest with every node replaced by the next source, in order."""
    if isinstance(value, fx.Node):
        return source()
    if isinstance(value, (tuple, list)):
        return tuple(_refilled(item, source) for item in value)
    if isinstance(value, dict):
        return {key: _refilled(item, source) for key, item in value.items()}
    return value


def _position(node: fx.Node) -> tuple[fx.Node, int] | None:
    """(source, index) where a node is one slice of another along dimension 0."""
    if node.target is aten.select.int and node.args[1] == 0:
        source, index = node.args[0], node.args[2]
    elif node.target is operator.getitem and getattr(node.args[0], "target", None) is aten.unbind.int:
        unbound, index = node.args
        source = unbound.args[0]  # type: ignore[union-attr]
        if len(unbound.args) > 1 and unbound.args[1] != 0:  # type: ignore[union-attr]
            return None
    else:
        return None
    assert isinstance(source, fx.Node)
    assert isinstance(index, int)
    return source, index + (source.meta["val"].shape[0] if index < 0 else 0)


def _stream(column: Sequence[fx.Node], inserter: Inserter) -> fx.Node:
    """[count, *shape] from the values of all steps."""
    places = [_position(node) for node in column]
    first = places[0]
    if first is not None and all(p is not None and p[0] is first[0] for p in places):
        source, start = first
        indices = [p[1] for p in places if p is not None]
        length = source.meta["val"].shape[0]
        if indices == list(range(start, start + len(column))):
            return source if len(column) == length else inserter.call(aten.slice.Tensor, source, 0, start, start + len(column))
        if indices == list(range(start, start - len(column), -1)):
            low = start - len(column) + 1
            part = source if len(column) == length else inserter.call(aten.slice.Tensor, source, 0, low, start + 1)
            return inserter.call(aten.flip.default, part, [0])
    return inserter.call(aten.stack.default, list(column))


class _Replacer:
    """Gives the users of a chain's values the results of its node. dead: nodes that nothing reads any more."""

    def __init__(self, chain: Found, node: fx.Node, inserter: Inserter) -> None:
        self.chain, self.node, self.call = chain, node, inserter.call
        self.inside = set(chain.nodes)
        self.dead: list[fx.Node] = []
        self.stands_for: dict[fx.Node, fx.Node] = {}

    def replace(self, offset: int, emit: int) -> None:
        """Every use of what is made at ``offset`` of a step."""
        chain = self.chain
        column = [chain.nodes[k * chain.period + offset] for k in range(chain.count)]
        if [k for k, old in enumerate(column) if self._is_used(old)] == [chain.count - 1] and (offset, 1) in chain.inits:
            self._stand(column[-1], self.call(operator.getitem, self.node, chain.carries.index((offset, 1))))
            return
        whole = self.call(operator.getitem, self.node, len(chain.carries) + emit)
        self._stacks(column, whole)
        for k, old in enumerate(column):
            if self._is_used(old):
                self._stand(old, self.call(aten.select.int, whole, 0, k))

    def _is_used(self, node: fx.Node) -> bool:
        return any(user not in self.inside for user in node.users)

    def _stand(self, old: fx.Node, new: fx.Node) -> None:
        old.replace_all_uses_with(new, delete_user_cb=lambda user: user not in self.inside)
        self.stands_for[old] = new

    def _stacks(self, column: list[fx.Node], whole: fx.Node) -> None:
        """stack(y[0], ..., y[T-1]) is the whole; reversed, its flip; along another dimension, a permutation."""
        for user in [u for u in column[0].users if u not in self.inside and u.target is aten.stack.default]:
            stacked: Any = user.args[0]
            dims = user.meta["val"].dim()
            dim = int(user.args[1]) % dims if len(user.args) > 1 else 0  # type: ignore[arg-type]
            if list(stacked) not in (column, column[::-1]):
                continue
            value = whole if list(stacked) == column else self.call(aten.flip.default, whole, [0])
            if dim:
                value = self.call(aten.permute.default, value, [*range(1, dim + 1), 0, *range(dim + 1, dims)])
            self._stand(user, value)
            self.inside.add(user)
            self.dead.append(user)
