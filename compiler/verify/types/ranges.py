"""Type rules of ranges and paddings, whose bounds may differ between ranks.

x[offset_r : offset_r + length_r]  of a whole dimension      -> that dimension cut        (R -> S, nothing is sent)
pad to the longest chunk           of an uneven cut          -> an even cut, longer        (zeros at the global end)
x[: length_r]                      of such a padded cut      -> the uneven cut again
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from .pointwise import refuse_partial
from .problem import IllTyped, Op, Untypable
from .value import Dim, Integer, Type, same_integer
from .views import outer_part, refuse_cut


def slice_(op: Op, value: Type, dim: int = 0, start: Any = None, end: Any = None, step: Any = 1, *_: Any) -> Type:
    """slice(x, dim, start, end, step)."""
    position = dim % max(value.rank, 1)
    have = value.dims[position]
    local = op.axes.length(have)
    first = _bound(start, local, 0)
    last = _bound(end, local, local)
    if isinstance(step, int) and step != 1:
        refuse_cut(op, value, position, "a slice with a step along")
        if not isinstance(first, int) or not isinstance(last, int):
            raise Untypable("a slice with a step whose bounds differ between ranks")
        return _with(value, position, Dim(len(range(first, last, step))))
    made = ranged(op, value, position, first, last)
    if 2 not in op.new_args:
        op.new_args[2], op.new_args[3] = (0, made.size) if made.cuts else (first, last)
    return _with(value, position, made)


def narrow(op: Op, value: Type, dim: int, start: Integer, length: Integer, *_: Any) -> Type:
    """narrow(x, dim, start, length)."""
    position = dim % max(value.rank, 1)
    made = ranged(op, value, position, start, start + length)
    first = op.new_args.get(2, 0 if made.cuts else start)
    op.new_args[2], op.new_args[3] = first, made.size
    return _with(value, position, made)


def _with(value: Type, position: int, dim: Dim) -> Type:
    return value.with_dims((*value.dims[:position], dim, *value.dims[position + 1 :]))


def _bound(bound: Any, local: Integer, default: Integer) -> Integer:
    if bound is None:
        return default
    if isinstance(bound, int) and isinstance(local, int):
        return min(max(bound + local if bound < 0 else bound, 0), local)
    return np.minimum(np.where(np.asarray(bound) < 0, bound + np.asarray(local), bound), local)


def ranged(op: Op, value: Type, position: int, first: Integer, last: Integer) -> Dim:
    """The dimension after taking [first, last) of the local elements."""
    have = value.dims[position]
    local = op.axes.length(have)
    if same_integer(first, 0) and same_integer(last, local):
        return have
    if isinstance(first, int) and isinstance(last, int):
        if have.cuts and first == 0 and not op.axes.is_even(have):
            raise op.wrong(f"a range of dimension {position} is taken, which is cut: {op.axes.describe(value)}", 0)
        return Dim(max(last - first, 0)) if not have.cuts else _rows(op, value, position, first, last)
    if same_integer(first, 0) and have.cuts:
        return _trimmed(op, value, position, last)
    return _own_chunk(op, value, position, first, last)


def _rows(op: Op, value: Type, position: int, first: int, last: int) -> Dim:
    made = outer_part(op, value, position, max(last - first, 0))
    row = op.axes.length(value.dims[position]) // value.dims[position].cuts[0].outer
    if first % row:
        raise op.wrong(f"a range of dimension {position} is taken, which is cut: {op.axes.describe(value)}", 0)
    if value.dims[position].cuts[0].outer > 1:
        whole_row = value.dims[position].size // value.dims[position].cuts[0].outer
        op.new_args[2], op.new_args[3] = first // row * whole_row, last // row * whole_row
    return made


def _trimmed(op: Op, value: Type, position: int, last: Integer) -> Dim:
    """A padded even cut, trimmed to the chunks of a shorter dimension."""
    have = value.dims[position]
    total = int(np.broadcast_to(last, [op.axes.parts[i] if n > 1 else 1 for i, n in enumerate(last.shape)]).sum())
    outer = [cut.axis for cut in have.cuts]
    repeats = op.axes.product([cut for cut in have.cuts if last.shape[cut.axis] == 1])
    made = op.axes.prefix(total * repeats, outer)
    if len(have.cuts) > 1 or have.cuts[0].outer != 1:
        raise Untypable("nested uneven chunks")
    if made.cuts != have.cuts or not same_integer(op.axes.length(made), last):
        raise op.wrong(f"the pieces of dimension {position} are trimmed to lengths that are not the chunks of one dimension", 0)
    return made


def _own_chunk(op: Op, value: Type, position: int, first: Integer, last: Integer) -> Dim:
    """R -> S: the ranges [first, last) along one more axis are the chunks of what was there."""
    have = value.dims[position]
    length = last - first
    used = {cut.axis for cut in have.cuts}
    spread = {axis for array in (first, last) if not isinstance(array, int) for axis, n in enumerate(array.shape) if n > 1}
    added = sorted(axis for axis in spread - used)
    if len(added) != 1:
        raise Untypable("a range whose bounds differ between ranks along several new axes")
    if added[0] in value.cut_axes() or value.partial[added[0]]:
        raise op.wrong(f"each rank takes its own range, but the value is already {op.axes.describe(value)}", 0)
    made = op.axes.prefix(have.size, [*(cut.axis for cut in have.cuts), added[0]])
    if made.cuts[:-1] != have.cuts or have.granule != 1:
        raise Untypable("a chunk of a strided dimension")
    before = op.axes.length(have)
    chunk = -(-before // op.axes.parts[added[0]])
    starts = np.minimum(op.axes.index[added[0]] * chunk, before)
    if not same_integer(op.axes.length(made), length) or not _same_where(starts, first, length):
        raise IllTyped(f"the ranges that the ranks take of dimension {position} are not its chunks: {_ranges(first, last)}", 0)
    return made


def _same_where(expected: Any, found: Any, length: Any) -> bool:
    """Starts must agree where the range is not empty."""
    return bool(np.all((np.asarray(expected) == np.asarray(found)) | (np.asarray(length) <= 0)))


def _ranges(first: Integer, last: Integer) -> str:
    pairs = np.broadcast_arrays(first, last)
    return ", ".join(f"{a}:{b}" for a, b in zip(*(array.flat[:4] for array in pairs), strict=True))


def pad(op: Op, value: Type, amounts: Sequence[Integer], fill: Any = 0, *_: Any) -> Type:
    """constant_pad_nd, last dimension first."""
    if fill not in (0, 0.0, None):
        refuse_partial(op, [value], "padding with a constant by")
    dims = list(value.dims)
    erased: list[int] = []
    for i in range(len(amounts) // 2):
        position = value.rank - 1 - i
        before, after = amounts[2 * i], amounts[2 * i + 1]
        dims[position] = _padded(op, value, position, before, after)
        grown = dims[position].size - value.dims[position].size
        erased += [before, after] if not dims[position].cuts else [0, grown]
    op.new_args[1] = erased
    return Type(tuple(dims), value.partial, value.zero)


def _padded(op: Op, value: Type, position: int, before: Integer, after: Integer) -> Dim:
    have = value.dims[position]
    if same_integer(before, 0) and same_integer(after, 0):
        return have
    if not have.cuts:
        if isinstance(before, int) and isinstance(after, int):
            return Dim(have.size + before + after)
        raise Untypable("a whole dimension is padded by amounts that differ between ranks")
    made = op.axes.length(have) + after
    pieces = op.axes.product(have.cuts)
    longest = op.axes.first_rank(op.axes.length(have))
    if not same_integer(before, 0) or not same_integer(made, longest):
        raise Untypable(f"padding inside dimension {position}, which is cut: {op.axes.describe(value)}")
    even = op.axes.prefix(longest * pieces, [cut.axis for cut in have.cuts])
    if have.granule != 1 or not _only_at_the_end(op, have, longest):
        raise Untypable("the padding of nested uneven chunks does not lie at the end")
    return even


def _only_at_the_end(op: Op, have: Dim, longest: int) -> bool:
    """Whether chunk k holds [k * longest, ...) of the dimension: then all zeros follow the last element."""
    lengths = np.broadcast_to(
        op.axes.length(have), [op.axes.parts[i] if any(c.axis == i for c in have.cuts) else 1 for i in range(len(op.axes.parts))]
    )
    order = [cut.axis for cut in have.cuts]
    rest = [axis for axis in range(lengths.ndim) if axis not in order]
    row = lengths.transpose(order + rest).reshape(-1)
    expected = np.clip(have.size - np.arange(row.size) * longest, 0, longest)
    return bool((row == expected).all())
