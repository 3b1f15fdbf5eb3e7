"""Split a chain into what must be done step by step and what need not be.

before   nodes that see no carry                       done for all steps at once, ahead of the chain
chain    what the next carries need, and only that
after    what only emits need                          done for all steps at once, from the states
sums     a carry that is only added to, c' = c + v     v is an emit; the sum over the steps is taken after the chain

c W + b + u  ->  (b + u) + c W        so that a step is one product and its bias joins the stream
"""

from __future__ import annotations

import operator
from dataclasses import dataclass, field
from typing import Any, cast

import torch
import torch.fx as fx

from ...compiler.chains.bodies import BodyGraph, How, body_graph, chain_op, read_body, read_how
from ...compiler.program import ancestors
from .batch import Inserter, Stepwise, batched, depends_on, invariant
from .parts import Parts
from .pieces import join_pieces
from .rows import ROWS, WHOLE, any_rows, type_rows

aten = torch.ops.aten


@dataclass
class ChainNode:
    """A chain in a program. uses: index of a result -> the getitem nodes that read it."""

    node: fx.Node
    body: BodyGraph
    init: list[fx.Node]
    shared: list[fx.Node]
    streams: list[fx.Node]
    count: int
    how: How
    uses: dict[int, list[fx.Node]] = field(default_factory=dict)

    @classmethod
    def of(cls, node: fx.Node, inserter: Inserter) -> ChainNode:
        """The chain that a node of a program is."""
        init, shared, streams, count, text, how = cast(Any, node.args)
        with inserter.mode:
            slices = [s.meta["val"].new_empty(s.meta["val"].shape[1:]) for s in streams]
        examples = [*[n.meta["val"] for n in (*init, *shared)], *slices]
        body = body_graph(read_body(text), examples, inserter.mode)
        uses: dict[int, list[fx.Node]] = {}
        for user in node.users:
            uses.setdefault(int(cast(int, user.args[1])), []).append(user)
        return cls(node, body, list(init), list(shared), list(streams), count, read_how(how), uses)


@dataclass
class Split:
    """A chain after splitting. node: the new chain; replaced: result index of the old one -> node that has its value; hoisted:
    ops that left the chain; kept: ops of a step; summed: carries that became sums."""

    node: fx.Node
    body: BodyGraph
    replaced: dict[int, fx.Node]
    hoisted: int
    kept: int
    summed: int
    rows: bool


def split(chain: ChainNode, how: How, inserter: Inserter) -> Split:
    """Write the split chain in front of the old one, whose uses are still to be replaced."""
    body = chain.body
    join_pieces(body)
    merge_biases(body)
    parts = Parts(body, [i for i in range(len(body.emits)) if body.carries + i in chain.uses])
    env: dict[fx.Node, fx.Node] = dict(zip(body.placeholders, (*chain.init, *chain.shared, *chain.streams), strict=True))
    shared = {node: env[node] for node in body.shared_inputs}
    invariant(parts.fixed, shared, inserter)
    rows = _rows_of(body)
    values = {node: env[node] for node in body.stream_inputs}
    ahead = Stepwise(dict(values), shared, chain.count, rows)
    made, _ = batched(parts.ahead, parts.ahead_wanted, [], ahead, inserter)
    values.update(zip(parts.ahead_wanted, made, strict=True))
    return _Builder(chain, parts, Stepwise(values, shared, chain.count, rows), inserter).write(how)


def merge_biases(body: BodyGraph) -> None:
    """c W + b + u -> (b + u) + c W, and c W + u likewise, for u and b that see no carry."""
    carried = depends_on(body.calls, body.carry_inputs)
    for node in body.calls:
        if node.target is not aten.add.Tensor or len(node.args) != 2 or node.kwargs:
            continue
        for product, more in (node.args, node.args[::-1]):
            if not isinstance(product, fx.Node) or not isinstance(more, fx.Node) or more in carried or len(product.users) != 1:
                continue
            same = more.meta["val"].shape == product.meta["val"].shape and more.meta["val"].dtype == product.meta["val"].dtype
            if not same or product not in carried or not _absorb(body.graph, node, product, more, carried):
                continue
            break


