"""Matrix products, convolutions, pooling and resampling: bilinear maps, and linear maps with integer coefficients."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from ..algebra import Algebra
from ..order import real_key
from ..value import RingTensor, Value
from .views import expand, view

aten = torch.ops.aten


def matmul(alg: Algebra, x: Value, y: Value) -> RingTensor:
    """mm and bmm; also matmul of ranks >= 1."""
    a, b = alg.lift(x), alg.lift(y)
    if a.ndim >= 2 and b.ndim >= 2:
        return alg.matmul(a, b)
    left = a if a.ndim > 1 else view(alg, a, [1, -1])
    right = b if b.ndim > 1 else view(alg, b, [-1, 1])
    result = alg.matmul(left, right)
    if b.ndim == 1:
        result = result.map(lambda t: t.squeeze(-1))
    if a.ndim == 1:
        result = result.map(lambda t: t.squeeze(-1 if b.ndim == 1 else -2))
    return result


def addmm(alg: Algebra, c: Value, x: Value, y: Value, beta: float = 1, alpha: float = 1) -> RingTensor:
    """beta c + alpha x y."""
    product = matmul(alg, x, y)
    if alpha != 1:
        product = alg.mul(product, alpha)
    return product if beta == 0 else alg.add(product, c if beta == 1 else alg.mul(c, beta))


def addbmm(alg: Algebra, c: Value, x: Value, y: Value, beta: float = 1, alpha: float = 1) -> RingTensor:
    """beta c + alpha sum over the batch of x y."""
    product = alg.mul(alg.sum(alg.matmul(x, y), [0]), alpha)
    return product if beta == 0 else alg.add(product, alg.mul(c, beta))


def _bilinear(alg: Algebra, function: Callable[..., torch.Tensor], x: Value, y: Value, terms: int) -> RingTensor:
    a, b = alg.settle(alg.lift(x)), alg.settle(alg.lift(y))
    return RingTensor(alg.ring.bilinear(function, a.data, b.data, terms), None, a.loose or b.loose, a.dtype)


def convolution(alg: Algebra, x: Value, weight: RingTensor, bias: Value, *settings: Any) -> RingTensor:
    """N-dimensional convolution, grouped and transposed ones included."""
    terms = math.prod(weight.shape[1:]) if not settings[3] else weight.shape[0] * math.prod(weight.shape[2:])
    y = _bilinear(alg, lambda a, b: aten.convolution(a, b, None, *settings), x, weight, terms)
    if bias is None:
        return y
    return alg.add(y, view(alg, alg.lift(bias), [-1] + [1] * (weight.ndim - 2)))


def convolution_backward(
    alg: Algebra,
    grad: Value,
    x: Value,
    weight: Value,
    bias_sizes: Any,
    *settings: Any,
) -> tuple[RingTensor | None, RingTensor | None, RingTensor | None]:
    """Gradients of input and weight are bilinear in (grad, weight) and (grad, input)."""
    *geometry, mask = settings
    g, a, w = alg.lift(grad), alg.lift(x), alg.lift(weight)
    grad_x = grad_w = grad_b = None
    if mask[0]:
        like = torch.zeros(a.shape, dtype=torch.float64)
        terms = w.shape[0] * math.prod(w.shape[1:])

        def by_weight(gg: torch.Tensor, ww: torch.Tensor) -> torch.Tensor:
            result: torch.Tensor = aten.convolution_backward(gg, like, ww, None, *geometry, [True, False, False])[0]
            return result

        grad_x = _bilinear(alg, by_weight, g, w, terms)
    if mask[1]:
        zero = torch.zeros(w.shape, dtype=torch.float64)
        terms = max(g.shape[0] * math.prod(g.shape[2:]), a.shape[0] * math.prod(a.shape[2:]))

        def by_input(gg: torch.Tensor, aa: torch.Tensor) -> torch.Tensor:
            result: torch.Tensor = aten.convolution_backward(gg, aa, zero, None, *geometry, [False, True, False])[1]
            return result

        grad_w = _bilinear(alg, by_input, g, a, terms)
    if mask[2]:
        grad_b = alg.sum(g, [0, *range(2, g.ndim)])
    return grad_x, grad_w, grad_b


def integer_linear(op: Any) -> Callable[..., RingTensor]:
    """A linear op with integer coefficients, exact on float64 components."""

    def apply(alg: Algebra, x: Value, *arguments: Any, **options: Any) -> RingTensor:
        value = alg.settle(alg.lift(x))
        rows = [op(row.double(), *arguments, **options) for row in value.data]
        return RingTensor(alg.ring.reduce(torch.stack(rows).long()), None, value.loose, value.dtype)

    return apply


def _ones(shape: Sequence[int]) -> torch.Tensor:
    return torch.ones(tuple(shape), dtype=torch.float64)


def avg_pool2d(
    alg: Algebra,
    x: RingTensor,
    kernel: Sequence[int],
    stride: Sequence[int] = (),
    padding: Sequence[int] = (0,),
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> RingTensor:
    """Sums of windows over their sizes; the sizes are read off torch's own average of ones."""
    geometry = (kernel, stride, padding, ceil_mode, count_include_pad)
    total = integer_linear(aten.avg_pool2d)(alg, x, *geometry, 1)
    return alg.mul(total, _window_share(alg, x.shape, geometry, divisor_override))


