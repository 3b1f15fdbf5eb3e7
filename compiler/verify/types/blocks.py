"""Type rules of ops that move or join whole blocks of a value: gates of halves, pixels and channels, rows that are added by index,
bags of rows."""

from __future__ import annotations

from typing import Any

from .contractions import add_sums
from .pointwise import check_disjoint, combine, linear, op_name, product, refuse_partial
from .problem import IllTyped, Op, Untypable
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


def scatter_reduce(op: Op, value: Type, dim: int, indices: Type, source: Type, *rest: Any) -> Type:
    """x with the sources at an index joined by a reduction, along a dimension that is whole on both sides."""
    reduce, include_self = (*rest, True)[:2]
    operands = [value, None, indices, source]
    if reduce != "sum" or not include_self:
        refuse_partial(op, operands, "non-linear op")
    refuse_partial(op, [None, None, indices], "look-up by the values of a sum in")
    position = dim % max(value.rank, 1)
    for one in (value, indices, source):
        whole_along(op, one, {position})
    for one in (indices, source):
        for i, (mine, theirs) in enumerate(zip(value.dims, one.dims, strict=True)):
            if i != position and mine != theirs and (mine.cuts or theirs.cuts):
                raise IllTyped(f"{op_name(op)} joins {op.axes.describe(one)} into {op.axes.describe(value)}", 0)
    merged = combine(op, [value.with_dims(()), source.with_dims(())], (0, 3))
    check_disjoint(op, value.dims, merged.partial)
    return Type(value.dims, merged.partial)


def embedding_bag(op: Op, weight: Type, indices: Type, offsets: Type, *rest: Any) -> tuple[Type, ...]:
    """Sums or means of rows of [V, D], a bag each: [bags, D]. Every rank must hold all rows and all bags; D may be cut."""
    _scale, mode, _sparse, weights = (*rest, *[None] * 4)[:4]
    if mode == 2:
        raise Untypable(f"no type rule for the maxima of {op_name(op)} on pieces")
    if not all(one.is_whole for one in (indices, offsets, weights) if isinstance(one, Type)):
        raise Untypable(f"{op_name(op)} whose bags are cut: a bag may begin on one rank and end on the next")
    whole_along(op, weight, {0})
    out, *described = op.node.meta["val"]
    found = [Type((Dim(int(out.shape[0])), weight.dims[1]), linear(op, weight).partial)]
    found += [op.axes.whole(one.shape) for one in described]
    return tuple(found)


def embedding_bag_backward(op: Op, gradient: Type, *rest: Any) -> Type:
    """The gradient of every row: linear in that of the bags, which are whole."""
    indices, offsets = rest[:2]
    rows, _scale, mode, _sparse, weights = rest[5:10]
    if mode == 2 or not all(one.is_whole for one in (indices, offsets, weights) if isinstance(one, Type)):
        raise Untypable(f"{op_name(op)} of bags that are cut, or of maxima")
    whole_along(op, gradient, {0})
    return Type((Dim(int(rows)), gradient.dims[1]), linear(op, gradient).partial)


def trilinear(op: Op, first: Type, second: Type, third: Type, *rest: Any) -> Type:
    """The product of three, each with dimensions of size 1 put in, summed: a summed dimension that is cut leaves a partial sum."""
    *expanded, summed = rest[:4]
    operands = []
    for value, places in zip((first, second, third), expanded, strict=True):
        dims = list(value.dims)
        for place in sorted(places):
            dims.insert(place, Dim(1))
        operands.append(value.with_dims(tuple(dims)))
    made = product(op, operands)
    partial = list(made.partial)
    add_sums(op, partial, [made.dims[place] for place in summed])
    return Type(tuple(dim for place, dim in enumerate(made.dims) if place not in summed), tuple(partial), made.zero)
