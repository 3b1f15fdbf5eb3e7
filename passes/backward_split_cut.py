"""Which values to hold for later work, and which to compute again: a minimum cut.

    minimise   sum of bytes(v) over held v  +  price * sum of seconds(v) over recomputed v
    so that    every value that the later work reads is held, recomputed from such values, or always at hand

Both the cut between forward and backward and the one between input and weight gradients are of this form. Every node v becomes
an edge ``v.made -> v.there`` that costs its bytes (it is held); computing it again costs an edge from the source to ``v.made``;
whoever needs v hangs on ``v.there`` by an edge that cannot be cut (Chen et al., arXiv 1604.06174, posed as the min-cut of
torch's partitioner, with the time of recomputation in the objective).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import networkx as nx  # type: ignore[import-untyped]
import torch.fx as fx

from .backward_split_costs import is_alias, stored_bytes

_SOURCE, _SINK = "source", "sink"


@dataclass(frozen=True)
class Saved:
    """hold: values to keep; again: nodes to compute once more for the later work, views among them, in graph order."""

    hold: tuple[fx.Node, ...]
    again: tuple[fx.Node, ...]

    @property
    def bytes(self) -> int:
        """Size of what is held."""
        return sum(stored_bytes(node) for node in self.hold)


def cheapest_cut(
    consumers: Iterable[fx.Node],
    *,
    free: Callable[[fx.Node], bool],
    price: Callable[[fx.Node], float | None],
    order: dict[fx.Node, int],
) -> Saved:
    """What to hold for ``consumers`` (the later work; what they read from each other needs no holding).

    free: values that are at hand anyway (parameters); price: bytes it is worth holding rather than computing a node again, None
    where it must not be computed twice; order: position of every node.
    """
    late = set(consumers)
    graph = nx.DiGraph()
    read = (source for node in late for source in node.all_input_nodes)
    needed = [source for source in dict.fromkeys(read) if source not in late and not free(source)]
    for node in needed:
        graph.add_edge(_there(node), _SINK)
    seen: set[fx.Node] = set()
    stack = needed
    while stack:
        node = stack.pop()
        if node in seen:
            continue
        seen.add(node)
        stack.extend(_add_node(graph, node, free, price))
    if _SOURCE not in graph or _SINK not in graph:
        return Saved((), tuple(sorted(seen, key=order.__getitem__)))
    _, (_, sink_side) = nx.minimum_cut(graph, _SOURCE, _SINK)
    hold = [node for node in seen if _there(node) in sink_side and _made(node) not in sink_side]
    again = [node for node in seen if _made(node) in sink_side]
    return Saved(tuple(sorted(hold, key=order.__getitem__)), tuple(sorted(again, key=order.__getitem__)))


def _add_node(
    graph: nx.DiGraph, node: fx.Node, free: Callable[[fx.Node], bool], price: Callable[[fx.Node], float | None]
) -> list[fx.Node]:
    """Add a node's edges; the nodes to look at next."""
    if free(node):
        return []
    if is_alias(node) or isinstance(node.meta["val"], (tuple, list)):  # holding a view holds its base: look at that
        graph.add_edge(_made(node), _there(node))
    else:
        graph.add_edge(_made(node), _there(node), capacity=max(stored_bytes(node), 1))
    cost = 0.0 if is_alias(node) or _is_element(node) else price(node)
    if cost is None or node.op == "placeholder":
        graph.add_edge(_SOURCE, _made(node))
        return []
    if cost > 0 or not node.all_input_nodes:
        graph.add_edge(_SOURCE, _made(node), capacity=cost)
    for source in node.all_input_nodes:
        if not free(source):
            graph.add_edge(_there(source), _made(node))
    return [source for source in node.all_input_nodes if not free(source)]


def _is_element(node: fx.Node) -> bool:
    return (
        node.op == "call_function" and isinstance(node.all_input_nodes[0].meta["val"], (tuple, list))
        if node.all_input_nodes
        else False
    )


def _made(node: fx.Node) -> tuple[str, fx.Node]:
    return ("made", node)


def _there(node: fx.Node) -> tuple[str, fx.Node]:
    return ("there", node)


def within_budget(cut: Callable[[float], Saved], seconds: Callable[[Saved], float], budget: float, bandwidth: float) -> Saved:
    """The cut that holds the least with ``seconds(cut(price)) <= budget``, by bisection over the price of a second in bytes."""
    dear, cheap = 1e4 * bandwidth, 1e-4 * bandwidth
    best = cut(dear)
    if seconds(best) > budget:
        return best
    for _ in range(12):
        middle = (dear * cheap) ** 0.5
        found = cut(middle)
        if seconds(found) <= budget:
            dear, best = middle, found
        else:
            cheap = middle
    return best
