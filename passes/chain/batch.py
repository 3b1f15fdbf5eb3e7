"""Some nodes of a body, evaluated for all steps of a chain at once, as nodes of the program.

Where the rows of the steps type (``rows``), the steps become rows: [T, B, ...] is read as [T B, ...] and every op runs once.
Otherwise the nodes are vectorised by ``vmap`` over the steps.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.fx as fx
from torch._subclasses import FakeTensorMode
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx.experimental.proxy_tensor import make_fx

from ...compiler.layout import Partial, Replicate, Shard
from ...compiler.program import NOTE, Note, note, output_node
from .rows import ROWS, WHOLE, any_rows, type_rows

aten = torch.ops.aten


@dataclass
class Inserter:
    """Adds calls to a program's graph before ``anchor``, each with its fake value and a note after that of ``like`` (or the
    anchor)."""

    graph: fx.Graph
    anchor: fx.Node
    by: str
    like: fx.Node | None = None

    @property
    def mode(self) -> FakeTensorMode:
        """The mode of the program's fake values."""
        for node in self.graph.nodes:
            value = node.meta.get("val")
            if isinstance(value, FakeTensor):
                return value.fake_mode
        return FakeTensorMode(allow_non_fake_inputs=True)

    def call(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        """One call."""
        with self.graph.inserting_before(self.anchor):
            node = self.graph.call_function(target, args, kwargs)
        values, named = fx.node.map_arg((args, kwargs), lambda n: n.meta["val"])
        with self.mode, torch.no_grad():
            node.meta["val"] = target(*values, **named)
        base = note(self.like or self.anchor)
        node.meta[NOTE] = replace(Note(), phase=base.phase, source=base.source, module=base.module, added_by=self.by)
        return node


def invariant(nodes: Sequence[fx.Node], env: dict[fx.Node, fx.Node], inserter: Inserter) -> None:
    """Evaluate nodes that are the same in every step. env: body node -> program node, completed."""
    for node in nodes:
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: env[n])
        env[node] = inserter.call(node.target, *args, **kwargs)


@dataclass
class Stepwise:
    """What is known of all steps. values: body node -> program node [T, *shape]; shared: body node -> program node, the same in
    every step; count: T; rows: of one step, None where its inputs have none."""

    values: dict[fx.Node, fx.Node]
    shared: Mapping[fx.Node, fx.Node]
    count: int
    rows: int | None


def batched(
    nodes: Sequence[fx.Node], wanted: Sequence[fx.Node], sums: Sequence[fx.Node], known: Stepwise, inserter: Inserter
) -> tuple[list[fx.Node], list[fx.Node]]:
    """Evaluate ``nodes`` for all steps. Returns the ``wanted`` ones as [T, *shape] and the ``sums`` added up over the steps."""
    if known.rows is not None:
        starts: dict[fx.Node, Any] = dict.fromkeys(known.shared, WHOLE)
        starts |= {node: ROWS for node in known.values if _has_rows(node, known.rows)}
        typed = type_rows(nodes, starts)
        good = all(node in typed for node in (*nodes, *wanted, *sums)) and all(typed[n] in (ROWS, WHOLE) for n in wanted)
        good = good and all(typed[n] == ROWS or isinstance(typed[n], Partial | Replicate) for n in sums)
        if good:
            return _folded(nodes, wanted, sums, known, inserter, typed)
    return _vectorised(nodes, wanted, sums, known, inserter)


def _has_rows(node: fx.Node, rows: int) -> bool:
    value = node.meta["val"]
    return bool(value.dim() > 0 and value.shape[0] == rows)


