"""Type rules of ops that move whole blocks of a value: gates of halves, pixels and channels, rows that are added by index."""

from __future__ import annotations

from typing import Any

from .contractions import add_sums
from .pointwise import check_disjoint, combine, linear, op_name, refuse_partial
from .problem import IllTyped, Op
from .reductions import whole_along
from .value import Dim, Type


def glu(op: Op, value: Type, dim: int = -1, *_: Any) -> Type:
    """a sigmoid(b) of the two halves of a whole dimension."""
    refuse_partial(op, [value], "non-linear op")
    position = dim % value.rank
    whole_along(op, value, {position})
    half = Dim(value.dims[position].size // 2)
    return Type((*value.dims[:position], half, *value.dims[position + 1 :]), op.axes.none)


def glu_backward(op: Op, gradient: Type, value: Type, dim: int, *_: Any) -> Type:
    """Linear in the gradient, which lies as the value does but for the halved dimension."""
    refuse_partial(op, [None, value], "non-linear op")
    position = dim % value.rank
    whole_along(op, value, {position})
    if any(a != b for i, (a, b) in enumerate(zip(gradient.dims, value.dims, strict=True)) if i != position):
        raise IllTyped(f"the gradient is {op.axes.describe(gradient)} but the value is {op.axes.describe(value)}", 0, 1)
    check_disjoint(op, value.dims, gradient.partial)
    return Type(value.dims, linear(op, gradient).partial, gradient.zero)


def pixel_shuffle(op: Op, value: Type, factor: int, *_: Any) -> Type:
    """[.., C r r, H, W] to [.., C, H r, W r]. Ranks may hold whole blocks of r r channels, or whole rows and columns."""
    channels, height, width = value.dims[-3:]
    moved = (_scaled(op, value, channels, (1, factor**2)), *(_scaled(op, value, dim, (factor, 1)) for dim in (height, width)))
    return linear(op, value).with_dims((*value.dims[:-3], *moved))


def pixel_unshuffle(op: Op, value: Type, factor: int, *_: Any) -> Type:
    """The inverse."""
    channels, height, width = value.dims[-3:]
    moved = (_scaled(op, value, channels, (factor**2, 1)), *(_scaled(op, value, dim, (1, factor)) for dim in (height, width)))
    return linear(op, value).with_dims((*value.dims[:-3], *moved))


def _scaled(op: Op, value: Type, dim: Dim, ratio: tuple[int, int]) -> Dim:
    """A dimension of blocks that grow or shrink: [n b] to [n a] for a ratio (a, b). Its pieces must hold whole blocks."""
    times, block = ratio
    if not dim.cuts:
        return Dim(dim.size * times // block)
    plain = op.axes.prefix(dim.size, [cut.axis for cut in dim.cuts])
    local = op.axes.length(dim)
    if plain != dim or not op.axes.is_even(dim) or local % block:
        held = f"{op.axes.describe(value)} of {list(value.shape)}"
        raise IllTyped(f"{op_name(op)} takes blocks of {block}, but the pieces of {held} end within one", 0)
    return Dim(dim.size * times // block, dim.cuts)


def index_add(op: Op, value: Type, dim: int, indices: Type, source: Type, *_: Any, **__: Any) -> Type:
    """x with the rows of source added at the indices: rows that are cut leave a partial sum."""
    refuse_partial(op, [None, None, indices], "look-up by the values of a sum in")
    position = dim % max(value.rank, 1)
    whole_along(op, value, {position})
    if indices.dims[:1] != source.dims[position : position + 1]:
        raise IllTyped(f"{op_name(op)} pairs {op.axes.describe(source)} with indices that are {op.axes.describe(indices)}", 3)
    if any(a != b for i, (a, b) in enumerate(zip(value.dims, source.dims, strict=True)) if i != position):
        raise IllTyped(f"{op_name(op)} adds {op.axes.describe(source)} to {op.axes.describe(value)}", 0, 3)
    partial = list(linear(op, source).partial)
    add_sums(op, partial, indices.dims[:1])
    merged = combine(op, [value.with_dims(()), Type((), tuple(partial), source.zero)], (0, 3))
    check_disjoint(op, value.dims, merged.partial)
    return Type(value.dims, merged.partial)
