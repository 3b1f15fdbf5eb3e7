"""Which way the rows of a step lie in every value of its body: a placement along the axis "rows of all steps".

    Shard(d)    dimension d counts rows, and row i depends on row i alone
    Replicate   the same for every row
    Partial     a sum over the rows

Steps that are folded into rows turn T small products into one. A body that types this way may be evaluated on any number of rows,
and a value that is Partial then comes out summed over the steps as well, which is what the gradient of a weight wants. The table is
small and explicit; a value that does not type has no entry, and its body is vectorised by ``vmap`` instead.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
import torch.fx as fx

from ...compiler.layout import Partial, Placement, Replicate, Shard

aten = torch.ops.aten
Rule = Callable[[fx.Node, Callable[[Any], Placement | None]], Placement | None]

ROWS = Shard(0)
WHOLE = Replicate()
SUM = Partial()


def type_rows(nodes: Sequence[fx.Node], known: Mapping[fx.Node, Placement]) -> dict[fx.Node, Placement]:
    """Placements of the nodes that have one, in order, from those of their inputs (``known``, returned as well)."""
    found = dict(known)

    def of(argument: Any) -> Placement | None:
        return found.get(argument) if isinstance(argument, fx.Node) else WHOLE

    for node in nodes:
        placement = _typed(node, of)
        if placement is not None:
            found[node] = placement
    return found


def _typed(node: fx.Node, of: Callable[[Any], Placement | None]) -> Placement | None:
    inputs = [of(source) for source in node.all_input_nodes]
    if any(placement is None for placement in inputs):
        return None
    if all(isinstance(placement, Replicate) for placement in inputs):
        return WHOLE
    if node.target is operator.getitem:
        return inputs[0]
    packet = getattr(node.target, "overloadpacket", None)
    rule = _RULES.get(packet)
    if rule is not None:
        return rule(node, of)
    if torch.Tag.pointwise in getattr(node.target, "tags", ()) or packet in _POINTWISE:
        return _pointwise(node, of)
    return None


def _value(node: Any) -> torch.Tensor:
    found: torch.Tensor = node.meta["val"]
    return found


def _pointwise(node: fx.Node, of: Callable[[Any], Placement | None]) -> Placement | None:
    out = _value(node)
    placements = [(source, of(source)) for source in node.all_input_nodes]
    if any(isinstance(placement, Partial) for _, placement in placements):
        return _linear(node, [placement for _, placement in placements])
    where: set[int] = set()
    for source, placement in placements:
        if isinstance(placement, Shard):
            where.add(placement.dim + out.dim() - _value(source).dim())
    if len(where) != 1:
        return None
    (dim,) = where
    for source, placement in placements:
        own = dim - (out.dim() - _value(source).dim())
        if isinstance(placement, Replicate) and own >= 0 and _value(source).shape[own] != 1:
            return None  # the same for every step, but not for every row: it would have to be repeated
    return Shard(dim)


def _linear(node: fx.Node, placements: list[Placement | None]) -> Placement | None:
    packet = getattr(node.target, "overloadpacket", None)
    if packet in (aten.add, aten.sub) and len(placements) == 2 and all(isinstance(p, Partial) for p in placements):
        return SUM
    if packet is aten.neg or (packet in (aten.mul, aten.div) and len(placements) == 1):
        return SUM
    return None


def _mm(node: fx.Node, of: Callable[[Any], Placement | None]) -> Placement | None:
    return _product(of(node.args[0]), of(node.args[1]))


def _product(left: Placement | None, right: Placement | None) -> Placement | None:
    pairs = {
        (ROWS, WHOLE): ROWS,
        (WHOLE, Shard(1)): Shard(1),
        (Shard(1), ROWS): SUM,
        (WHOLE, SUM): SUM,
        (SUM, WHOLE): SUM,
    }
    return pairs.get((left, right))  # type: ignore[arg-type]


def _addmm(node: fx.Node, of: Callable[[Any], Placement | None]) -> Placement | None:
    result = _product(of(node.args[1]), of(node.args[2]))
    bias, own = _value(node.args[0]), of(node.args[0])
    if not isinstance(result, Shard):
        return None
    if own == result and bias.dim() == 2:
        return result
    fits = bias.dim() < 2 if result.dim == 0 else False
    return result if isinstance(own, Replicate) and (fits or bias.shape[result.dim] == 1) else None


def _linear_layer(node: fx.Node, of: Callable[[Any], Placement | None]) -> Placement | None:
    others = all(isinstance(of(arg), Replicate) for arg in node.args[1:])
    return ROWS if of(node.args[0]) == ROWS and _value(node.args[0]).dim() > 1 and others else None


def _transposed(node: fx.Node, of: Callable[[Any], Placement | None]) -> Placement | None:
    placement, dims = of(node.args[0]), _value(node).dim()
    if not isinstance(placement, Shard):
        return placement
    if node.target is aten.t.default:
        return Shard(1 - placement.dim) if dims == 2 else placement
    if node.target is aten.permute.default:
        order = [int(d) % dims for d in node.args[1]]  # type: ignore[arg-type,union-attr]
        return Shard(order.index(placement.dim))
    first, second = (int(d) % dims for d in node.args[1:3])  # type: ignore[arg-type]
    return Shard({first: second, second: first}.get(placement.dim, placement.dim))


def _argument(node: fx.Node, position: int, default: Any) -> Any:
    return node.args[position] if len(node.args) > position else default


def _along(position: int, default: int) -> Rule:
    """Ops that work within one dimension, which must not be that of the rows."""

    def rule(node: fx.Node, of: Callable[[Any], Placement | None]) -> Placement | None:
        placement = of(node.args[0])
        dim = int(_argument(node, position, default)) % _value(node.args[0]).dim()
        if not isinstance(placement, Shard):
            return None
        return None if dim == placement.dim else placement

    return rule


def _select(node: fx.Node, of: Callable[[Any], Placement | None]) -> Placement | None:
    placement = of(node.args[0])
    dim = int(_argument(node, 1, 0)) % _value(node.args[0]).dim()
    if not isinstance(placement, Shard) or dim == placement.dim:
        return None
    return Shard(placement.dim - (dim < placement.dim))


def _joined(node: fx.Node, of: Callable[[Any], Placement | None]) -> Placement | None:
    sources: Any = node.args[0]
    placements = {of(source) for source in sources}
    dim = int(_argument(node, 1, 0)) % _value(node).dim()
    if len(placements) != 1:
        return None
    (placement,) = placements
    if not isinstance(placement, Shard):
        return None
    if node.target is aten.stack.default:
        return Shard(placement.dim + (dim <= placement.dim))
    return None if dim == placement.dim else placement


def _sum(node: fx.Node, of: Callable[[Any], Placement | None]) -> Placement | None:
    placement, dims = of(node.args[0]), _value(node.args[0]).dim()
    if isinstance(placement, Partial):
        return SUM
    given: Any = _argument(node, 1, None)
    along = {int(d) % dims for d in given} if given else set(range(dims))
    if not isinstance(placement, Shard):
        return None
    if placement.dim in along:
        return SUM
    return Shard(placement.dim if _argument(node, 2, 0) else placement.dim - sum(d < placement.dim for d in along))


def _view(node: fx.Node, of: Callable[[Any], Placement | None]) -> Placement | None:
    placement, before, after = of(node.args[0]), _value(node.args[0]).shape, _value(node).shape
    if isinstance(placement, Partial):
        return SUM
    keeps = placement == ROWS and len(after) > 0 and len(before) > 0 and before[0] == after[0]
    return ROWS if keeps else None


def _unsqueezed(node: fx.Node, of: Callable[[Any], Placement | None]) -> Placement | None:
    placement = of(node.args[0])
    if not isinstance(placement, Shard):
        return placement
    dim = int(node.args[1]) % _value(node).dim()  # type: ignore[arg-type]
    return Shard(placement.dim + (dim <= placement.dim))


def _squeezed(node: fx.Node, of: Callable[[Any], Placement | None]) -> Placement | None:
    placement, given = of(node.args[0]), _argument(node, 1, None)
    if not isinstance(placement, Shard) or given is None:
        return None
    dims = _value(node.args[0]).dim()
    along = {int(d) % dims for d in (given if isinstance(given, (list, tuple)) else [given])}
    gone = {d for d in along if _value(node.args[0]).shape[d] == 1}
    return None if placement.dim in along else Shard(placement.dim - sum(d < placement.dim for d in gone))


def _expanded(node: fx.Node, of: Callable[[Any], Placement | None]) -> Placement | None:
    placement, before, after = of(node.args[0]), _value(node.args[0]), _value(node)
    if not isinstance(placement, Shard):
        return None
    dim = placement.dim + after.dim() - before.dim()
    return Shard(dim) if before.shape[placement.dim] == after.shape[dim] else None


def _padded(node: fx.Node, of: Callable[[Any], Placement | None]) -> Placement | None:
    placement, widths = of(node.args[0]), cast(list[int], node.args[1])
    if not isinstance(placement, Shard):
        return None
    behind = _value(node).dim() - 1 - placement.dim
    return None if any(widths[2 * behind : 2 * behind + 2]) else placement


def _same(node: fx.Node, of: Callable[[Any], Placement | None]) -> Placement | None:
    return of(node.args[0])


def _lookup(node: fx.Node, of: Callable[[Any], Placement | None]) -> Placement | None:
    indices = of(node.args[1])
    return indices if isinstance(of(node.args[0]), Replicate) and isinstance(indices, Shard) else None


_POINTWISE = frozenset((aten.tanh_backward, aten.sigmoid_backward, aten.threshold_backward, aten.gelu_backward, aten.silu_backward))
_RULES: Mapping[Any, Rule] = {
    aten.mm: _mm,
    aten.addmm: _addmm,
    aten.linear: _linear_layer,
    aten.t: _transposed,
    aten.transpose: _transposed,
    aten.permute: _transposed,
    aten.slice: _along(1, 0),
    aten.split: _along(2, 0),
    aten.split_with_sizes: _along(2, 0),
    aten.unsafe_split: _along(2, 0),
    aten.unsafe_split_with_sizes: _along(2, 0),
    aten._softmax: _along(1, -1),
    aten._log_softmax: _along(1, -1),
    aten.cumsum: _along(1, 0),
    aten.select: _select,
    aten.unbind: _select,
    aten.cat: _joined,
    aten.stack: _joined,
    aten.sum: _sum,
    aten.view: _view,
    aten._unsafe_view: _view,
    aten.reshape: _view,
    aten.unsqueeze: _unsqueezed,
    aten.squeeze: _squeezed,
    aten.expand: _expanded,
    aten.constant_pad_nd: _padded,
    aten.clone: _same,
    aten._to_copy: _same,
    aten.detach: _same,
    aten.alias: _same,
    aten.zeros_like: lambda node, of: of(node.args[0]) if isinstance(of(node.args[0]), Shard) else None,
    aten.ones_like: lambda node, of: of(node.args[0]) if isinstance(of(node.args[0]), Shard) else None,
    aten.embedding: _lookup,
}

NAMES_SIZES = (aten.view, aten._unsafe_view, aten.reshape, aten.expand)
"""Ops that name the number of rows in their arguments."""


def any_rows(node: fx.Node, placement: Placement) -> tuple[Any, ...]:
    """The arguments of a node for whatever number of rows there is."""
    packet = getattr(node.target, "overloadpacket", None)
    if packet not in NAMES_SIZES or not isinstance(placement, Shard):
        return node.args
    sizes = list(node.args[1])  # type: ignore[arg-type]
    sizes[placement.dim] = -1
    return (node.args[0], sizes, *node.args[2:])
