"""Negative log likelihood, forward and backward. Every argument counts: class weights, ignored targets, the passed total weight."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ..algebra import Algebra
from ..order import take
from ..value import RingTensor, Value

aten = torch.ops.aten

_NONE, _MEAN = 0, 1


def _target_weights(
    alg: Algebra, weight: Value, target: torch.Tensor, ignore: int
) -> tuple[torch.Tensor, torch.Tensor, RingTensor]:
    """(valid mask, targets with ignored ones replaced by 0, weight of each target: 0 where ignored)."""
    valid = target != ignore
    safe = torch.where(valid, target, 0)
    if weight is None:
        return valid, safe, alg.lift(valid)
    return valid, safe, alg.where(valid, alg.lift(weight).map(lambda t: t[:, safe]), 0)


def nll_loss_forward(alg: Algebra, x: RingTensor, target: torch.Tensor, weight: Value, reduction: int, ignore: int) -> Any:
    """(loss, total weight) for x [N, C, ...] or [C]."""
    class_dim = 1 if x.ndim > 1 else 0
    valid, safe, weights = _target_weights(alg, weight, target, ignore)
    picked = take(x, class_dim, safe.unsqueeze(class_dim)).map(lambda t: t.squeeze(class_dim + 1))
    losses = alg.neg(alg.where(valid, picked, 0))
    if weight is not None:
        losses = alg.mul(losses, weights)
    total = alg.sum(weights, list(range(weights.ndim)))
    if reduction == _NONE:
        return losses, alg.full((), 0, x.dtype)
    loss = alg.sum(losses, list(range(losses.ndim)))
    if reduction == _MEAN:
        loss = alg.div(loss, total)
    loss.dtype = total.dtype = x.dtype
    return loss, total


def nll_loss_backward(
    alg: Algebra,
    grad: Value,
    x: RingTensor,
    target: torch.Tensor,
    weight: Value,
    reduction: int,
    ignore: int,
    total_weight: Value,
) -> RingTensor:
    """-weight g at each target, divided by the passed total weight for the mean."""
    class_dim = 1 if x.ndim > 1 else 0
    _valid, safe, weights = _target_weights(alg, weight, target, ignore)
    g = alg.lift(grad)
    if reduction == _MEAN:
        g = alg.div(g, alg.lift(total_weight))
    entries = alg.neg(alg.mul(g, weights))
    data = torch.zeros((4, *x.shape), dtype=torch.int64)
    index = safe.unsqueeze(class_dim)[None].expand(4, *safe.unsqueeze(class_dim).shape)
    data.scatter_(class_dim + 1, index, entries.data.expand(4, *safe.shape).unsqueeze(class_dim + 1))
    return RingTensor(data, None, entries.loose, x.dtype)


LOSS: dict[Any, Callable[..., Any]] = {
    aten.nll_loss_forward: nll_loss_forward,
    aten.nll_loss2d_forward: nll_loss_forward,
    aten.nll_loss_backward: nll_loss_backward,
    aten.nll_loss2d_backward: nll_loss_backward,
}
