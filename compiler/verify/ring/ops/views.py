"""Views, joins and copies: rearrangements of elements, without arithmetic.

The frequent ops shift dimensions past the leading component axis; the rest are applied to each of the four component arrays.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from ..algebra import Algebra
from ..value import RingTensor, Value

aten = torch.ops.aten


def dims_of(x: RingTensor, dim: int | Sequence[int] | None) -> list[int]:
    """Non-negative dims; all of them for None or an empty list."""
    if dim is None or (isinstance(dim, (list, tuple)) and not dim):
        return list(range(x.ndim))
    chosen = [dim] if isinstance(dim, int) else list(dim)
    return [d % x.ndim for d in chosen] if x.ndim else []


def view(alg: Algebra, x: RingTensor, shape: Sequence[int]) -> RingTensor:
    """Reshape, -1 allowed."""
    size = list(shape)
    if -1 in size:
        rest = math.prod(n for n in size if n != -1)
        size[size.index(-1)] = x.data[0].numel() // max(rest, 1)
    return x.map(lambda t: t.reshape(4, *size) if t.shape == x.data.shape else t.expand(x.data.shape).reshape(4, *size))


def permute(alg: Algebra, x: RingTensor, dims: Sequence[int]) -> RingTensor:
    """permute."""
    order = [0, *[d % x.ndim + 1 for d in dims]]
    return x.map(lambda t: t.permute(order))


def transpose(alg: Algebra, x: RingTensor, first: int, second: int) -> RingTensor:
    """transpose.int."""
    if x.ndim == 0:
        return x
    return x.map(lambda t: t.transpose(first % x.ndim + 1, second % x.ndim + 1))


def t(alg: Algebra, x: RingTensor) -> RingTensor:
    """Transpose of a matrix; vectors stay."""
    return x.map(lambda d: d.transpose(1, 2)) if x.ndim == 2 else x


def unsqueeze(alg: Algebra, x: RingTensor, dim: int) -> RingTensor:
    """A new dimension of size 1."""
    axis = dim % (x.ndim + 1) + 1
    return x.map(lambda t: t.unsqueeze(axis))


def squeeze(alg: Algebra, x: RingTensor, dim: int | Sequence[int] | None = None) -> RingTensor:
    """Drop dimensions of size 1."""
    chosen = dims_of(x, dim)
    return view(alg, x, [n for i, n in enumerate(x.shape) if i not in chosen or n != 1])


def expand(alg: Algebra, x: RingTensor, shape: Sequence[int], implicit: bool = False) -> RingTensor:
    """Broadcast to a shape, -1 keeps."""
    x = x.rank(len(shape))
    size = [x.shape[i] if n == -1 else n for i, n in enumerate(shape)]
    return x.map(lambda t: t.expand(4, *size))


def slice_(
    alg: Algebra, x: RingTensor, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1
) -> RingTensor:
    """x[..., start:end:step, ...]."""
    index = (slice(None),) * (dim % x.ndim + 1) + (slice(start, end, step),)
    return x.map(lambda t: t[index])


def narrow(x: RingTensor, dim: int, start: int, length: int) -> RingTensor:
    """A range of one dimension; also of the known value."""
    result = x.map(lambda t: t.narrow(dim + 1, start, length) if t.shape[dim + 1] == x.shape[dim] else t)
    if x.known is not None:
        result.known = x.known.narrow(dim, start, length)
    return result


def select(alg: Algebra, x: RingTensor, dim: int, index: int) -> RingTensor:
    """One index of a dimension."""
    axis = dim % x.ndim + 1
    return x.map(lambda t: t.select(axis, index))


def join(alg: Algebra, tensors: Sequence[Value], dim: int = 0) -> RingTensor:
    """cat; empty vectors are skipped as torch does."""
    lifted = [alg.lift(x) for x in tensors]
    values = [x for x in lifted if x.shape != (0,)] or lifted[:1]
    axis = dim % values[0].ndim + 1
    factor = None
    if any(x.factor is not None for x in values):
        factor = torch.cat([alg.factor_of(x).expand(4, *x.shape) for x in values], axis)
    result = RingTensor(torch.cat([x.data for x in values], axis), factor, any(x.loose for x in values), values[0].dtype)
    if all(x.known is not None for x in values):
        result.known = torch.cat([x.known for x in values if x.known is not None], axis - 1)
    return result


def stack(alg: Algebra, tensors: Sequence[Value], dim: int = 0) -> RingTensor:
    """stack."""
    return join(alg, [unsqueeze(alg, alg.lift(x), dim) for x in tensors], dim % (len(alg.lift(tensors[0]).shape) + 1))


def split(alg: Algebra, x: RingTensor, sizes: int | Sequence[int], dim: int = 0) -> list[RingTensor]:
    """split and split_with_sizes."""
    axis = dim % x.ndim
    length = x.shape[axis]
    if isinstance(sizes, int):
        sizes = [min(sizes, length - start) for start in range(0, length, sizes)] or [0]
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    return [narrow(x, axis, start, size) for start, size in zip(starts, sizes, strict=True)]


def unbind(alg: Algebra, x: RingTensor, dim: int = 0) -> list[RingTensor]:
    """All indices of one dimension."""
    return [select(alg, x, dim, i) for i in range(x.shape[dim % x.ndim])]


def copy(alg: Algebra, target: Value, source: Value, **options: Any) -> RingTensor:
    """The source in the target's shape."""
    return expand(alg, alg.lift(source), list(target.shape))


