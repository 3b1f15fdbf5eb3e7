"""Type rules of ops that only move elements: views, permutations, joins and cuts."""

# ruff: noqa: ARG001 (all rules share one signature)

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .collectives import future_hint, moved_to
from .factors import regroup
from .pointwise import check_disjoint, combine
from .problem import IllTyped, Moved, Op, Untypable
from .value import Cut, Dim, Integer, Type, same_integer


def view(op: Op, value: Type, size: Sequence[Integer], *_: Any) -> Type:
    """view, reshape: the row of factors is grouped anew."""
    dims = regroup(op, value, list(size))
    op.new_args[1] = [dim.size for dim in dims]
    return Type(dims, value.partial, value.zero, value.scaled)


def permuted(value: Type, order: Sequence[int]) -> Type:
    """Output dimension i is input dimension order[i]."""
    return value.with_dims(tuple(value.dims[i % max(value.rank, 1)] for i in order))


def permute(op: Op, value: Type, order: Sequence[int], *_: Any) -> Type:
    """permute(x, dims)."""
    return permuted(value, order)


def transpose(op: Op, value: Type, first: int, second: int, *_: Any) -> Type:
    """transpose(x, i, j)."""
    order = list(range(value.rank))
    if value.rank:
        order[first], order[second] = order[second], order[first]
    return permuted(value, order)


def transpose_2d(op: Op, value: Type, *_: Any) -> Type:
    """t(x)."""
    return permuted(value, range(value.rank)[::-1])


def unsqueeze(op: Op, value: Type, dim: int, *_: Any) -> Type:
    """A new dimension of size 1."""
    position = dim % (value.rank + 1)
    return value.with_dims((*value.dims[:position], Dim(1), *value.dims[position:]))


def squeeze(op: Op, value: Type, dims: Any = None, *_: Any) -> Type:
    """Drop dimensions of global size 1. A dimension of local size 1 that is cut must stay."""
    chosen = range(value.rank) if dims is None else [dims] if isinstance(dims, int) else dims
    chosen = {d % max(value.rank, 1) for d in chosen}
    for d in chosen:
        if value.rank and value.dims[d].cuts and same_integer(op.axes.length(value.dims[d]), 1):
            value = _moved_away(op, value, d)
    return value.with_dims(tuple(dim for i, dim in enumerate(value.dims) if i not in chosen or dim.size != 1))


def _moved_away(op: Op, value: Type, position: int) -> Type:
    """A squeezed dimension of local size 1 is cut: its axis goes where the declared layout of the result has it."""
    hint = future_hint(op)
    targets = {} if hint is None else hint.cut_axes()
    dims = value.dims
    for cut in value.dims[position].cuts:
        if cut.axis not in targets or hint is None or hint.rank != value.rank - 1:
            raise IllTyped(
                f"squeeze drops dimension {position}, whose local size is 1 but which is cut: {op.axes.describe(value)}", 0
            )
        target = targets[cut.axis]
        dims = moved_to(op.axes, dims, cut.axis, target if target < position else target + 1)
    op.moves_in.append(Moved(value.dims, dims))
    return value.with_dims(dims)


def expand(op: Op, value: Type, size: Sequence[Integer], *_: Any) -> Type:
    """Repeat dimensions of size 1 without copying."""
    shift = len(size) - value.rank
    own = [op.axes.length(dim) for dim in value.dims]
    kept = {i for i, n in enumerate(size) if i >= shift and (same_integer(n, -1) or same_integer(n, own[i - shift]))}
    kept = {i for i in kept if value.dims[i - shift].size != 1 or not op.hinted_dims() or same_integer(size[i], -1)}
    grown = {i for i in range(len(size)) if i not in kept}
    for i in grown:
        if i >= shift and value.dims[i - shift].size != 1:
            raise IllTyped(f"expand of dimension {i - shift}: the local size is {own[i - shift]}, the wanted one {size[i]}", 0)
    sizes = [own[i - shift] if i in kept else n for i, n in enumerate(size)]
    free = op.uniform(sizes, grown)
    dims = tuple(value.dims[i - shift] if i in kept else free[i] for i in range(len(size)))
    used = [cut.axis for dim in dims for cut in dim.cuts]
    if len(used) != len(set(used)):
        raise IllTyped("one mesh axis would cut two dimensions of the expanded value", 0)
    check_disjoint(op, dims, value.partial)
    op.new_args[1] = [dim.size for dim in dims]
    return Type(dims, value.partial, value.zero, value.scaled)


def refuse_cut(op: Op, value: Type, dim: int, doing: str) -> int:
    """The dimension, normalised; raise when it is cut."""
    position = dim % max(value.rank, 1)
    if value.dims[position].cuts:
        raise IllTyped(f"{doing} dimension {position}, which is cut: {op.axes.describe(value)}", 0)
    return position


