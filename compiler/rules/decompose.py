"""Ops with no exact rule, written as ops that have one.

    cross entropy, mean over the targets that count:   loss = - sum_i w[t_i] logp[i, t_i]  /  sum_i w[t_i]

As one op neither a sum nor an average of the pieces' losses is the loss (pieces may count different numbers of targets). As a sum
divided by a sum both parts are partial sums over the batch, and only two scalars are reduced.

    mean loss, backward:                               dL/dx = dL/dy f'(x, t) / n,       n the number of *all* elements

As one op a piece would divide by the number of its own elements. Decomposed, n is a constant of the whole.

    weight norm:    w = v g / |v|,    with s = sum v dL/dw:    dL/dg = s / |v|,    dL/dv = g / |v| (dL/dw - v s / |v|^2)

The fused kernel checks no sizes, so that no rule of it can be tried on pieces; written out, every way of cutting it is known.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch._decomp import get_decompositions

aten = torch.ops.aten

WITHOUT_EXACT_RULE = (
    aten.nll_loss_forward,
    aten.nll_loss2d_forward,
    aten.mse_loss,
    aten.mse_loss_backward,
    aten.smooth_l1_loss,
    aten.smooth_l1_loss_backward,
    aten.huber_loss,
    aten.huber_loss_backward,
    aten.binary_cross_entropy,
    aten.binary_cross_entropy_backward,
    aten.soft_margin_loss,
    aten.soft_margin_loss_backward,
    aten._weight_norm_interface,
)


def exact_decompositions() -> dict[Any, Callable[..., Any]]:
    """A table for ``make_fx(decomposition_table=...)``: with it a loss can be cut over the batch. torch's own decompositions.

    ``nll_loss_backward`` needs none: it is given the total weight.
    """
    return {
        **get_decompositions(list(WITHOUT_EXACT_RULE)),
        aten._weight_norm_interface_backward.default: _weight_norm_backward,
    }


def _weight_norm_backward(
    grad_w: torch.Tensor, v: torch.Tensor, g: torch.Tensor, norms: torch.Tensor, dim: int
) -> tuple[torch.Tensor, torch.Tensor]:
    others = [d for d in range(v.dim()) if d != dim]
    along = (v * grad_w).sum(others, keepdim=True)
    return g / norms * (grad_w - v * (along / norms.square())), along / norms
