"""Type rules of collectives: the only ops that change how a value lies over the ranks.

    all_reduce  P -> R      reduce_scatter  P -> S(0)      all_gather  S(0) -> R      all_to_all  S(i) -> S(0), chunks exchanged

An all_gather of S(i), i > 0, stacks the pieces along dimension 0: the same pieces read as another global tensor (``Moved``), which
ordinary view ops then put in order. Nothing is assumed about those ops; they are typed like all others.
"""

# ruff: noqa: ARG001 (all rules share one signature)

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
import torch.fx as fx

from .problem import IllTyped, Moved, Op, Untypable
from .value import Axes, Cut, Dim, Type

c10d = torch.ops._c10d_functional


def axis_of(op: Op, group: Any) -> int:
    """Position of the mesh axis that a collective names."""
    position = op.axes.position(str(group))
    if position is None:
        raise IllTyped(f"the collective runs over {group!r}, but the mesh {op.axes.mesh} has no such axis")
    return position


def wait(op: Op, value: Type, *_: Any) -> Type:
    """wait_tensor."""
    op.becomes = 0
    return value


def all_reduce(op: Op, value: Type, reduce: str, group: str) -> Type:
    """P(reduce) -> R."""
    axis = axis_of(op, group)
    op.becomes = 0
    if op.axes.parts[axis] == 1:
        return value
    _check_reduction(op, value, reduce, axis, "all_reduce")
    return value.with_partial(_final(value, axis))


def _final(value: Type, axis: int) -> tuple[str, ...]:
    return (*value.partial[:axis], "", *value.partial[axis + 1 :])


def _check_reduction(op: Op, value: Type, reduce: str, axis: int, kind: str) -> None:
    state, name, parts = value.partial[axis], op.axes.names[axis], op.axes.parts[axis]
    if state == reduce or (value.zero and reduce in ("sum", "avg") and axis not in value.cut_axes()):
        return
    if state == "avg" and reduce == "sum":
        op.times = parts
        return
    if state:
        raise IllTyped(f"{kind} by {reduce} over {name} of a value that is partial by {state}", 0)
    if axis in value.cut_axes():
        raise IllTyped(f"{kind} of a value that is cut over {name}: it would mix pieces of different places", 0)
    if reduce == "sum" and axis in value.scaled:
        op.undo_scale.append((0, parts))
        return
    if reduce in ("max", "min", "avg"):
        return
    again = _reduced_before(op.node.all_input_nodes[0], name)
    if again is not None:
        raise IllTyped(
            f"the value was already reduced over {name} by {again.name}: it is reduced twice, so {parts} times too large", 0
        )
    raise IllTyped(f"{kind} of a value that is not partial over {name}: it would be multiplied by {parts}", 0)


def _reduced_before(node: fx.Node, name: str) -> fx.Node | None:
    """The reduction over an axis that made a value, looking through ops that keep it."""
    for _ in range(16):
        if node.target in (c10d.all_reduce.default, c10d.reduce_scatter_tensor.default) and node.args[-1] == name:
            return node
        inputs = node.all_input_nodes
        if len(inputs) != 1 or node.target is operator.getitem:
            return None
        node = inputs[0]
    return None


def all_gather(op: Op, value: Type, size: int, group: str) -> Type:
    """S -> R, joined along dimension 0."""
    axis = axis_of(op, group)
    op.becomes = 0
    _check_size(op, size, axis)
    if op.axes.parts[axis] == 1:
        return value
    if axis not in value.cut_axes():
        raise IllTyped(
            f"all_gather over {group} of a value that is {op.axes.describe(value)}: it would be repeated {size} times", 0
        )
    _check_even(op, value, axis, "all_gather")
    dims = value.dims
    if not _leads(op.axes, dims[0], axis):
        dims = moved_to(op.axes, dims, axis, 0)
        op.moves_in.append(Moved(value.dims, dims))
    first = dims[0]._replace(cuts=tuple(cut for cut in dims[0].cuts if cut.axis != axis))
    return Type((first, *dims[1:]), value.partial)


def _check_size(op: Op, size: Any, axis: int) -> None:
    if size != op.axes.parts[axis]:
        raise IllTyped(f"the collective is made for {size} ranks, but axis {op.axes.names[axis]} has {op.axes.parts[axis]}")


def _check_even(op: Op, value: Type, axis: int, kind: str) -> None:
    """The members of a group must hold pieces of one shape, and a dimension 0 that others cut unevenly cannot be read anew."""
    for position, dim in enumerate(value.dims):
        if not op.axes.is_even(dim) and any(cut.axis == axis for cut in dim.cuts):
            length = op.axes.length(dim)
            if not isinstance(length, int) and length.shape[axis] == 1:
                raise Untypable(
                    f"{kind} of pieces that several axes cut into chunks of different lengths, one within the other (dimension "
                    f"{position}, {op.axes.describe(value)}): they are equal in some groups only"
                )
            raise IllTyped(
                f"{kind} of pieces of different lengths (dimension {position}, {op.axes.describe(value)}): pad them first", 0
            )


def _leads(axes: Axes, dim: Dim, axis: int) -> bool:
    """Whether no local factor stands to the left of the axis in a dimension."""
    done = 1
    for cut in dim.cuts:
        if cut.outer != done:
            return False
        if cut.axis == axis:
            return True
        done *= axes.parts[cut.axis]
    return False