def tensor_split(alg: Algebra, x: RingTensor, pieces: int | Sequence[int], dim: int = 0) -> list[RingTensor]:
    """Pieces of nearly equal length, or between the given positions."""
    axis = dim % x.ndim
    places = torch.tensor_split(torch.arange(x.shape[axis]), pieces)
    starts = itertools.accumulate((len(place) for place in places), initial=0)
    return [narrow(x, axis, start, len(place)) for start, place in zip(starts, places, strict=False)]


def as_strided(alg: Algebra, x: RingTensor, size: Sequence[int], stride: Sequence[int], offset: int | None = None) -> RingTensor:
    """Elements of a contiguous tensor by their places in memory, which are counted from its own first element."""
    places = torch.arange(x.numel()).as_strided(list(size), list(stride), offset or 0)
    return x.map(lambda t: t.expand(4, *x.shape).reshape(4, -1)[:, places])


def by_rows(op: Any) -> Callable[..., RingTensor]:
    """Apply a rearranging op to each component array; it must not fill in zeros."""

    def apply(alg: Algebra, x: Value, *arguments: Any, **options: Any) -> RingTensor:
        return alg.lift(x).map(lambda t: torch.stack([op(row, *arguments, **options) for row in t]))

    return apply


def by_rows_filling(op: Any) -> Callable[..., RingTensor]:
    """The same for an op that fills in zeros: under a log the filling is 1 (so the entry is 0, not -inf)."""

    def apply(alg: Algebra, x: Value, *arguments: Any, **options: Any) -> RingTensor:
        value = alg.lift(x)

        def rows(t: torch.Tensor) -> torch.Tensor:
            return torch.stack([op(row, *arguments, **options) for row in t])

        factor = value.factor
        if factor is not None:
            one = alg.ring.ones(factor.shape[1:])
            filled = rows(alg.ring.reduce(factor.expand(value.data.shape) - one))
            factor = alg.ring.reduce(filled + alg.ring.ones(filled.shape[1:]))
        return RingTensor(rows(value.data), factor, value.loose, value.dtype)

    return apply


def pad(alg: Algebra, x: RingTensor, widths: Sequence[int], value: float = 0) -> RingTensor:
    """constant_pad_nd with any constant (-inf included)."""
    filled = by_rows_filling(aten.constant_pad_nd)(alg, x, widths)
    if value == 0:
        return filled
    inside = aten.constant_pad_nd(torch.ones(x.shape, dtype=torch.int64), widths).bool()
    return alg.where(inside, filled, value)


VIEWS: dict[Any, Callable[..., Any]] = {
    aten.view: view,
    aten._unsafe_view: view,
    aten.reshape: view,
    aten.permute: permute,
    aten.transpose: transpose,
    aten.t: t,
    aten.unsqueeze: unsqueeze,
    aten.squeeze: squeeze,
    aten.expand: expand,
    aten.slice: slice_,
    aten.select: select,
    aten.cat: join,
    aten.stack: stack,
    aten.split: split,
    aten.unsafe_split: split,
    aten.split_with_sizes: split,
    aten.unbind: unbind,
    aten.copy: copy,
    aten.constant_pad_nd: pad,
    **{op: by_rows(op) for op in (aten.flip, aten.roll, aten.repeat, aten.diagonal, aten.unfold, aten.narrow, aten.movedim)},
    aten.as_strided: as_strided,
    aten.tensor_split: tensor_split,
    aten.real: lambda alg, x: alg.lift(x),
    **{op: by_rows_filling(op) for op in (aten.tril, aten.triu, aten.slice_backward, aten.select_backward, aten.diagonal_backward)},
}
