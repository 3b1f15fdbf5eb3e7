"""What a pass declared about a node, and whether a derived type agrees with it."""

from __future__ import annotations

import torch
import torch.fx as fx

from ...layout import Layout, Shard
from ...program import note, tensor_leaves
from .problem import Op
from .value import Axes, Dim, Type, same_integer

Hints = tuple[tuple[tuple[int, ...], Layout] | None, ...]


def hints_of(node: fx.Node, axes: Axes) -> Hints:
    """(global shape, layout) per output as the note declares them; shapes follow from even pieces where the note has none."""
    known = note(node)
    if known.layouts is None or node.op == "output":
        return ()
    leaves = tensor_leaves(node.meta.get("val"))
    shapes = known.global_shapes or (None,) * len(known.layouts)
    found: list[tuple[tuple[int, ...], Layout] | None] = []
    for leaf, layout, shape in zip(leaves, known.layouts, shapes, strict=False):
        if layout is None or not isinstance(leaf, torch.Tensor):
            found.append(None)
        else:
            found.append((shape if shape is not None else _even_shape(leaf, layout, axes), layout))
    return tuple(found)


def _even_shape(piece: torch.Tensor, layout: Layout, axes: Axes) -> tuple[int, ...]:
    shape = [int(n) for n in piece.shape]
    for placement, parts in zip(layout, axes.parts, strict=True):
        if isinstance(placement, Shard) and placement.dim < len(shape):
            shape[placement.dim] *= parts
    return tuple(shape)


def agree(op: Op, found: Type, hint: Type, *, may_move: bool) -> tuple[Type | None, tuple[Dim, ...] | None]:
    """(agreed type or None, dims to move to or None).

    A final value also is its own partial average, maximum and minimum; a zero also is a partial sum. may_move: the node was added
    by a pass, so its pieces may be read as another global tensor of the same local shape.
    """
    partial = list(found.partial)
    cut = {*found.cut_axes(), *hint.cut_axes()}
    for axis, (have, want) in enumerate(zip(found.partial, hint.partial, strict=True)):
        idle = not have and axis not in cut
        if idle and (want in ("avg", "max", "min") or (want == "sum" and found.zero)):
            partial[axis] = want
    if tuple(partial) != hint.partial:
        return None, None
    if found.dims == hint.dims:
        return found.with_partial(hint.partial), None
    if not may_move or set(found.cut_axes()) != set(hint.cut_axes()) or not _same_local(op, found, hint):
        return None, None
    if not all(a == b or (op.axes.is_even(a) and op.axes.is_even(b)) for a, b in zip(found.dims, hint.dims, strict=True)):
        return None, None
    return Type(hint.dims, hint.partial, found.zero), hint.dims


def _same_local(op: Op, left: Type, right: Type) -> bool:
    if left.rank != right.rank:
        return False
    return all(same_integer(op.axes.length(a), op.axes.length(b)) for a, b in zip(left.dims, right.dims, strict=True))
