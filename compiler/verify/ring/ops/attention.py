"""Attention kernels as mathematics: the CPU, flash, memory-efficient and cuDNN ops of torch, forward and backward.

    s = scale q k^T + mask      lse = logsumexp(s)      p = exp(s - lse)      out = p v
    dv = p^T g      ds = p (g v^T - sum(g out))      dq = scale ds k      dk = scale ds^T q

Fewer key/value heads than query heads means that consecutive query heads share one (grouped-query attention).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from ....errors import UnsupportedError
from ..algebra import Algebra
from ..value import RingTensor, Value
from .reductions import logsumexp, safe_softmax, sum_
from .views import transpose, unsqueeze, view

aten = torch.ops.aten


@dataclass(frozen=True)
class Setting:
    """What all kernels share besides q, k and v."""

    causal: bool = False
    scale: float | None = None
    mask: Value = None

    def factor(self, q: RingTensor) -> float:
        """The scale of the scores."""
        return 1 / math.sqrt(q.shape[-1]) if self.scale is None else self.scale


def _no_dropout(probability: float) -> None:
    if probability:
        raise UnsupportedError(
            f"an attention kernel draws its own random numbers (dropout_p={probability}); "
            "set dropout to 0, or capture the model with dropout as explicit ops"
        )


def _share_heads(alg: Algebra, x: RingTensor, heads: int) -> RingTensor:
    times = heads // x.shape[1]
    return x if times == 1 else x.map(lambda t: t.repeat_interleave(times, 2))


def _join_heads(alg: Algebra, grad: RingTensor, heads: int) -> RingTensor:
    """Sum the gradients of the query heads that share a key/value head."""
    batch, many, *rest = grad.shape
    if many == heads:
        return grad
    return alg.sum(view(alg, grad, [batch, heads, many // heads, *rest]), [2])


def scores(alg: Algebra, q: RingTensor, k: RingTensor, setting: Setting) -> RingTensor:
    """Scaled and masked q k^T for k with as many heads as q."""
    s = alg.mul(alg.matmul(q, transpose(alg, k, -1, -2)), setting.factor(q))
    mask = setting.mask
    if isinstance(mask, torch.Tensor) and mask.dtype == torch.bool:
        s = alg.where(mask, s, -math.inf)
    elif mask is not None:
        s = alg.add(s, mask)
    if setting.causal:
        s = alg.where(torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool).tril(), s, -math.inf)
    return s


def forward(alg: Algebra, q: RingTensor, k: RingTensor, v: RingTensor, setting: Setting) -> tuple[RingTensor, RingTensor]:
    """(out, lse [B, H, S])."""
    heads = q.shape[1]
    s = scores(alg, q, _share_heads(alg, k, heads), setting)
    lse = logsumexp(alg, s, -1, keepdim=True)
    out = alg.matmul(alg.exp(alg.sub(s, lse)), _share_heads(alg, v, heads))
    return out, view(alg, lse, list(lse.shape[:-1]))


@dataclass(frozen=True)
class Saved:
    """What the backward kernels are given from the forward."""

    q: RingTensor
    k: RingTensor
    v: RingTensor
    out: RingTensor
    lse: RingTensor


def backward(
    alg: Algebra, grad: RingTensor, saved: Saved, setting: Setting
) -> tuple[RingTensor, RingTensor, RingTensor, RingTensor]:
    """(dq, dk, dv, d mask before any reduction)."""
    q, heads, kv_heads = saved.q, saved.q.shape[1], saved.k.shape[1]
    k, v = _share_heads(alg, saved.k, heads), _share_heads(alg, saved.v, heads)
    p = alg.exp(alg.sub(scores(alg, q, k, setting), unsqueeze(alg, saved.lse, -1)))
    dv = alg.matmul(transpose(alg, p, -1, -2), grad)
    dp = alg.matmul(grad, transpose(alg, v, -1, -2))
    ds = alg.mul(p, alg.sub(dp, sum_(alg, alg.mul(grad, saved.out), -1, keepdim=True)))
    scaled = alg.mul(ds, setting.factor(q))
    dk = alg.matmul(transpose(alg, scaled, -1, -2), q)
    return alg.matmul(scaled, k), _join_heads(alg, dk, kv_heads), _join_heads(alg, dv, kv_heads), ds


def cpu_flash(
    alg: Algebra,
    q: RingTensor,
    k: RingTensor,
    v: RingTensor,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    attn_mask: Value = None,
    scale: float | None = None,
) -> Any:
    """_scaled_dot_product_flash_attention_for_cpu."""
    _no_dropout(dropout_p)
    return forward(alg, q, k, v, Setting(is_causal, scale, attn_mask))


def cpu_flash_backward(
    alg: Algebra,
    grad: RingTensor,
    q: RingTensor,
    k: RingTensor,
    v: RingTensor,
    out: RingTensor,
    lse: RingTensor,
    dropout_p: float,
    is_causal: bool,
    attn_mask: Value = None,
    scale: float | None = None,
) -> Any:
    """Its backward."""
    _no_dropout(dropout_p)
    return backward(alg, grad, Saved(q, k, v, out, lse), Setting(is_causal, scale, attn_mask))[:3]


def cuda_flash(
    alg: Algebra,
    q: RingTensor,
    k: RingTensor,
    v: RingTensor,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    return_debug_mask: bool = False,
    scale: float | None = None,
) -> Any:
    """_scaled_dot_product_flash_attention: (out, lse, two offsets, two lengths, two random states, debug mask)."""
    _no_dropout(dropout_p)
    out, lse = forward(alg, q, k, v, Setting(is_causal, scale))
    state = torch.zeros((), dtype=torch.int64)
    return out, lse, None, None, q.shape[2], k.shape[2], state, state, alg.full((0,), 0, q.dtype)


def cuda_flash_backward(
    alg: Algebra,
    grad: RingTensor,
    q: RingTensor,
    k: RingTensor,
    v: RingTensor,
    out: RingTensor,
    lse: RingTensor,
    *rest: Any,
    scale: float | None = None,
) -> Any:
    """Its backward; rest: two offsets, two lengths, dropout_p, is_causal, two random states."""
    dropout_p, is_causal = rest[4], rest[5]
    _no_dropout(dropout_p)
    return backward(alg, grad, Saved(q, k, v, out, lse), Setting(is_causal, scale))[:3]


def efficient(
    alg: Algebra,
    q: RingTensor,
    k: RingTensor,
    v: RingTensor,
    attn_bias: Value,
    compute_log_sumexp: bool,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
) -> Any:
    """_scaled_dot_product_efficient_attention: (out, lse padded to a multiple of 32 rows, two random states)."""
    _no_dropout(dropout_p)
    out, lse = forward(alg, q, k, v, Setting(is_causal, scale, attn_bias))
    rows = lse.shape[-1]
    padding = -rows % 32 if compute_log_sumexp else -rows
    state = torch.zeros((), dtype=torch.int64)
    if padding < 0:
        return out, lse.map(lambda t: t[..., :0]), state, state
    data = torch.nn.functional.pad(lse.data, (0, padding))
    factor = torch.cat((alg.factor_of(lse), alg.ring.ones((*lse.shape[:-1], padding))), -1)
    return out, RingTensor(data, factor, lse.loose, lse.dtype), state, state


def efficient_backward(
    alg: Algebra,
    grad: RingTensor,
    q: RingTensor,
    k: RingTensor,
    v: RingTensor,
    attn_bias: Value,
    out: RingTensor,
    lse: RingTensor,
    *rest: Any,
    scale: float | None = None,
) -> Any:
    """Its backward; rest: two random states, dropout_p, grad_input_mask, is_causal."""
    _, _, dropout_p, wanted, *causal = rest
    _no_dropout(dropout_p)
    rows = q.shape[2]
    saved = Saved(q, k, v, out, lse.map(lambda t: t[..., :rows]))
    dq, dk, dv, ds = backward(alg, grad, saved, Setting(bool(causal and causal[0]), scale, attn_bias))
    d_bias = None
    if wanted[3]:
        missing = ds.ndim - len(attn_bias.shape)
        dims = [i for i in range(ds.ndim) if i < missing or attn_bias.shape[i - missing] == 1]
        d_bias = view(alg, alg.sum(ds, dims, keepdim=True), list(attn_bias.shape))
    return (dq if wanted[0] else None), (dk if wanted[1] else None), (dv if wanted[2] else None), d_bias


def cudnn(
    alg: Algebra,
    q: RingTensor,
    k: RingTensor,
    v: RingTensor,
    attn_bias: Value,
    compute_log_sumexp: bool,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    return_debug_mask: bool = False,
    scale: float | None = None,
) -> Any:
    """_scaled_dot_product_cudnn_attention: lse has a trailing dimension of size 1."""
    _no_dropout(dropout_p)
    out, lse = forward(alg, q, k, v, Setting(is_causal, scale, attn_bias))
    state = torch.zeros((), dtype=torch.int64)
    return out, unsqueeze(alg, lse, -1), None, None, q.shape[2], k.shape[2], state, state, alg.full((0,), 0, q.dtype)


def cudnn_backward(
    alg: Algebra,
    grad: RingTensor,
    q: RingTensor,
    k: RingTensor,
    v: RingTensor,
    out: RingTensor,
    lse: RingTensor,
    *rest: Any,
    scale: float | None = None,
) -> Any:
    """Its backward; rest: two random states, attn_bias, two offsets, two lengths, dropout_p, is_causal."""
    attn_bias, dropout_p, is_causal = rest[2], rest[7], rest[8]
    _no_dropout(dropout_p)
    saved = Saved(q, k, v, out, view(alg, lse, list(q.shape[:3])))
    return backward(alg, grad, saved, Setting(is_causal, scale, attn_bias))[:3]


def composite(
    alg: Algebra,
    q: RingTensor,
    k: RingTensor,
    v: RingTensor,
    attn_mask: Value = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> RingTensor:
    """scaled_dot_product_attention; rows without any unmasked key give zeros, as torch's own."""
    _no_dropout(dropout_p)
    if enable_gqa:
        k, v = _share_heads(alg, k, q.shape[1]), _share_heads(alg, v, q.shape[1])
    s = scores(alg, q, k, Setting(is_causal, scale, attn_mask))
    return alg.matmul(safe_softmax(alg, s, -1), v)


ATTENTION: dict[Any, Callable[..., Any]] = {
    aten._scaled_dot_product_flash_attention_for_cpu: cpu_flash,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: cpu_flash_backward,
    aten._scaled_dot_product_flash_attention: cuda_flash,
    aten._scaled_dot_product_flash_attention_backward: cuda_flash_backward,
    aten._scaled_dot_product_efficient_attention: efficient,
    aten._scaled_dot_product_efficient_attention_backward: efficient_backward,
    aten._scaled_dot_product_cudnn_attention: cudnn,
    aten._scaled_dot_product_cudnn_attention_backward: cudnn_backward,
    aten.scaled_dot_product_attention: composite,
}
