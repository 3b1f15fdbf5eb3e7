"""Gradients of slices, put together again.

    slice_backward(a, 0:k) + slice_backward(b, k:n)  ->  cat(a, b)             pieces that cover the whole, each once
    slice_backward(a, i:j)                           ->  pad(a, i, n - j)      a piece that stands alone

Autograd gives every slice of a value (the gates of a GRU) a gradient of full size, mostly zeros, and adds them up. As one ``cat``
the step has fewer ops, and none that names the number of rows.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.fx as fx

from ...compiler.chains.bodies import BodyGraph

aten = torch.ops.aten


@dataclass(frozen=True)
class _Pieces:
    """A value that is zero but for some pieces along one dimension: (start, stop, node), disjoint and in order."""

    dim: int
    size: int
    pieces: tuple[tuple[int, int, fx.Node], ...]

    def joined(self, other: _Pieces) -> _Pieces | None:
        """The sum of two, where their pieces do not overlap."""
        if (self.dim, self.size) != (other.dim, other.size):
            return None
        pieces = sorted((*self.pieces, *other.pieces), key=lambda piece: piece[0])
        apart = all(a[1] <= b[0] for a, b in itertools.pairwise(pieces))
        return _Pieces(self.dim, self.size, tuple(pieces)) if apart else None


def join_pieces(body: BodyGraph) -> int:
    """Rewrite the gradients of slices in a body. Returns how many values were rewritten."""
    graph = body.graph
    known: dict[fx.Node, _Pieces] = {}
    for node in graph.nodes:
        found = _of(node, known)
        if found is not None:
            known[node] = found
    count = 0
    for node, found in known.items():
        is_part = all(user in known for user in node.users) and len(node.users) > 0
        if not is_part:
            _write(graph, node, found)
            count += 1
    if count:
        graph.eliminate_dead_code(is_impure_node=lambda n: n.op in ("placeholder", "output"))
    return count


def _of(node: fx.Node, known: dict[fx.Node, _Pieces]) -> _Pieces | None:
    if node.target is aten.slice_backward.default:
        source, sizes, dim, start, stop, step = cast(Any, node.args)
        if step != 1:
            return None
        dim %= len(sizes)
        size = sizes[dim]
        start, stop = (max(0, edge + size) if edge < 0 else min(edge, size) for edge in (start, stop))
        return _Pieces(dim, size, ((start, stop, source),))
    if node.target is aten.add.Tensor and len(node.args) == 2 and not node.kwargs:
        left, right = (known.get(cast(fx.Node, arg)) for arg in node.args)
        return left.joined(right) if left is not None and right is not None else None
    return None


def _write(graph: fx.Graph, node: fx.Node, found: _Pieces) -> None:
    edges = [0, *[edge for start, stop, _ in found.pieces for edge in (start, stop)], found.size]
    covers = all(edges[i] == edges[i + 1] for i in range(0, len(edges), 2))
    with graph.inserting_before(node):
        if covers:
            made = graph.call_function(aten.cat.default, ([piece for _, _, piece in found.pieces], found.dim))
        elif len(found.pieces) == 1:
            ((start, stop, piece),) = found.pieces
            behind = node.meta["val"].dim() - 1 - found.dim
            made = graph.call_function(aten.constant_pad_nd.default, (piece, [0, 0] * behind + [start, found.size - stop]))
        else:
            return
    made.meta = dict(node.meta)
    node.replace_all_uses_with(made)