def _absorb(graph: fx.Graph, node: fx.Node, product: fx.Node, more: fx.Node, carried: set[fx.Node]) -> bool:
    if product.target is aten.mm.default:
        bias: Any = more
        factors = product.args
    elif product.target is aten.addmm.default and not product.kwargs and product.args[0] not in carried:
        with graph.inserting_before(product):
            bias = graph.call_function(aten.add.Tensor, (more, product.args[0]))
        bias.meta["val"] = node.meta["val"]
        factors = product.args[1:]
    else:
        return False
    with graph.inserting_before(node):
        merged = graph.call_function(aten.addmm.default, (bias, *factors))
    merged.meta = dict(node.meta)
    if more.op == "call_function":
        order = {n: i for i, n in enumerate(graph.nodes)}
        if bias is not more and order[more] > order[bias]:
            more.append(bias)
    node.replace_all_uses_with(merged)
    graph.erase_node(node)
    graph.erase_node(product)
    return True


def _rows_of(body: BodyGraph) -> int | None:
    """Rows of a step: dimension 0 of the first carry."""
    first = body.carry_inputs[0].meta["val"]
    return int(first.shape[0]) if first.dim() > 0 else None


class _Builder:
    """Writes the split chain. values: body node -> program node [T, *shape], completed as they become known."""

    def __init__(self, chain: ChainNode, parts: Parts, stepwise: Stepwise, inserter: Inserter) -> None:
        self.chain, self.parts, self.inserter = chain, parts, inserter
        self.body = chain.body
        self.known = stepwise
        read = {s for n in parts.step for s in n.all_input_nodes} | {self.body.following[i] for i in parts.real}
        self.shared = [n for n in stepwise.shared if n in read]
        self.streams = [n for n in stepwise.values if n in read]
        borders = {s for n in parts.after for s in n.all_input_nodes} | {self.body.emits[i] for i in parts.read}
        borders |= set(parts.ends)
        self.before = [i for i in parts.real if self.body.carry_inputs[i] in borders]
        given = [n for n in parts.step if n in borders and isinstance(n.meta["val"], torch.Tensor)]
        self.emits = given + [n for n in dict.fromkeys(self.body.following[i] for i in self.before) if n not in given]

    def recurrence(self) -> BodyGraph:
        """The body of the new chain."""
        graph, parts = fx.Graph(), self.parts
        typed = self._typed()
        env: dict[fx.Node, fx.Node] = {}
        for source in (*[self.body.carry_inputs[i] for i in parts.real], *self.shared, *self.streams):
            env[source] = graph.placeholder(source.name)
            env[source].meta["val"] = source.meta["val"]
        for node in parts.step:
            args = node.args if typed is None else any_rows(node, typed[node])
            args, kwargs = fx.node.map_arg((args, node.kwargs), lambda n: env[n])
            env[node] = graph.call_function(node.target, args, kwargs)  # type: ignore[arg-type]
            env[node].meta = dict(node.meta)
        graph.output((tuple(env[self.body.following[i]] for i in parts.real), tuple(env[n] for n in self.emits)))
        return BodyGraph(graph, len(parts.real), len(self.shared), rows=typed is not None)

    def _typed(self) -> dict[fx.Node, Any] | None:
        """How the rows lie in the step; None unless all of it is row by row."""
        rows = self.known.rows
        carries = [self.body.carry_inputs[i] for i in self.parts.real]
        ins = [*carries, *self.streams]
        if rows is None or any(n.meta["val"].dim() == 0 or n.meta["val"].shape[0] != rows for n in ins):
            return None
        typed = type_rows(self.parts.step, {**dict.fromkeys(self.shared, WHOLE), **dict.fromkeys(ins, ROWS)})
        outs = [*[self.body.following[i] for i in self.parts.real], *self.emits]
        good = all(n in typed for n in self.parts.step) and all(typed.get(n) == ROWS for n in outs)
        return typed if good else None

    def write(self, how: How) -> Split:
        """The new chain and all that follows it."""
        parts, call = self.parts, self.inserter.call
        small = self.recurrence()
        init = [self.chain.init[i] for i in parts.real]
        shared, streams = [self.known.shared[n] for n in self.shared], [self.known.values[n] for n in self.streams]
        node = call(chain_op(), init, shared, streams, self.chain.count, small.data().to_json(), how.to_json())
        for k, source in enumerate(self.emits):
            self.known.values[source] = call(operator.getitem, node, len(init) + k)
        for i in self.before:
            self.known.values[self.body.carry_inputs[i]] = self._states_before(i)
        emitted = [self.body.emits[i] for i in parts.read]
        late = [n for n in dict.fromkeys(emitted) if n in parts.after]
        made, totals = self._after(late, list(parts.summed.values()), self.known)
        self.known.values.update(zip(late, made, strict=True))
        replaced = {self.body.carries + i: self._by_step(self.body.emits[i]) for i in parts.read}
        for k, i in enumerate(parts.real):
            if i in self.chain.uses:
                replaced[i] = call(operator.getitem, node, k)
        for i, total in zip(parts.summed, totals, strict=True):
            if i in self.chain.uses:
                replaced[i] = call(aten.add.Tensor, self.chain.init[i], total)
        replaced |= self._delayed()
        hoisted = len(parts.fixed) + len(parts.ahead) + len(parts.after)
        return Split(node, small, replaced, hoisted, len(parts.step), len(parts.summed) + len(parts.late), small.rows)

    def _after(self, wanted: list[fx.Node], sums: list[fx.Node], known: Stepwise) -> tuple[list[fx.Node], list[fx.Node]]:
        needed = ancestors([*wanted, *sums])
        return batched([n for n in self.parts.after if n in needed], wanted, sums, known, self.inserter)

    def _delayed(self) -> dict[int, fx.Node]:
        """The final values of delayed sums, and of the carries that they read."""
        call, chain, late, replaced = self.inserter.call, self.chain, self.parts.late, {}
        if chain.count > 1:
            _, totals = self._after([], [one.added for one in late.values()], self._part(0, chain.count - 1))
        for k, (i, one) in enumerate(late.items()):
            env = {**self.known.shared, self.body.carry_inputs[one.carry]: chain.init[one.carry]}
            invariant(one.start, env, self.inserter)
            total = call(aten.add.Tensor, chain.init[i], env[one.value])
            replaced[i] = call(aten.add.Tensor, total, totals[k]) if chain.count > 1 else total
        _, lasts = self._after([], self.parts.lasts, self._part(chain.count - 1, chain.count))
        return replaced | dict(zip(self.parts.delayed, lasts, strict=True))

    def _part(self, start: int, stop: int) -> Stepwise:
        """What is known of some of the steps."""
        ends = ancestors(self.parts.lasts + [one.added for one in self.parts.late.values()])
        used = {source for n in self.parts.after if n in ends for source in n.all_input_nodes} | ends
        call = self.inserter.call
        values = {n: call(aten.slice.Tensor, v, 0, start, stop) for n, v in self.known.values.items() if n in used}
        return Stepwise(values, self.known.shared, stop - start, self.known.rows)

    def _states_before(self, i: int) -> fx.Node:
        """[T, *shape]: the carry as each step finds it."""
        call, states, first = self.inserter.call, self.known.values[self.body.following[i]], self.chain.init[i]
        start = call(aten.unsqueeze.default, first, 0)
        if self.chain.count == 1:
            return start
        return call(aten.cat.default, [start, call(aten.slice.Tensor, states, 0, 0, self.chain.count - 1)])

    def _by_step(self, emit: fx.Node) -> fx.Node:
        if emit in self.known.values:
            return self.known.values[emit]
        sizes = [self.chain.count, *emit.meta["val"].shape]
        return self.inserter.call(aten.expand.default, self.known.shared[emit], sizes)
