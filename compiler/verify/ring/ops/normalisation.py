"""Layer, RMS, group, batch and weight normalisation, forward and backward. ``rstd`` comes from the multiplicative root map."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from ..algebra import Algebra
from ..value import RingTensor, Value
from .reductions import mean, moments, sum_
from .views import view

aten = torch.ops.aten

Triple = tuple[RingTensor | None, RingTensor | None, RingTensor | None]


def _affine(alg: Algebra, y: RingTensor, weight: Value, bias: Value) -> RingTensor:
    if weight is not None:
        y = alg.mul(y, weight)
    return y if bias is None else alg.add(y, bias)


def _centred_gradient(alg: Algebra, gain: RingTensor, hat: RingTensor, dims: Sequence[int], total: int) -> RingTensor:
    """gain - mean(gain) - hat mean(gain hat): the gradient through (x - mean) rstd, before the factor rstd."""
    first = alg.div(alg.sum(gain, dims, keepdim=True), total)
    second = alg.div(alg.sum(alg.mul(gain, hat), dims, keepdim=True), total)
    return alg.sub(alg.sub(gain, first), alg.mul(hat, second))


def layer_norm(alg: Algebra, x: RingTensor, shape: Sequence[int], weight: Value, bias: Value, eps: float) -> Any:
    """(y, mean, rstd)."""
    dims = list(range(x.ndim - len(shape), x.ndim))
    variance, centre = moments(alg, x, dims, 0, keepdim=True)
    rstd = alg.power(alg.add(variance, eps), -0.5)
    return _affine(alg, alg.mul(alg.sub(x, centre), rstd), weight, bias), centre, rstd


def layer_norm_backward(
    alg: Algebra,
    grad: RingTensor,
    x: RingTensor,
    shape: Sequence[int],
    centre: RingTensor,
    rstd: RingTensor,
    weight: Value,
    bias: Value,
    mask: Sequence[bool],
) -> Triple:
    """Gradients of input, weight and bias as masked."""
    outer = list(range(x.ndim - len(shape)))
    dims = list(range(len(outer), x.ndim))
    hat = alg.mul(alg.sub(x, centre), rstd)
    gain = grad if weight is None else alg.mul(grad, weight)
    grad_x = alg.mul(_centred_gradient(alg, gain, hat, dims, math.prod(shape)), rstd) if mask[0] else None
    grad_w = alg.sum(alg.mul(grad, hat), outer) if mask[1] and weight is not None else None
    grad_b = alg.sum(grad, outer) if mask[2] and bias is not None else None
    return grad_x, grad_w, grad_b


def rms_norm(alg: Algebra, x: RingTensor, shape: Sequence[int], weight: Value, eps: float | None) -> Any:
    """(y, rstd)."""
    dims = list(range(x.ndim - len(shape), x.ndim))
    small = torch.finfo(x.dtype).eps if eps is None else eps
    rstd = alg.power(alg.add(mean(alg, alg.mul(x, x), dims, keepdim=True), small), -0.5)
    return _affine(alg, alg.mul(x, rstd), weight, None), rstd


def rms_norm_composite(
    alg: Algebra, x: RingTensor, shape: Sequence[int], weight: Value = None, eps: float | None = None
) -> RingTensor:
    """y alone."""
    result: RingTensor = rms_norm(alg, x, shape, weight, eps)[0]
    return result


def rms_norm_backward(
    alg: Algebra, grad: RingTensor, x: RingTensor, shape: Sequence[int], rstd: RingTensor, weight: Value, mask: Sequence[bool]
) -> tuple[RingTensor | None, RingTensor | None]:
    """Gradients of input and weight as masked."""
    outer = list(range(x.ndim - len(shape)))
    dims = list(range(len(outer), x.ndim))
    hat = alg.mul(x, rstd)
    gain = grad if weight is None else alg.mul(grad, weight)
    share = alg.div(alg.sum(alg.mul(gain, hat), dims, keepdim=True), math.prod(shape))
    grad_x = alg.mul(alg.sub(gain, alg.mul(hat, share)), rstd) if mask[0] else None
    grad_w = alg.sum(alg.mul(grad, hat), outer) if mask[1] and weight is not None else None
    return grad_x, grad_w


def group_norm(
    alg: Algebra, x: RingTensor, weight: Value, bias: Value, batch: int, channels: int, inner: int, groups: int, eps: float
) -> Any:
    """(y, mean [N, G], rstd [N, G])."""
    flat = view(alg, x, [batch, groups, -1])
    variance, centre = moments(alg, flat, [2], 0, keepdim=True)
    rstd = alg.power(alg.add(variance, eps), -0.5)
    hat = view(alg, alg.mul(alg.sub(flat, centre), rstd), list(x.shape))
    y = _affine(alg, hat, _channels(alg, weight, x.ndim), _channels(alg, bias, x.ndim))
    return y, view(alg, centre, [batch, groups]), view(alg, rstd, [batch, groups])


def _channels(alg: Algebra, value: Value, ndim: int) -> RingTensor | None:
    return None if value is None else view(alg, alg.lift(value), [1, -1] + [1] * (ndim - 2))


def group_norm_backward(
    alg: Algebra,
    grad: RingTensor,
    x: RingTensor,
    centre: RingTensor,
    rstd: RingTensor,
    weight: Value,
    batch: int,
    channels: int,
    inner: int,
    groups: int,
    mask: Sequence[bool],
) -> Triple:
    """Gradients of input, weight and bias as masked."""
    flat = view(alg, x, [batch, groups, -1])
    scale = view(alg, rstd, [batch, groups, 1])
    hat = alg.mul(alg.sub(flat, view(alg, centre, [batch, groups, 1])), scale)
    outer = [0, *range(2, x.ndim)]
    grad_x = None
    if mask[0]:
        gain = grad if weight is None else alg.mul(grad, _channels(alg, weight, x.ndim))
        through = _centred_gradient(alg, view(alg, gain, [batch, groups, -1]), hat, [2], flat.shape[2])
        grad_x = view(alg, alg.mul(through, scale), list(x.shape))
    grad_w = alg.sum(alg.mul(grad, view(alg, hat, list(x.shape))), outer) if mask[1] else None
    return grad_x, grad_w, alg.sum(grad, outer) if mask[2] else None


def _batch_statistics(alg: Algebra, x: RingTensor) -> tuple[RingTensor, RingTensor, int]:
    dims = [0, *range(2, x.ndim)]
    variance, centre = moments(alg, x, dims, 0, keepdim=False)
    return variance, centre, x.numel() // x.shape[1]


def _running(alg: Algebra, old: Value, new: RingTensor, momentum: float) -> RingTensor | None:
    return None if old is None else alg.add(alg.mul(old, alg.sub(1, momentum)), alg.mul(new, momentum))


def batch_norm(
    alg: Algebra,
    x: RingTensor,
    weight: Value,
    bias: Value,
    running_mean: Value,
    running_var: Value,
    training: bool,
    momentum: float,
    eps: float,
) -> Any:
    """(y, saved mean, saved rstd, new running mean, new running variance)."""
    if training:
        variance, centre, total = _batch_statistics(alg, x)
        unbiased = alg.div(alg.mul(variance, total), total - 1) if total > 1 else variance
        new_mean = _running(alg, running_mean, centre, momentum)
        new_var = _running(alg, running_var, unbiased, momentum)
    else:
        variance, centre = alg.lift(running_var), alg.lift(running_mean)
        new_mean, new_var = centre, variance
    rstd = alg.power(alg.add(variance, eps), -0.5)
    hat = alg.mul(alg.sub(x, _channels(alg, centre, x.ndim)), _channels(alg, rstd, x.ndim))
    y = _affine(alg, hat, _channels(alg, weight, x.ndim), _channels(alg, bias, x.ndim))
    if not training:
        empty = alg.full((0,), 0, x.dtype)
        return y, empty, empty, new_mean, new_var
    return y, centre, rstd, new_mean, new_var


def batch_norm_evaluation(
    alg: Algebra, x: RingTensor, weight: Value, bias: Value, mean_: Value, var_: Value, momentum: float, eps: float
) -> Any:
    """The no-training form: (y, empty, empty)."""
    return batch_norm(alg, x, weight, bias, mean_, var_, False, momentum, eps)[:3]


def batch_norm_pure(alg: Algebra, x: RingTensor, weight: Value, bias: Value, *rest: Any) -> Any:
    """native_batch_norm without its side effect on the running buffers: (y, mean, rstd)."""
    return batch_norm(alg, x, weight, bias, *rest)[:3]


def batch_norm_without_buffers(
    alg: Algebra,
    x: RingTensor,
    weight: Value,
    bias: Value,
    training: bool,
    momentum: float,
    eps: float,
) -> Any:
    """_native_batch_norm_legit.no_stats: (y, mean, rstd)."""
    return batch_norm(alg, x, weight, bias, None, None, training, momentum, eps)[:3]


def batch_norm_legit(alg: Algebra, x: RingTensor, weight: Value, bias: Value, *rest: Any) -> Any:
    """_native_batch_norm_legit, with or without running statistics."""
    return (
        batch_norm_without_buffers(alg, x, weight, bias, *rest) if len(rest) == 3 else batch_norm_pure(alg, x, weight, bias, *rest)
    )


def batch_norm_update(
    alg: Algebra, x: RingTensor, weight: Value, bias: Value, running_mean: Value, running_var: Value, momentum: float, eps: float
) -> Any:
    """_batch_norm_with_update_functional: (y, mean, rstd, reserve, new running mean, new running variance)."""
    y, centre, rstd, new_mean, new_var = batch_norm(alg, x, weight, bias, running_mean, running_var, True, momentum, eps)
    return y, centre, rstd, torch.zeros(0, dtype=torch.uint8), new_mean, new_var


def batch_norm_backward(
    alg: Algebra,
    grad: RingTensor,
    x: RingTensor,
    weight: Value,
    running_mean: Value,
    running_var: Value,
    saved_mean: Value,
    saved_rstd: Value,
    training: bool,
    eps: float,
    mask: Sequence[bool],
) -> Triple:
    """Gradients of input, weight and bias as masked."""
    dims = [0, *range(2, x.ndim)]
    centre = saved_mean if training else running_mean
    rstd = saved_rstd if training else alg.power(alg.add(running_var, eps), -0.5)
    scale = _channels(alg, rstd, x.ndim)
    hat = alg.mul(alg.sub(x, _channels(alg, centre, x.ndim)), scale)
    grad_x = None
    if mask[0]:
        gain = grad if weight is None else alg.mul(grad, _channels(alg, weight, x.ndim))
        through = _centred_gradient(alg, gain, hat, dims, x.numel() // x.shape[1]) if training else gain
        grad_x = alg.mul(through, scale)
    grad_w = alg.sum(alg.mul(grad, hat), dims) if mask[1] else None
    return grad_x, grad_w, alg.sum(grad, dims) if mask[2] else None


def batch_norm_backward_fused(alg: Algebra, grad: RingTensor, x: RingTensor, weight: Value, *rest: Any) -> Triple:
    """aten.batch_norm_backward: the same with a reserve tensor at the end."""
    running_mean, running_var, saved_mean, saved_rstd, training, eps, mask, _ = rest
    return batch_norm_backward(alg, grad, x, weight, running_mean, running_var, saved_mean, saved_rstd, training, eps, mask)


def weight_norm(alg: Algebra, v: RingTensor, g: RingTensor, dim: int = 0) -> tuple[RingTensor, RingTensor]:
    """(g v / |v|, |v|), the norm over all dims but one."""
    dims = [d for d in range(v.ndim) if d != dim % v.ndim]
    norm = alg.power(sum_(alg, alg.mul(v, v), dims, keepdim=True), 0.5)
    return alg.mul(v, alg.div(g, norm)), norm


def weight_norm_backward(
    alg: Algebra, grad: RingTensor, v: RingTensor, g: RingTensor, norm: RingTensor, dim: int
) -> tuple[RingTensor, RingTensor]:
    """Gradients of v and g."""
    dims = [d for d in range(v.ndim) if d != dim % v.ndim]
    inner = sum_(alg, alg.mul(v, grad), dims, keepdim=True)
    inverse = alg.reciprocal(norm)
    cubed = alg.mul(alg.mul(inverse, inverse), inverse)
    grad_v = alg.mul(g, alg.sub(alg.mul(grad, inverse), alg.mul(alg.mul(v, inner), cubed)))
    return grad_v, alg.mul(inner, inverse)


NORMALISATION: dict[Any, Callable[..., Any]] = {
    aten.native_layer_norm: layer_norm,
    aten.native_layer_norm_backward: layer_norm_backward,
    aten._fused_rms_norm: rms_norm,
    aten._fused_rms_norm_backward: rms_norm_backward,
    aten.rms_norm: rms_norm_composite,
    aten.native_group_norm: group_norm,
    aten.native_group_norm_backward: group_norm_backward,
    aten._native_batch_norm_legit_functional: batch_norm,
    aten._native_batch_norm_legit: batch_norm_legit,
    aten._native_batch_norm_legit_no_training: batch_norm_evaluation,
    aten._batch_norm_with_update_functional: batch_norm_update,
    aten.native_batch_norm: batch_norm_pure,
    aten.native_batch_norm_backward: batch_norm_backward,
    aten.batch_norm_backward: batch_norm_backward_fused,
    aten._weight_norm_interface: weight_norm,
    aten._weight_norm_interface_backward: weight_norm_backward,
}
