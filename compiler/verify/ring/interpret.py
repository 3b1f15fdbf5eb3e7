"""Evaluate a program over a ring, on one rank or on all ranks of a mesh in lockstep.

In lockstep every node is run for all ranks before the next one, so a collective simply sees the values of its group. Ranks whose
arguments are the same objects (everything downstream of an all-gather, say) share one evaluation.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.fx as fx

from ....runtime.mesh import Mesh
from ...errors import CollectiveMismatch, InputError, UnsupportedError, VerificationError
from ...layout import coordinate
from ...program import note, output_node
from .algebra import Algebra
from .collectives import Meeting, run_collective
from .evaluate import apply
from .value import Value

Extension = Callable[[Algebra, fx.Node, list[tuple[Any, ...]], Mesh], list[Value]]
"""Meaning of an op that joins ranks and that the interpreter does not know (point-to-point): arguments to results, per rank."""

_KERNEL_ERRORS = (RuntimeError, IndexError, ValueError, TypeError, AttributeError, AssertionError)

Watch = Callable[[fx.Node, list[Value]], None]
"""Called with every node and its value on each rank."""

WatchRank = Callable[[int, fx.Node, Value], None]
"""Called with a rank, a node of its own graph, and the value, where every rank runs a graph of its own."""


def interpret(
    graph: fx.GraphModule, inputs: Sequence[Value], algebra: Algebra, *, watch: Callable[[fx.Node, Value], None] | None = None
) -> list[Value]:
    """Outputs of a program of one rank.

    inputs: one value a placeholder. Raises UnsupportedError, with the user's source line, for an op without a meaning in the ring.
    """
    single = Mesh((("one", 1),))
    seen: Watch | None = None if watch is None else (lambda node, values: watch(node, values[0]))
    return interpret_ranks([graph], [inputs], single, algebra, watch=seen)[0]


def interpret_ranks(
    graphs: Sequence[fx.GraphModule],
    inputs: Sequence[Sequence[Value]],
    mesh: Mesh,
    algebra: Algebra,
    *,
    watch: Watch | None = None,
    extensions: Mapping[Any, Extension] | None = None,
    watch_rank: WatchRank | None = None,
) -> list[list[Value]]:
    """Outputs per rank.

    graphs: one SPMD graph for all ranks, or one a rank; graphs of different ranks may differ between collectives only in arguments,
    not in the sequence of nodes that meet. inputs: per rank, one value a placeholder. Raises InputError on wrong counts,
    CollectiveMismatch where the ranks do not agree on the next collective, UnsupportedError for an op without a meaning.
    """
    if len(inputs) != mesh.size or len(graphs) not in (1, mesh.size):
        raise InputError(f"mesh {mesh} has {mesh.size} ranks; found {len(graphs)} graphs and inputs for {len(inputs)} ranks")
    run = _Lockstep(mesh, algebra, watch, extensions or {}, watch_rank)
    if len(graphs) == 1 or all(graph is graphs[0] for graph in graphs):
        return run.shared(graphs[0].graph, inputs)
    return run.separate([graph.graph for graph in graphs], inputs)


@dataclass
class _Lockstep:
    mesh: Mesh
    algebra: Algebra
    watch: Watch | None
    extensions: Mapping[Any, Extension]
    watch_rank: WatchRank | None = None
    size: int = field(init=False)
    positions: list[dict[str, int]] = field(init=False)

    def __post_init__(self) -> None:
        self.size = self.mesh.size
        self.positions = [self.mesh.coordinate(rank) for rank in range(self.size)]

    # ---- one graph for all ranks -------------------------------------------------------------------------------------------

    def shared(self, graph: fx.Graph, inputs: Sequence[Sequence[Value]]) -> list[list[Value]]:
        last_use = _last_uses(graph)
        values: dict[fx.Node, list[Value]] = {}
        ranks = range(self.size)
        feed = [iter(given) for given in inputs]
        for node in graph.nodes:
            if node.op == "placeholder":
                values[node] = [_next_input(feed[rank], node) for rank in ranks]
            elif node.op == "output":
                return [[_resolve(item, values, rank) for item in node.args[0]] for rank in ranks]
            else:
                values[node] = self._node(node, values)
            if self.watch is not None:
                self.watch(node, values[node])
            for done in last_use.get(node, ()):
                del values[done]
        raise InputError("the graph has no output node")

    def _node(self, node: fx.Node, values: Mapping[fx.Node, list[Value]]) -> list[Value]:
        if node.op != "call_function":
            raise UnsupportedError(
                f"a program is flat; found a {node.op} node {node.name} (at {note(node).source or 'unknown source'})"
            )
        try:
            if self._joins_ranks(node):
                return self._meet([node] * self.size, [_arguments(node, values, rank) for rank in range(self.size)])
            if node.target is coordinate:
                return [position[node.args[0]] for position in self.positions]  # type: ignore[index]
            if self.size == 1 or _same_on_all(node, values):
                args, kwargs = _arguments(node, values, 0)
                return [apply(self.algebra, node.target, args, kwargs)] * self.size
            results: list[Value] = []
            done: dict[tuple[int, ...], Value] = {}
            for rank in range(self.size):
                key = tuple(id(values[source][rank]) for source in node.all_input_nodes)
                if key not in done:
                    args, kwargs = _arguments(node, values, rank)
                    done[key] = apply(self.algebra, node.target, args, kwargs)
                results.append(done[key])
        except UnsupportedError as error:
            raise UnsupportedError(f"{error} [{_where(node)}]") from error
        except _KERNEL_ERRORS as error:
            raise VerificationError(f"the program cannot be executed: {error} [{_where(node)}]") from error
        return results

    def _joins_ranks(self, node: fx.Node) -> bool:
        return getattr(node.target, "namespace", "") == "_c10d_functional" or node.target in self.extensions

    def _meet(self, nodes: Sequence[fx.Node], arguments: Sequence[tuple[tuple[Any, ...], dict[str, Any]]]) -> list[Value]:
        target = nodes[0].target
        if target in self.extensions:
            return self.extensions[target](self.algebra, nodes[0], [args for args, _ in arguments], self.mesh)
        return run_collective(Meeting(self.algebra, self.mesh, target, [_positional(target, a, k) for a, k in arguments]))

    # ---- one graph a rank --------------------------------------------------------------------------------------------------

    def separate(self, graphs: Sequence[fx.Graph], inputs: Sequence[Sequence[Value]]) -> list[list[Value]]:
        """Run every rank to its next meeting, hold the meeting, go on. All ranks meet at once."""
        walkers = [_Walker(list(graph.nodes), iter(given)) for graph, given in zip(graphs, inputs, strict=True)]
        while True:
            waiting = [self._advance(walker, rank) for rank, walker in enumerate(walkers)]
            if all(node is None for node in waiting):
                return [walker.outputs for walker in walkers]
            targets = {str(node.target) if node is not None else "the end of its program" for node in waiting}
            if len(targets) != 1:
                where = ", ".join(
                    f"rank {rank}: {node.format_node() if node else 'at its end'}" for rank, node in enumerate(waiting)
                )
                raise CollectiveMismatch(f"the ranks do not agree on the next collective: {where}")
            nodes = [node for node in waiting if node is not None]
            arguments = [walker.arguments(node) for walker, node in zip(walkers, nodes, strict=True)]
            for walker, node, result in zip(walkers, nodes, self._meet(nodes, arguments), strict=True):
                walker.values[node] = result
                walker.position += 1
            for rank, (walker, node) in enumerate(zip(walkers, nodes, strict=True)):
                self._seen(rank, node, walker)

    def _advance(self, walker: _Walker, rank: int) -> fx.Node | None:
        while walker.position < len(walker.nodes):
            node = walker.nodes[walker.position]
            if node.op == "placeholder":
                walker.values[node] = _next_input(walker.feed, node)
            elif node.op == "output":
                walker.outputs = [walker.values[i] if isinstance(i, fx.Node) else i for i in node.args[0]]  # type: ignore[union-attr]
            elif self._joins_ranks(node) and not _is_wait(node):
                return node
            elif _is_wait(node):
                walker.values[node] = walker.values[node.args[0]]  # type: ignore[index]
            elif node.target is coordinate:
                walker.values[node] = self.positions[rank][node.args[0]]  # type: ignore[index]
            else:
                walker.values[node] = self._alone(walker, node, rank)
            walker.position += 1
            self._seen(rank, node, walker)
        return None

    def _seen(self, rank: int, node: fx.Node, walker: _Walker) -> None:
        if self.watch_rank is not None and node in walker.values:
            self.watch_rank(rank, node, walker.values[node])

    def _alone(self, walker: _Walker, node: fx.Node, rank: int) -> Value:
        try:
            args, kwargs = walker.arguments(node)
            return apply(self.algebra, node.target, args, kwargs)
        except UnsupportedError as error:
            raise UnsupportedError(f"{error} [{_where(node)}]") from error
        except _KERNEL_ERRORS as error:
            raise VerificationError(f"the program of rank {rank} cannot be executed: {error} [{_where(node)}]") from error


@dataclass
class _Walker:
    nodes: list[fx.Node]
    feed: Any
    position: int = 0
    values: dict[fx.Node, Value] = field(default_factory=dict)
    outputs: list[Value] = field(default_factory=list)

    def arguments(self, node: fx.Node) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The node's arguments with values in place of nodes."""
        result = fx.node.map_arg((node.args, node.kwargs), lambda n: self.values[n])
        return result