def moved_to(axes: Axes, dims: Sequence[Dim], axis: int, position: int, *, behind_axes: bool = False) -> tuple[Dim, ...]:
    """The dims with one axis taken out of its place and put at the left edge of dimension ``position``.

    behind_axes: put it after the axes that stand at the left edge already.
    """
    parts = axes.parts[axis]
    result = []
    for dim in dims:
        here = next((cut for cut in dim.cuts if cut.axis == axis), None)
        if here is None:
            result.append(dim)
            continue
        others = [cut for cut in dim.cuts if cut.axis != axis]
        shifted = tuple(Cut(cut.axis, cut.outer // parts if cut.outer > here.outer else cut.outer) for cut in others)
        result.append(Dim(dim.size // parts, shifted))
    old = result[position]
    if not (axes.is_even(old) and all(axes.is_even(dim) for dim in dims if any(cut.axis == axis for cut in dim.cuts))):
        raise Untypable("uneven chunks read as another tensor")
    at = _leading(axes, old) if behind_axes else 1
    cuts = [cut if cut.outer < at else Cut(cut.axis, cut.outer * parts) for cut in old.cuts]
    result[position] = Dim(old.size * parts, tuple(sorted([*cuts, Cut(axis, at)], key=lambda cut: cut.outer)))
    return tuple(result)


def _leading(axes: Axes, dim: Dim) -> int:
    """Product of the axes that stand at the left edge of a dimension."""
    outer = 1
    for cut in dim.cuts:
        if cut.outer != outer:
            break
        outer *= axes.parts[cut.axis]
    return outer


def reduce_scatter(op: Op, value: Type, reduce: str, size: int, group: str) -> Type:
    """P(reduce) -> S(0)."""
    axis = axis_of(op, group)
    op.becomes = 0
    _check_size(op, size, axis)
    if op.axes.parts[axis] == 1:
        return value
    _check_reduction(op, value, reduce, axis, "reduce_scatter")
    first = value.dims[0]
    local = op.axes.length(first)
    if not isinstance(local, int) or local % size:
        raise IllTyped(f"reduce_scatter of dimension 0 of local size {local} over {size} ranks: pad it first", 0)
    cuts = sorted((*first.cuts, Cut(axis, _leading(op.axes, first))), key=lambda cut: cut.outer)
    return Type((Dim(first.size, tuple(cuts)), *value.dims[1:]), _final(value, axis))


def all_to_all(op: Op, value: Type, received: Sequence[Any], sent: Sequence[Any], group: str) -> Type:
    """Block k of dimension 0 goes to rank k; the blocks that arrive are joined in rank order."""
    axis = axis_of(op, group)
    op.becomes = 0
    parts = op.axes.parts[axis]
    if parts == 1:
        return value
    if axis not in value.cut_axes():
        raise IllTyped(f"all_to_all over {group} of a value that is {op.axes.describe(value)}: every rank would send the same", 0)
    _check_even(op, value, axis, "all_to_all")
    local = op.axes.length(value.dims[0])
    if len(set(map(str, [*received, *sent]))) != 1 or received[0] * parts != local:
        raise Untypable("an all_to_all whose blocks differ in length")
    dims = moved_to(op.axes, value.dims, axis, 0, behind_axes=True)
    if dims != value.dims:
        op.moves_in.append(Moved(value.dims, dims))
    # dimension 0 is [axes, source rank (cut), target rank, rest]; afterwards the source is local and the target is the cut
    outer = next(cut.outer for cut in dims[0].cuts if cut.axis == axis)
    others = [cut for cut in dims[0].cuts if cut.axis != axis]
    if any(outer < cut.outer < outer * parts * parts for cut in others):
        raise Untypable("an all_to_all of blocks that another axis cuts")
    exchanged = tuple(sorted([*others, Cut(axis, outer * parts)], key=lambda cut: cut.outer))
    dims = (Dim(dims[0].size, exchanged), *dims[1:])
    target = _future_dim(op, axis, len(dims))
    if target is not None and target != 0:
        after = moved_to(op.axes, dims, axis, target)
        op.moves_out.append(Moved(dims, after))
        dims = after
    return Type(dims, value.partial)


def _future_dim(op: Op, axis: int, rank: int) -> int | None:
    """Where the next declared value has the axis, counted from the last dimension."""
    hint = future_hint(op)
    if hint is None or axis not in hint.cut_axes():
        return None
    return hint.cut_axes()[axis] + rank - hint.rank


def future_hint(op: Op) -> Type | None:
    """The declared type of this node, or of the first one behind it that has one."""
    return op.hint() or (op.look_ahead() if op.look_ahead is not None else None)


def broadcast(op: Op, value: Type, source: int, group: str) -> Type:
    """The value of one rank of the axis, everywhere."""
    axis = axis_of(op, group)
    op.becomes = 0
    if op.axes.parts[axis] > 1 and (value.partial[axis] or axis in value.cut_axes()):
        raise IllTyped(f"broadcast over {group} of a value that is {op.axes.describe(value)}: the other ranks' parts are lost", 0)
    return value