def select(op: Op, value: Type, dim: int, index: int, *_: Any) -> Type:
    """x[..., index, ...]."""
    position = refuse_cut(op, value, dim, "select from")
    return value.with_dims(value.dims[:position] + value.dims[position + 1 :])


def select_backward(op: Op, gradient: Type, sizes: Sequence[Integer], dim: int, *_: Any) -> Type:
    """Zeros with the gradient at one index."""
    position = dim % len(sizes)
    whole = Dim(_shared(sizes[position]))
    dims = (*gradient.dims[:position], whole, *gradient.dims[position:])
    op.new_args[1] = [d.size for d in dims]
    return Type(dims, gradient.partial, gradient.zero)


def slice_backward(op: Op, gradient: Type, sizes: Sequence[Integer], dim: int, *_: Any) -> Type:
    """Zeros with the gradient in a range."""
    position = dim % len(sizes)
    cut = gradient.dims[position]
    if cut.cuts and not same_integer(sizes[position], op.axes.length(cut)):
        raise IllTyped(f"slice_backward along dimension {position}, which is cut: {op.axes.describe(gradient)}", 0)
    dims = list(gradient.dims)
    if not cut.cuts:
        dims[position] = Dim(_shared(sizes[position]))
    op.new_args[1] = [d.size for d in dims]
    if cut.cuts:
        op.new_args[3], op.new_args[4] = 0, cut.size
    return Type(tuple(dims), gradient.partial, gradient.zero)


def _shared(size: Integer) -> int:
    if isinstance(size, int):
        return size
    raise Untypable("a size differs between ranks in a dimension that is not cut")


def written(op: Op, value: Type, source: Type, dim: int, *_: Any) -> Type:
    """slice_scatter, select_scatter: a range or one index of a whole dimension is overwritten."""
    position = refuse_cut(op, value, dim, "writing into")
    if source.rank == value.rank:
        refuse_cut(op, source, dim, "writing from")
        source = source.with_dims((*source.dims[:position], *source.dims[position + 1 :]))
    rest = value.with_dims((*value.dims[:position], *value.dims[position + 1 :]))
    merged = combine(op, [rest, source], (0, 1))
    if merged.dims != rest.dims or source.dims != rest.dims:
        raise IllTyped(f"{op.axes.describe(source)} is written into {op.axes.describe(value)}", 0, 1)
    return Type(value.dims, merged.partial, merged.zero)


def split(op: Op, value: Type, size: Any, dim: int = 0, *_: Any) -> tuple[Type, ...]:
    """split by length, or by a list of lengths."""
    position = dim % value.rank
    have = value.dims[position]
    local = op.axes.length(have)
    if not isinstance(local, int) or not all(isinstance(n, int) for n in (size if isinstance(size, (list, tuple)) else [size])):
        raise Untypable("split along a dimension cut into uneven pieces")
    lengths = list(size) if isinstance(size, (list, tuple)) else [min(size, local - i) for i in range(0, local, size)]
    pieces = [outer_part(op, value, position, n) for n in lengths]
    if have.cuts:
        op.new_args[1] = [piece.size for piece in pieces]
        op.target = "split_with_sizes"
    return tuple(value.with_dims((*value.dims[:position], piece, *value.dims[position + 1 :])) for piece in pieces)