def _window_share(alg: Algebra, shape: Sequence[int], geometry: Any, divisor: int | None) -> RingTensor:
    """1 / (what each window divides by)."""
    if divisor is not None:
        return alg.reciprocal(divisor)
    kernel, stride, padding, ceil_mode, include = geometry
    inside = _ones((1, 1, *shape[-2:]))
    sums = aten.avg_pool2d(inside, kernel, stride, padding, ceil_mode, include, 1)
    sizes = (sums / aten.avg_pool2d(inside, kernel, stride, padding, ceil_mode, include, None)).round().long()
    share = alg.reciprocal(alg.lift(sizes))
    return share if len(shape) == 4 else share.map(lambda t: t.squeeze(1))


def avg_pool2d_backward(
    alg: Algebra,
    grad: RingTensor,
    x: RingTensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    ceil_mode: bool,
    count_include_pad: bool,
    divisor_override: int | None,
) -> RingTensor:
    """The adjoint."""
    geometry = (kernel, stride, padding, ceil_mode, count_include_pad)
    scaled = alg.mul(grad, _window_share(alg, x.shape, geometry, divisor_override))
    return integer_linear(lambda g: aten.avg_pool2d_backward(g, _ones(x.shape), *geometry, 1))(alg, scaled)


def _adaptive_matrix(length: int, parts: int) -> tuple[torch.Tensor, torch.Tensor]:
    """0/1 matrix [parts, length] of the windows that torch's adaptive pooling averages, and their sizes."""
    index = torch.arange(parts)
    start = (index * length) // parts
    end = -((-(index + 1) * length) // parts)
    position = torch.arange(length)
    inside = (position >= start[:, None]) & (position < end[:, None])
    return inside.long(), end - start


def _adaptive(alg: Algebra, shape: Sequence[int], size: Sequence[int]) -> tuple[RingTensor, RingTensor]:
    """Averaging matrices for rows and columns."""
    matrices = []
    for length, parts in zip(shape[-2:], size, strict=True):
        inside, sizes = _adaptive_matrix(length, parts)
        matrices.append(alg.div(alg.lift(inside), alg.lift(sizes[:, None])))
    return matrices[0], matrices[1]


def adaptive_avg_pool2d(alg: Algebra, x: RingTensor, size: Sequence[int]) -> RingTensor:
    """R x C^T with averaging matrices R and C."""
    rows, columns = _adaptive(alg, x.shape, size)
    return alg.matmul(alg.matmul(rows, x), columns.map(lambda t: t.transpose(1, 2)))


def adaptive_avg_pool2d_backward(alg: Algebra, grad: RingTensor, x: RingTensor) -> RingTensor:
    """R^T g C."""
    rows, columns = _adaptive(alg, x.shape, grad.shape[-2:])
    return alg.matmul(alg.matmul(rows.map(lambda t: t.transpose(1, 2)), grad), columns)


def _max_pool(op: Any) -> Callable[..., Any]:
    """Pooling by rank in the order of all entries, so that torch's own geometry picks the positions."""

    def apply(alg: Algebra, x: RingTensor, *geometry: Any) -> tuple[RingTensor, torch.Tensor]:
        spatial = 2 if op is aten.max_pool2d_with_indices else 3
        _, place = torch.unique(real_key(alg, x), return_inverse=True)
        position = op(place.reshape(x.shape).double(), *geometry)[1]
        lead = x.shape[: x.ndim - spatial]
        flat = x.map(lambda t: t.reshape(4, *lead, -1))
        index = position.reshape(*lead, -1)
        taken = flat.map(lambda t: torch.gather(t, t.dim() - 1, index[None].expand(4, *index.shape)))
        return taken.map(lambda t: t.reshape(4, *position.shape)), position

    return apply


def max_pool2d_backward(alg: Algebra, grad: RingTensor, x: RingTensor, *rest: Any) -> RingTensor:
    """Each gradient to the position that won."""
    *_, position = rest
    return _scatter_pool(alg, grad, x, position, 2)


def max_pool3d_backward(alg: Algebra, grad: RingTensor, x: RingTensor, *rest: Any) -> RingTensor:
    """The same in three dimensions."""
    *_, position = rest
    return _scatter_pool(alg, grad, x, position, 3)


def _scatter_pool(alg: Algebra, grad: RingTensor, x: RingTensor, position: torch.Tensor, spatial: int) -> RingTensor:
    lead = x.shape[: x.ndim - spatial]
    grad = alg.settle(expand(alg, grad, list(position.shape)))
    total = torch.zeros((4, *lead, math.prod(x.shape[-spatial:])), dtype=torch.int64)
    index = position.reshape(1, *lead, -1).expand(4, *lead, -1)
    total.scatter_add_(total.dim() - 1, index, grad.data.reshape(4, *lead, -1))
    return RingTensor(alg.ring.reduce(total).reshape(4, *x.shape), None, grad.loose, grad.dtype)


LINEAR: dict[Any, Callable[..., Any]] = {
    aten.mm: matmul,
    aten.bmm: matmul,
    aten.matmul: matmul,
    aten.mv: matmul,
    aten.dot: matmul,
    aten.vdot: matmul,
    aten.addmm: addmm,
    aten.addmv: addmm,
    aten.baddbmm: addmm,
    aten.addbmm: addbmm,
    aten.convolution: convolution,
    aten.convolution_backward: convolution_backward,
    aten.avg_pool2d: avg_pool2d,
    aten.avg_pool2d_backward: avg_pool2d_backward,
    aten._adaptive_avg_pool2d: adaptive_avg_pool2d,
    aten._adaptive_avg_pool2d_backward: adaptive_avg_pool2d_backward,
    aten.max_pool2d_with_indices: _max_pool(aten.max_pool2d_with_indices),
    aten.max_pool2d_with_indices_backward: max_pool2d_backward,
    aten.max_pool3d_with_indices: _max_pool(aten.max_pool3d_with_indices),
    aten.max_pool3d_with_indices_backward: max_pool3d_backward,
    **{
        op: integer_linear(op)
        for op in (
            aten.upsample_nearest1d,
            aten.upsample_nearest1d_backward,
            aten.upsample_nearest2d,
            aten.upsample_nearest2d_backward,
            aten.im2col,
            aten.col2im,
            aten.unfold_backward,
            aten.reflection_pad1d,
            aten.reflection_pad2d,
            aten.replication_pad1d,
            aten.replication_pad2d,
            aten.pixel_shuffle,
            aten.pixel_unshuffle,
            aten.channel_shuffle,
            aten.trace,
        )
    },
}
