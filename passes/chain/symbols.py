"""The nodes among which chains are looked for, each with a symbol: two steps of a chain are two runs of equal symbols.

A symbol is an op, its constants, and the forms of its inputs and output; node arguments and integers are holes. Views that only
pick pieces of something made before (x[t], W.t()) are left out: they are inputs of the steps, not part of them.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.fx as fx

from ...compiler.program import tensor_leaves

aten = torch.ops.aten

PICKS = frozenset(
    (
        aten.select.int,
        aten.slice.Tensor,
        aten.unbind.int,
        aten.t.default,
        aten.transpose.int,
        aten.permute.default,
        aten.squeeze.dim,
        aten.unsqueeze.default,
        operator.getitem,
    )
)

PICKED_OFTEN = 6
"""A value that so many picks of one kind read is taken apart from outside, not within a step."""


def picks(graph: fx.Graph) -> set[fx.Node]:
    """Views of inputs, and of values that are taken apart many times."""
    counts: dict[tuple[fx.Node, Any], int] = {}
    outside: set[fx.Node] = set()
    for node in graph.nodes:
        if node.op == "call_function" and node.target in PICKS:
            key = (node.args[0], node.target)
            counts[key] = counts.get(key, 0) + 1
    for node in graph.nodes:
        if node.op == "call_function" and node.target in PICKS:
            source = node.args[0]
            if source.op == "placeholder" or source in outside or counts[source, node.target] >= PICKED_OFTEN:
                outside.add(node)
    return outside


class Table:
    """The nodes in question with their symbols, node arguments and integers."""

    def __init__(self, nodes: list[fx.Node]) -> None:
        self.nodes = nodes
        self.place = {node: i for i, node in enumerate(nodes)}
        self.arguments: list[list[fx.Node]] = []
        self.integers: list[list[int]] = []
        symbols: dict[Any, int] = {}
        forms: dict[fx.Node, Any] = {}
        ids = np.empty(len(nodes), np.int64)
        for i, node in enumerate(nodes):
            sources: list[fx.Node] = []
            integers: list[int] = []
            key: list[Any] = [node.target]
            _walk(node.args, sources, integers, key)
            if node.kwargs:
                _walk(tuple(node.kwargs.items()), sources, integers, key)
            key.append(_form(node, forms))
            key.extend(_form(source, forms) for source in sources)
            self.arguments.append(sources)
            self.integers.append(integers)
            ids[i] = symbols.setdefault(tuple(key), len(symbols))
        self.symbols = ids

    def take(self, nodes: Sequence[fx.Node]) -> None:
        """Leave some nodes out of what is looked for from now on."""
        for node in nodes:
            place = self.place[node]
            self.symbols[place] = -1 - place


def _walk(value: Any, sources: list[fx.Node], integers: list[int], key: list[Any]) -> None:
    for item in value:
        if isinstance(item, fx.Node):
            sources.append(item)
            key.append("N")
        elif type(item) is int:
            integers.append(item)
            key.append("I")
        elif isinstance(item, (tuple, list)):
            key.append(len(item))
            _walk(item, sources, integers, key)
        else:
            key.append(str(item) if isinstance(item, float) else item)


def _form(node: fx.Node, forms: dict[fx.Node, Any]) -> Any:
    found = forms.get(node)
    if found is None:
        leaves = tensor_leaves(node.meta.get("val"))
        found = tuple((tuple(v.shape), v.dtype) if isinstance(v, torch.Tensor) else None for v in leaves)
        forms[node] = found
    return found
