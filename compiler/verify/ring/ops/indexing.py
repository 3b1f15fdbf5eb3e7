"""Gathers and scatters by concrete integer indices. Accumulation is exact: int64 sums of reduced components."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from ....errors import UnsupportedError
from ..algebra import Algebra
from ..value import RingTensor, Value
from .views import by_rows, by_rows_filling

aten = torch.ops.aten

Index = Sequence[torch.Tensor | None]


def _rows(alg: Algebra, op: Callable[..., torch.Tensor], *values: RingTensor) -> RingTensor:
    """op on each component of settled values, reduced."""
    settled = [alg.settle(v) for v in values]
    rows = [op(*components) for components in zip(*[v.data for v in settled], strict=True)]
    return RingTensor(alg.ring.reduce(torch.stack(rows)), None, any(v.loose for v in settled), values[0].dtype)


def _selected(alg: Algebra, op: Callable[..., torch.Tensor], *values: RingTensor) -> RingTensor:
    """op that only moves elements of several values; log parts move along."""
    data = torch.stack([op(*components) for components in zip(*[v.data for v in values], strict=True)])
    factor = None
    if any(v.factor is not None for v in values):
        factors = [alg.factor_of(v).expand(v.data.shape) for v in values]
        factor = torch.stack([op(*components) for components in zip(*factors, strict=True)])
    return RingTensor(data, factor, any(v.loose for v in values), values[0].dtype)


def index(alg: Algebra, x: RingTensor, indices: Index) -> RingTensor:
    """Advanced indexing."""
    return x.map(lambda t: torch.stack([aten.index(row, indices) for row in t]))


def embedding(alg: Algebra, weight: RingTensor, indices: torch.Tensor, *options: Any, **more: Any) -> RingTensor:
    """Rows of the weight."""
    return weight.map(lambda t: t[:, indices])


def embedding_dense_backward(
    alg: Algebra,
    grad: RingTensor,
    indices: torch.Tensor,
    rows: int,
    padding: int,
    scale_by_frequency: bool,
) -> RingTensor:
    """Sum of the gradients of each row; rows of the padding index get none."""
    grad = alg.settle(grad)
    width = grad.shape[-1]
    flat, position = grad.data.reshape(4, -1, width), indices.reshape(-1)
    flat = torch.where((position == padding)[None, :, None], 0, flat) if padding >= 0 else flat
    total = torch.zeros((4, rows, width), dtype=torch.int64).index_add_(1, position, flat)
    result = RingTensor(alg.ring.reduce(total), None, grad.loose, grad.dtype)
    if scale_by_frequency:
        counts = torch.bincount(position, minlength=rows).clamp_(min=1)
        result = alg.div(result, alg.lift(counts[:, None]))
    return result


def index_put(alg: Algebra, x: Value, indices: Index, values: Value, accumulate: bool = False) -> RingTensor:
    """x with values written, or added, at the indices."""
    target, source = alg.lift(x), alg.lift(values)
    if accumulate:
        return _rows(alg, lambda a, b: aten.index_put(a, indices, b, accumulate=True), target, source)
    return _selected(alg, lambda a, b: aten.index_put(a, indices, b), target, source)


def index_add(alg: Algebra, x: Value, dim: int, indices: torch.Tensor, source: Value, alpha: float = 1) -> RingTensor:
    """x with alpha * source added at the indices of one dim."""
    added = alg.lift(source) if alpha == 1 else alg.mul(source, alpha)
    return _rows(alg, lambda a, b: a.index_add(dim, indices, b), alg.lift(x), added)


def index_copy(alg: Algebra, x: Value, dim: int, indices: torch.Tensor, source: Value) -> RingTensor:
    """x with source written at the indices of one dim."""
    return _selected(alg, lambda a, b: a.index_copy(dim, indices, b), alg.lift(x), alg.lift(source))


def scatter(alg: Algebra, x: Value, dim: int, indices: torch.Tensor, source: Value, reduce: str = "") -> RingTensor:
    """scatter of a tensor or a number; reduce: "" or "add"."""
    value = alg.lift(source)
    if reduce not in ("", "add"):
        raise UnsupportedError(f"unsupported(scatter with reduce={reduce!r})")
    if value.ndim == 0:
        value = value.map(lambda t: t.view(4, *([1] * indices.dim())).expand(4, *indices.shape))
    if reduce:
        return scatter_add(alg, x, dim, indices, value)
    return _selected(alg, lambda a, b: a.scatter(dim, indices, b), alg.lift(x), value)


def scatter_add(alg: Algebra, x: Value, dim: int, indices: torch.Tensor, source: Value) -> RingTensor:
    """scatter_add."""
    return _rows(alg, lambda a, b: a.scatter_add(dim, indices, b), alg.lift(x), alg.lift(source))


def select_scatter(alg: Algebra, x: Value, source: Value, dim: int, index: int) -> RingTensor:
    """x with one index of a dim replaced."""
    return _selected(alg, lambda a, b: aten.select_scatter(a, b, dim, index), alg.lift(x), alg.lift(source))


def slice_scatter(
    alg: Algebra, x: Value, source: Value, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1
) -> RingTensor:
    """x with a slice of a dim replaced."""
    return _selected(alg, lambda a, b: aten.slice_scatter(a, b, dim, start, end, step), alg.lift(x), alg.lift(source))


def masked_scatter(alg: Algebra, x: Value, mask: torch.Tensor, source: Value) -> RingTensor:
    """x with the masked places filled from source in order."""
    return _selected(alg, lambda a, b: a.masked_scatter(mask, b), alg.lift(x), alg.lift(source))


INDEXING: dict[Any, Callable[..., Any]] = {
    aten.index: index,
    aten._unsafe_index: index,
    aten.index_select: by_rows(aten.index_select),
    aten.gather: by_rows(aten.gather),
    aten.take_along_dim: by_rows(aten.take_along_dim),
    aten.embedding: embedding,
    aten.embedding_dense_backward: embedding_dense_backward,
    aten.index_put: index_put,
    aten._unsafe_index_put: index_put,
    aten.index_add: index_add,
    aten.index_copy: index_copy,
    aten.scatter: scatter,
    aten.scatter_add: scatter_add,
    aten.select_scatter: select_scatter,
    aten.slice_scatter: slice_scatter,
    aten.masked_scatter: masked_scatter,
    aten.masked_select: by_rows(aten.masked_select),
    aten.repeat_interleave: by_rows(aten.repeat_interleave),
    aten.diag_embed: by_rows_filling(aten.diag_embed),
}
