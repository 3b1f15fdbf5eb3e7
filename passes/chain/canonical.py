"""One node for each value: nodes with the same op and the same arguments are merged.

t(W), t(W), ...  ->  t(W)          T copies of a transposed weight, and t(t(W)) of the backward, become one each
"""

from __future__ import annotations

import operator
from typing import Any

import torch
import torch.fx as fx

aten = torch.ops.aten
VIEWS = frozenset((aten.t.default, aten.transpose.int, aten.permute.default, aten.select.int, aten.slice.Tensor, operator.getitem))
"""Ops that cost nothing and that a trace repeats for every step; anything else stays where the user wrote it."""


def merge_equal(graph: fx.Graph) -> int:
    """Merge views. Returns how many nodes went."""
    seen: dict[Any, fx.Node] = {}
    count = 0
    for node in list(graph.nodes):
        if node.op != "call_function" or node.target not in VIEWS or node.kwargs:
            continue
        node.replace_all_uses_with(_without_effect(node))
        if not node.users:
            graph.erase_node(node)
            count += 1
            continue
        key = (node.target, *[_hashable(arg) for arg in node.args])
        known = seen.setdefault(key, node)
        if known is not node:
            node.replace_all_uses_with(known)
            graph.erase_node(node)
            count += 1
    return count


def _without_effect(node: fx.Node) -> fx.Node:
    """t(t(x)) -> x, for matrices; the node itself otherwise."""
    inner = node.args[0]
    if node.target is aten.t.default and isinstance(inner, fx.Node) and inner.target is aten.t.default:
        source = inner.args[0]
        if isinstance(source, fx.Node):
            return source
    return node


def _hashable(value: Any) -> Any:
    return tuple(_hashable(item) for item in value) if isinstance(value, (tuple, list)) else value