def _where(node: fx.Node) -> str:
    return f"node {node.name} at {note(node).source or 'unknown source'}"


def _is_wait(node: fx.Node) -> bool:
    return node.target is torch.ops._c10d_functional.wait_tensor.default


def _positional(target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
    """Arguments of a collective in schema order."""
    names = [argument.name for argument in target._schema.arguments]
    return (*args, *[kwargs[name] for name in names[len(args) :] if name in kwargs])


def _next_input(feed: Any, node: fx.Node) -> Value:
    try:
        return next(feed)
    except StopIteration:
        raise InputError(f"no input given for placeholder {node.name}") from None


def _resolve(item: Any, values: Mapping[fx.Node, list[Value]], rank: int) -> Value:
    return values[item][rank] if isinstance(item, fx.Node) else item


def _arguments(node: fx.Node, values: Mapping[fx.Node, list[Value]], rank: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
    result = fx.node.map_arg((node.args, node.kwargs), lambda n: values[n][rank])
    return result


def _same_on_all(node: fx.Node, values: Mapping[fx.Node, list[Value]]) -> bool:
    return all(value is found[0] for source in node.all_input_nodes for found in (values[source],) for value in found[1:])


def _last_uses(graph: fx.Graph) -> dict[fx.Node, list[fx.Node]]:
    """node -> values that nobody needs after it."""
    seen: set[fx.Node] = set()
    result: dict[fx.Node, list[fx.Node]] = {}
    for node in reversed(graph.nodes):
        fresh = [source for source in node.all_input_nodes if source not in seen]
        seen.update(fresh)
        if node not in seen and node.op != "output":
            fresh.append(node)
        if fresh:
            result[node] = fresh
    keep = set(output_node(graph).all_input_nodes)
    return {node: [d for d in dead if d not in keep] for node, dead in result.items()}