def outer_part(op: Op, value: Type, position: int, length: int) -> Dim:
    """A range of ``length`` local elements of a dimension, which must consist of whole rows of the factor left of all cuts."""
    dim = value.dims[position]
    if not dim.cuts:
        return Dim(length)
    outer = dim.cuts[0].outer
    local = op.axes.length(dim)
    row = local // outer
    if length % row:
        raise op.wrong(f"a range of dimension {position} is taken, which is cut: {op.axes.describe(value)}", 0)
    rows = length // row
    return Dim(dim.size // outer * rows, tuple(Cut(cut.axis, cut.outer // outer * rows) for cut in dim.cuts))


def unbind(op: Op, value: Type, dim: int = 0, *_: Any) -> tuple[Type, ...]:
    """All the slices of a dimension."""
    position = refuse_cut(op, value, dim, "unbind of")
    return (value.with_dims(value.dims[:position] + value.dims[position + 1 :]),) * value.dims[position].size


def cat(op: Op, values: Sequence[Type], dim: int = 0, *_: Any) -> Type:
    """Join along a dimension."""
    values = [value for value in values if value.shape != (0,)] or list(values)
    position = dim % values[0].rank
    cuts = {value.dims[position].cuts for value in values}
    joined = Dim(sum(value.dims[position].size for value in values))
    if cuts != {()}:
        joined = _joined_cut(op, values, position)
    rest = [value.with_dims((*value.dims[:position], Dim(1), *value.dims[position + 1 :])) for value in values]
    merged = combine(op, rest, (0,) * len(rest)) if len({v.partial for v in rest}) > 1 else rest[0]
    for value in rest:
        if value.dims != rest[0].dims:
            raise IllTyped(
                f"pieces that are cut differently are joined: {op.axes.describe(values[0])} and {op.axes.describe(value)}", 0
            )
    dims = (*merged.dims[:position], joined, *merged.dims[position + 1 :])
    return Type(dims, merged.partial, all(value.zero for value in values))


def _joined_cut(op: Op, values: Sequence[Type], position: int) -> Dim:
    """Joining equal rows [o_k, rest] gives [sum o_k, rest], where rest begins with the cut."""
    rests = set()
    rows = 0
    for value in values:
        dim = value.dims[position]
        outer = dim.cuts[0].outer if dim.cuts else 0
        if not dim.cuts or not op.axes.is_even(dim):
            raise IllTyped(f"values are joined along dimension {position}, which is cut: {op.axes.describe(value)}", 0)
        rests.add((dim.size // outer, tuple(Cut(cut.axis, cut.outer // outer) for cut in dim.cuts)))
        rows += outer
    if len(rests) != 1:
        raise IllTyped(f"pieces of different lengths are joined along dimension {position}, which is cut", 0)
    size, cuts = rests.pop()
    return Dim(size * rows, tuple(Cut(cut.axis, cut.outer * rows) for cut in cuts))


def stack(op: Op, values: Sequence[Type], dim: int = 0, *_: Any) -> Type:
    """Join along a new dimension."""
    merged = combine(op, list(values), (0,) * len(values))
    if any(value.dims != merged.dims for value in values):
        raise IllTyped("values that are cut differently are stacked", 0)
    position = dim % (merged.rank + 1)
    return Type((*merged.dims[:position], Dim(len(values)), *merged.dims[position:]), merged.partial, merged.zero)


def along_dims(op: Op, value: Type, dims: Any = None, *_: Any) -> Type:
    """flip, roll-like ops and others that mix elements along some dimensions and keep their sizes."""
    for dim in [dims] if isinstance(dims, int) else dims:
        refuse_cut(op, value, dim, "elements are moved along")
    return Type(value.dims, value.partial, value.zero)


def roll(op: Op, value: Type, shifts: Any, dims: Any = (), *_: Any) -> Type:
    """roll(x, shifts, dims)."""
    return along_dims(op, value, dims if dims or dims == 0 else range(value.rank))


def triangle(op: Op, value: Type, *_: Any) -> Type:
    """tril, triu: the last two dimensions must be whole."""
    for dim in (-2, -1):
        refuse_cut(op, value, dim, "the triangle of a matrix needs")
    return Type(value.dims, value.partial, value.zero)


def repeat(op: Op, value: Type, repeats: Sequence[int], *_: Any) -> Type:
    """Tile a value; a repeated dimension must be whole."""
    shift = len(repeats) - value.rank
    dims = []
    for i, count in enumerate(repeats):
        dim = value.dims[i - shift] if i >= shift else Dim(1)
        if count != 1:
            if dim.cuts:
                raise IllTyped(f"repeat of dimension {i - shift}, which is cut: {op.axes.describe(value)}", 0)
            dim = Dim(dim.size * count)
        dims.append(dim)
    return Type(tuple(dims), value.partial, value.zero)


def diagonal(op: Op, value: Type, offset: int = 0, first: int = 0, second: int = 1, *_: Any) -> Type:
    """The diagonal of two whole dimensions, appended as the last one."""
    i, j = refuse_cut(op, value, first, "diagonal of"), refuse_cut(op, value, second, "diagonal of")
    rows, columns = value.dims[i].size + min(offset, 0), value.dims[j].size - max(offset, 0)
    kept = tuple(dim for k, dim in enumerate(value.dims) if k not in (i, j))
    return Type((*kept, Dim(max(min(rows, columns), 0))), value.partial, value.zero)


def complex_view(op: Op, value: Type, *_: Any) -> Type:
    """view_as_complex: the last dimension of size 2 disappears."""
    refuse_cut(op, value, -1, "view_as_complex of")
    return Type(value.dims[:-1], value.partial, value.zero)


def real_view(op: Op, value: Type, *_: Any) -> Type:
    """view_as_real: a last dimension of size 2 appears."""
    return Type((*value.dims, Dim(2)), value.partial, value.zero)
