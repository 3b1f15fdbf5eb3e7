"""Sequence parallelism by hand: every rank holds a range of positions, keys and values travel round a ring of ranks.

forward    merge (out, lse) of each block of keys into what is known:  w = sigmoid(lse_b - lse),  out <- out - w (out - out_b),
           lse <- lse - logsigmoid(lse - lse_b); blocks of the future are skipped
backward   p = exp(s - lse),  ds = p (g v^T - sum(g out)); the gradients of keys and values travel with them and come home
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from .llama import Sizes, block, cross_entropy, reference, rms
from .ranks import Handwritten, Ranks, Tensors, as_leaves, with_gradients

BUGS = {
    "causal mask off by one": "on the last rank a token does not see itself",
    "lse merge averaged": "blocks are averaged instead of weighted",
    "lse not updated": "the last rank forgets to merge one block's normaliser",
    "attention scale on one rank": "the last rank scales its scores by the number of heads as well",
    "rotary offset": "every rank counts positions from zero",
    "gather order": "hidden states are put together in reverse order of ranks before the head",
    "ring backward drops last": "the last rank leaves out its last step of the backward",
    "local mean": "the loss is the mean of a rank's own tokens",
    "norm gradient not reduced": "a norm's gain keeps a rank's own gradient",
    "query bias gradient not reduced": "the query's bias keeps a rank's own gradient",
    "gradient averaged twice": "gradients of a global mean are divided by the number of ranks again",
}


def _scores(here: Ranks, q: Tensor, k: Tensor, source: int, *, forward: bool) -> Tensor:
    width = q.shape[-1] * (q.shape[1] if here.has("attention scale on one rank") and here.is_last else 1)
    scores = q @ k.transpose(-1, -2) / math.sqrt(width)
    if source != here.rank:
        return scores
    shift = int(forward and here.has("causal mask off by one") and here.is_last)
    seen = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool).tril(-shift)
    if shift:
        seen = seen | (torch.arange(q.shape[-2])[:, None] == 0)
    return scores.masked_fill(~seen, -math.inf)


class _RingAttention(Function):
    """Causal attention of [B, H, S / ranks, hd] pieces in the order of ranks."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, here: Ranks) -> Tensor:
        ctx.here, out, lse, keys, values = here, None, None, k, v
        for step in range(here.size):
            source = (here.rank - step) % here.size
            if source <= here.rank:
                scores = _scores(here, q, keys, source, forward=True)
                block_lse = scores.logsumexp(-1, keepdim=True)
                block_out = (scores - block_lse).exp() @ values
                if out is None or lse is None:
                    out, lse = block_out, block_lse
                else:
                    weight: Any = 0.5 if here.has("lse merge averaged") else torch.sigmoid(block_lse - lse)
                    out = out - weight * (out - block_out)
                    if not (here.has("lse not updated") and here.is_last and step == 1):
                        lse = lse - F.logsigmoid(lse - block_lse)
            if step < here.size - 1:
                keys, values = here.pass_on(keys), here.pass_on(values)
        assert out is not None
        ctx.save_for_backward(q, k, v, out, lse)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        here: Ranks = ctx.here
        q, keys, values, out, lse = ctx.saved_tensors
        delta = (grads[0] * out).sum(-1, keepdim=True)
        dq, dk, dv = torch.zeros_like(q), torch.zeros_like(keys), torch.zeros_like(values)
        width = q.shape[-1] * (q.shape[1] if here.has("attention scale on one rank") and here.is_last else 1)
        for step in range(here.size):
            source = (here.rank - step) % here.size
            left_out = here.has("ring backward drops last") and here.is_last and step == here.size - 1
            if source <= here.rank and not left_out:
                p = (_scores(here, q, keys, source, forward=False) - lse).exp()
                dv = dv + p.transpose(-1, -2) @ grads[0]
                ds = p * (grads[0] @ values.transpose(-1, -2) - delta) / math.sqrt(width)
                dq, dk = dq + ds @ keys, dk + ds.transpose(-1, -2) @ q
            keys, values, dk, dv = (here.pass_on(t) for t in (keys, values, dk, dv))
        return dq, dk, dv, None


_ring_attention: Any = _RingAttention.apply


def step(sizes: Sizes) -> Any:
    """The step of one rank."""

    def run(here: Ranks, tensors: Tensors) -> Tensors:
        p = as_leaves(tensors)
        ids, length = p["input:ids"], p["input:ids"].shape[1]
        x = F.embedding(ids, p["param:embed.weight"])
        start = 0 if here.has("rotary offset") else here.rank * length

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            found: Tensor = _ring_attention(q, k, v, here)
            return found

        for layer in range(sizes.layers):
            x = block(p, f"param:layers.{layer}.", x, sizes.heads, attend, start)
        if here.has("gather order"):
            x = _reverse(x, here)
        logits = rms(x, p["param:norm.weight"]) @ p["param:head.weight"].t()
        count = ids.numel() * (1 if here.has("local mean") else here.size)
        loss = cross_entropy(logits, p["input:targets"]) / count
        results = {"output:loss": here.sum(loss.detach())}
        for name, gradient in with_gradients(loss, p).items():
            forgotten = (here.has("norm gradient not reduced") and name.endswith("norm1.weight")) or (
                here.has("query bias gradient not reduced") and name.endswith("q.bias")
            )
            whole = gradient if forgotten else here.sum(gradient)
            results[name] = whole / here.size if here.has("gradient averaged twice") else whole
        return results

    return run


class _Reverse(Function):
    """Every rank gets the piece of the rank at the other end."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, here: Ranks) -> Tensor:
        ctx.here = here
        pieces: Tensor = here.gather(x, 1).unflatten(1, (here.size, -1))
        return pieces[:, here.size - 1 - here.rank]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return _reverse(grads[0], ctx.here), None


_reverse: Any = _Reverse.apply


def ring_attention(sizes: Sizes | None = None) -> Handwritten:
    """The program with its bugs."""
    sizes = sizes or Sizes()
    layouts = {"input:ids": "S(1)", "input:targets": "S(1)"}
    return Handwritten("ring attention", sizes.shapes(), reference(sizes), step(sizes), BUGS, sizes.integers(), layouts)
