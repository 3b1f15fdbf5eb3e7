"""Ops whose meaning is torch's own reference decomposition, evaluated over the ring.

The list is explicit: an op that is not in it, nor in the table, is unsupported.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch._decomp import decomposition_table

aten = torch.ops.aten

DECOMPOSED_OPS: tuple[Any, ...] = (
    aten.addcmul.default,
    aten.addcdiv.default,
    aten.lerp.Scalar,
    aten.lerp.Tensor,
    aten.mse_loss.default,
    aten.mse_loss_backward.default,
    aten.smooth_l1_loss.default,
    aten.smooth_l1_loss_backward.default,
    aten.huber_loss.default,
    aten.huber_loss_backward.default,
    aten.binary_cross_entropy.default,
    aten.binary_cross_entropy_backward.default,
    aten.binary_cross_entropy_with_logits.default,
    aten.hardswish.default,
    aten.hardswish_backward.default,
    aten.hardsigmoid.default,
    aten.hardsigmoid_backward.default,
    aten.hardtanh.default,
    aten.hardtanh_backward.default,
    aten.mish.default,
    aten.mish_backward.default,
    aten.glu.default,
    aten.glu_backward.default,
    aten.xlogy.Tensor,
    aten.norm.ScalarOpt_dim,
    aten.norm.Scalar,
    aten.aminmax.default,
    aten.celu.default,
    aten.selu.default,
    aten._prelu_kernel.default,
    aten._prelu_kernel_backward.default,
    aten.logical_not.default,
    aten.logical_and.default,
    aten.logical_or.default,
    aten.heaviside.default,
)


def decompositions() -> dict[Any, Callable[..., Any]]:
    """overload -> torch's decomposition, for those of the list that this torch has one for."""
    return {op: decomposition_table[op] for op in DECOMPOSED_OPS if op in decomposition_table}
