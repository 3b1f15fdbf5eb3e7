"""Ops with no exact rule, written as ops that have one.

    cross entropy, mean over the targets that count:   loss = - sum_i w[t_i] logp[i, t_i]  /  sum_i w[t_i]

As one op neither a sum nor an average of the pieces' losses is the loss (pieces may count different numbers of targets). As a sum
divided by a sum both parts are partial sums over the batch, and only two scalars are reduced.

    mean loss, backward:                               dL/dx = dL/dy f'(x, t) / n,       n the number of *all* elements

As one op a piece would divide by the number of its own elements. Decomposed, n is a constant of the whole.
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
)


def exact_decompositions() -> dict[Any, Callable[..., Any]]:
    """A table for ``make_fx(decomposition_table=...)``: with it a loss can be cut over the batch. torch's own decompositions.

    ``nll_loss_backward`` needs none: it is given the total weight.
    """
    return dict(get_decompositions(list(WITHOUT_EXACT_RULE)))