def _folded(
    nodes: Sequence[fx.Node],
    wanted: Sequence[fx.Node],
    sums: Sequence[fx.Node],
    known: Stepwise,
    inserter: Inserter,
    typed: Mapping[fx.Node, Any],
) -> tuple[list[fx.Node], list[fx.Node]]:
    env: dict[fx.Node, fx.Node] = dict(known.shared)
    used = {source for node in nodes for source in node.all_input_nodes}
    assert known.rows is not None
    for node, value in known.values.items():
        if node in used and node not in env:
            sizes = list(node.meta["val"].shape)
            env[node] = inserter.call(aten.reshape.default, value, [known.count * known.rows, *sizes[1:]])
    for node in nodes:
        args, kwargs = fx.node.map_arg((any_rows(node, typed[node]), node.kwargs), lambda n: env[n])
        env[node] = inserter.call(node.target, *args, **kwargs)

    def by_step(node: fx.Node) -> fx.Node:
        if node in known.values:
            return known.values[node]
        sizes = list(node.meta["val"].shape)
        if isinstance(typed[node], Shard):
            return inserter.call(aten.reshape.default, env[node], [known.count, *sizes])
        return inserter.call(aten.expand.default, env[node], [known.count, *sizes])

    def total(node: fx.Node) -> fx.Node:
        if isinstance(typed[node], Partial):
            return env[node]
        if isinstance(typed[node], Replicate):
            return inserter.call(aten.mul.Tensor, env[node], known.count)
        return inserter.call(aten.sum.dim_IntList, by_step(node), [0])

    return [by_step(node) for node in wanted], [total(node) for node in sums]


def _vectorised(
    nodes: Sequence[fx.Node], wanted: Sequence[fx.Node], sums: Sequence[fx.Node], known: Stepwise, inserter: Inserter
) -> tuple[list[fx.Node], list[fx.Node]]:
    computed = set(nodes)
    varying = [n for n in known.values if n in set(wanted) | set(sums) or any(user in computed for user in n.users)]
    fixed = [n for n in known.shared if n in set(wanted) | set(sums) or any(user in computed for user in n.users)]
    results = [*wanted, *sums]

    def one(slices: list[Any], constants: list[Any]) -> list[Any]:
        env: dict[fx.Node, Any] = dict(zip((*varying, *fixed), (*slices, *constants), strict=True))
        for node in nodes:
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: env[n])
            env[node] = node.target(*args, **kwargs)  # type: ignore[operator]
        return [env[node] for node in results]

    over_steps: Callable[..., Any] = torch.func.vmap(one, in_dims=(0, None))
    given = [[known.values[n] for n in varying], [known.shared[n] for n in fixed]]
    with inserter.mode, torch.no_grad():
        examples = [[torch.empty_like(n.meta["val"]) for n in group] for group in given]
        traced = make_fx(over_steps)(*examples)
    made = inline(traced, [*given[0], *given[1]], inserter)
    parts = made[len(wanted) :]
    return made[: len(wanted)], [inserter.call(aten.sum.dim_IntList, part, [0]) for part in parts]


def inline(traced: fx.GraphModule, inputs: Sequence[fx.Node], inserter: Inserter) -> list[fx.Node]:
    """The calls of a traced function as nodes of the program; the nodes of its results."""
    env: dict[fx.Node, fx.Node] = {}
    given = iter(inputs)
    for node in traced.graph.nodes:
        if node.op == "placeholder":
            env[node] = next(given)
        elif node.op == "call_function" and node.target in (aten.detach.default, aten.alias.default):
            env[node] = env[node.args[0]]
        elif node.op == "call_function":
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: env[n])
            env[node] = inserter.call(node.target, *args, **kwargs)
    found = output_node(traced.graph).args[0]
    results = found if isinstance(found, (tuple, list)) else (found,)
    return [env[node] for node in results]  # type: ignore[index]


def depends_on(nodes: Sequence[fx.Node], roots: Sequence[fx.Node]) -> set[fx.Node]:
    """The nodes that some roots reach, the roots included."""
    found = set(roots)
    for node in nodes:
        if any(source in found for source in node.all_input_nodes):
            found.add(node)
    return found
