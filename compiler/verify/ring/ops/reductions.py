"""Sums, means, variances, extremes, sorting and softmax."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from ..algebra import Algebra
from ..order import extreme, maximum, minimum, real_key, take
from ..value import RingTensor, Value
from .views import dims_of

aten = torch.ops.aten

Dims = int | Sequence[int] | None


def sum_(alg: Algebra, x: Value, dim: Dims = None, keepdim: bool = False, dtype: torch.dtype | None = None) -> RingTensor:
    """sum."""
    value = alg.lift(x)
    result = alg.sum(value, dims_of(value, dim), keepdim=keepdim)
    return RingTensor(result.data, result.factor, result.loose, dtype or result.dtype)


def count(x: RingTensor, dim: Dims) -> int:
    """Number of elements that a reduction joins."""
    return math.prod(x.shape[d] for d in dims_of(x, dim))


def mean(alg: Algebra, x: Value, dim: Dims = None, keepdim: bool = False, dtype: torch.dtype | None = None) -> RingTensor:
    """mean."""
    value = alg.lift(x)
    return alg.div(sum_(alg, value, dim, keepdim, dtype), count(value, dim))


def moments(alg: Algebra, x: RingTensor, dim: Dims, correction: float, *, keepdim: bool) -> tuple[RingTensor, RingTensor]:
    """(variance, mean)."""
    centre = mean(alg, x, dim, keepdim=True)
    spread = alg.sub(x, centre)
    variance = alg.div(sum_(alg, alg.mul(spread, spread), dim, keepdim), count(x, dim) - correction)
    return variance, centre if keepdim else mean(alg, x, dim)


def var_mean(alg: Algebra, x: RingTensor, dim: Dims = None, correction: float | None = 1, keepdim: bool = False) -> Any:
    """(variance, mean); the second argument is ``unbiased`` in the oldest overload."""
    if isinstance(dim, bool):
        return moments(alg, x, None, int(dim), keepdim=False)
    return moments(alg, x, dim, 1 if correction is None else correction, keepdim=keepdim)


def var(alg: Algebra, x: RingTensor, dim: Dims = None, correction: float | None = 1, keepdim: bool = False) -> RingTensor:
    """Variance."""
    result: RingTensor = var_mean(alg, x, dim, correction, keepdim)[0]
    return result


def std(alg: Algebra, x: RingTensor, dim: Dims = None, correction: float | None = 1, keepdim: bool = False) -> RingTensor:
    """Root of the variance."""
    return alg.power(var(alg, x, dim, correction, keepdim), 0.5)


def cumsum(alg: Algebra, x: Value, dim: int, dtype: torch.dtype | None = None) -> RingTensor:
    """Running sum."""
    value = alg.settle(alg.lift(x))
    if value.ndim == 0:
        return value
    return RingTensor(alg.ring.reduce(value.data.cumsum(dim % value.ndim + 1)), None, value.loose, dtype or value.dtype)


def cumprod(alg: Algebra, x: Value, dim: int, dtype: torch.dtype | None = None) -> RingTensor:
    """Running product."""
    value = alg.settle(alg.lift(x))
    if value.ndim == 0:
        return value
    pieces = value.data.unbind(dim % value.ndim + 1)
    running = [pieces[0]] if pieces else []
    for piece in pieces[1:]:
        running.append(alg.ring.mul(running[-1], piece))
    data = torch.stack(running, dim % value.ndim + 1) if running else value.data
    return RingTensor(data, None, value.loose, dtype or value.dtype)


def prod(alg: Algebra, x: Value, dim: Dims = None, keepdim: bool = False, dtype: torch.dtype | None = None) -> RingTensor:
    """Product."""
    value = alg.settle(alg.lift(x))
    return RingTensor(alg.ring.product(value.data, dims_of(value, dim), keepdim=keepdim), None, value.loose, dtype or value.dtype)


def vector_norm(
    alg: Algebra,
    x: RingTensor,
    order: float = 2,
    dim: Dims = None,
    keepdim: bool = False,
    dtype: torch.dtype | None = None,
) -> RingTensor:
    """Euclidean norm by the root map; 1 and infinity norms by signs and order; other even orders by a keyed power."""
    if order == 2:
        return alg.power(sum_(alg, alg.mul(x, x), dim, keepdim), 0.5)
    size = maximum(alg, x, alg.neg(x))
    if order == 1:
        return sum_(alg, size, dim, keepdim)
    if order in (math.inf, -math.inf):
        return extreme(alg, size, dims_of(x, dim), keepdim=keepdim, largest=order > 0)
    return alg.power(sum_(alg, alg.power(size, order), dim, keepdim), 1 / order)


def amax(alg: Algebra, x: RingTensor, dim: Dims = (), keepdim: bool = False) -> RingTensor:
    """Largest."""
    return extreme(alg, x, dims_of(x, dim), keepdim=keepdim)


def amin(alg: Algebra, x: RingTensor, dim: Dims = (), keepdim: bool = False) -> RingTensor:
    """Smallest."""
    return extreme(alg, x, dims_of(x, dim), keepdim=keepdim, largest=False)


def _extreme_op(*, largest: bool) -> Callable[..., Any]:
    def apply(alg: Algebra, x: RingTensor, dim: Any = None, keepdim: bool = False) -> Any:
        if isinstance(dim, RingTensor):
            return maximum(alg, x, dim) if largest else minimum(alg, x, dim)
        if dim is None:
            return extreme(alg, x, dims_of(x, None), keepdim=False, largest=largest)
        if x.ndim == 0:
            return x, torch.zeros((), dtype=torch.int64)
        key, axis = real_key(alg, x), dim % x.ndim
        position = key.argmax(axis, keepdim=True) if largest else key.argmin(axis, keepdim=True)
        values = take(x, axis, position)
        return (values, position) if keepdim else (values.map(lambda t: t.squeeze(axis + 1)), position.squeeze(axis))

    return apply


def argmax(alg: Algebra, x: RingTensor, dim: int | None = None, keepdim: bool = False) -> torch.Tensor:
    """Position of the largest."""
    return real_key(alg, x).argmax(dim, keepdim)


def argmin(alg: Algebra, x: RingTensor, dim: int | None = None, keepdim: bool = False) -> torch.Tensor:
    """Position of the smallest."""
    return real_key(alg, x).argmin(dim, keepdim)


def topk(alg: Algebra, x: RingTensor, k: int, dim: int = -1, largest: bool = True, sorted: bool = True) -> Any:
    """The k largest, in order; ties by position."""
    position = torch.sort(real_key(alg, x), dim=dim, descending=largest, stable=True).indices.narrow(dim, 0, k)
    return take(x, dim % x.ndim, position), position


def sort(alg: Algebra, x: RingTensor, dim: int = -1, descending: bool = False, stable: bool | None = None) -> Any:
    """Stable sort (any stable order is a legal result of an unstable one)."""
    position = torch.sort(real_key(alg, x), dim=dim, descending=descending, stable=True).indices
    return take(x, dim % x.ndim, position), position


def argsort(alg: Algebra, x: RingTensor, dim: int = -1, descending: bool = False, stable: bool | None = None) -> torch.Tensor:
    """Positions of ``sort``."""
    return torch.sort(real_key(alg, x), dim=dim, descending=descending, stable=True).indices


def softmax(alg: Algebra, x: Value, dim: int, half_to_float: Any = False) -> RingTensor:
    """exp(x) / sum exp(x)."""
    e = alg.exp(x)
    return alg.mul(e, alg.reciprocal(sum_(alg, e, dim, keepdim=True)))


def safe_softmax(alg: Algebra, x: Value, dim: int, dtype: torch.dtype | None = None) -> RingTensor:
    """softmax, and zeros where every entry is -inf."""
    value = alg.lift(x)
    e = alg.exp(value)
    dead = alg.is_minus_infinity(value).all(dim, keepdim=True)
    total = alg.where(dead, 1, sum_(alg, e, dim, keepdim=True))
    return alg.mul(e, alg.reciprocal(total))


def softmax_backward(alg: Algebra, grad: Value, y: Value, dim: int, dtype: torch.dtype) -> RingTensor:
    """g y - y sum(g y)."""
    product = alg.mul(grad, y)
    return alg.sub(product, alg.mul(y, sum_(alg, product, dim, keepdim=True)))


def logsumexp(alg: Algebra, x: Value, dim: Dims, keepdim: bool = False) -> RingTensor:
    """log sum exp(x)."""
    return alg.log(sum_(alg, alg.exp(x), dim, keepdim))


def log_softmax(alg: Algebra, x: Value, dim: int, half_to_float: Any = False) -> RingTensor:
    """x - logsumexp(x)."""
    return alg.sub(x, logsumexp(alg, x, dim, keepdim=True))


def log_softmax_backward(alg: Algebra, grad: Value, y: Value, dim: int, dtype: torch.dtype) -> RingTensor:
    """g - exp(y) sum(g)."""
    return alg.sub(grad, alg.mul(alg.exp(y), sum_(alg, grad, dim, keepdim=True)))


def count_nonzero(alg: Algebra, x: RingTensor, dim: Any = None) -> torch.Tensor:
    """Entries that are not 0."""
    nonzero = (x.data != 0).any(0) | alg.is_minus_infinity(x)
    return nonzero.sum() if dim is None else nonzero.sum(dim)


REDUCTIONS: dict[Any, Callable[..., Any]] = {
    aten.sum: sum_,
    aten.mean: mean,
    aten.var: var,
    aten.std: std,
    aten.var_mean: var_mean,
    aten.cumsum: cumsum,
    aten.cumprod: cumprod,
    aten.prod: prod,
    aten.linalg_vector_norm: vector_norm,
    aten.amax: amax,
    aten.amin: amin,
    aten.max: _extreme_op(largest=True),
    aten.min: _extreme_op(largest=False),
    aten.argmax: argmax,
    aten.argmin: argmin,
    aten.topk: topk,
    aten.sort: sort,
    aten.argsort: argsort,
    aten._softmax: softmax,
    aten.softmax: softmax,
    aten._safe_softmax: safe_softmax,
    aten._softmax_backward_data: softmax_backward,
    aten.logsumexp: logsumexp,
    aten._log_softmax: log_softmax,
    aten.log_softmax: log_softmax,
    aten._log_softmax_backward_data: log_softmax_backward,
    aten.count_nonzero: count_nonzero,
}
