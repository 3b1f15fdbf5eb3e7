"""Megatron's tensor parallelism by hand: heads and inner rows cut over ranks, vocabulary-parallel embedding and loss."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from .llama import EPS, Sizes, causal, heads, linear, merged, reference, rms, turn
from .ranks import Handwritten, Ranks, Tensors, as_leaves, f, g, with_gradients

BUGS = {
    "missing forward reduction": "the attention's partial products are not summed",
    "missing backward reduction": "the gradient of the attention's input is not summed",
    "doubled reduction": "the attention's output is summed twice",
    "double bias": "a replicated bias is added on every rank before the sum",
    "one-rank scale": "the last rank scales its scores by 3 % less",
    "rsqrt epsilon": "1e-6 instead of 1e-5 in one norm",
    "loss boundary off by one": "the row after a rank's last belongs to it as well",
    "loss maximum not reduced": "every rank subtracts its own maximum",
    "head interleave": "the key's heads are read in another order than the query's",
}


def _interleaved(x: Tensor, count: int) -> Tensor:
    found: Tensor = x.unflatten(-1, (-1, count)).permute(0, 3, 1, 2)
    return found


class _VocabularyLoss(Function):
    """Cross entropy of logits [T, V / ranks], summed over tokens."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, here: Ranks) -> Tensor:
        rows = logits.shape[-1]
        low = here.rank * rows
        top = logits.amax(-1, keepdim=True)
        if not here.has("loss maximum not reduced"):
            top = here.sum(top, "max")
        weights = (logits - top).exp()
        total = here.sum(weights.sum(-1, keepdim=True))
        high = low + rows + int(here.has("loss boundary off by one"))
        mine = (targets >= low) & (targets < high)
        index = (targets - low).clamp(0, rows - 1)
        picked = here.sum(torch.where(mine, (logits - top).gather(1, index[:, None])[:, 0], 0.0))
        ctx.save_for_backward(weights / total, mine, index)
        return (total[:, 0].log() - picked).sum()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        share, mine, index = ctx.saved_tensors
        hit = torch.zeros_like(share).scatter(1, index[:, None], mine[:, None].to(share.dtype))
        return (share - hit) * grads[0], None, None


_vocabulary_loss: Any = _VocabularyLoss.apply


def _attention(here: Ranks, p: Tensors, at: str, x: Tensor, sizes: Sizes) -> Tensor:
    h = rms(x, p[f"{at}norm1.weight"], 1e-6 if here.has("rsqrt epsilon") else EPS)
    h = h if here.has("missing backward reduction") else f(here, h)
    count = sizes.heads // here.size
    q, v = (heads(linear(p, f"{at}{name}", h), count) for name in "qv")
    k = (_interleaved if here.has("head interleave") else heads)(linear(p, f"{at}k", h), count)
    wrong = 0.97 if here.has("one-rank scale") and here.is_last else 1.0
    mixed = causal(turn(q), turn(k), v, wrong / math.sqrt(sizes.head))
    part = merged(mixed) @ p[f"{at}o.weight"].t()
    bias = p[f"{at}o.bias"]
    if here.has("missing forward reduction"):
        return part + bias
    if here.has("double bias"):
        return g(here, part + bias)
    whole = g(here, part)
    return (g(here, whole) if here.has("doubled reduction") else whole) + bias


def step(sizes: Sizes) -> Any:
    """The step of one rank."""

    def run(here: Ranks, tensors: Tensors) -> Tensors:
        p = as_leaves(tensors)
        ids, table = p["input:ids"], p["param:embed.weight"]
        low = here.rank * table.shape[0]
        mine = (ids >= low) & (ids < low + table.shape[0])
        rows = F.embedding((ids - low).clamp(0, table.shape[0] - 1), table)
        x = g(here, torch.where(mine[..., None], rows, 0.0))
        for layer in range(sizes.layers):
            at = f"param:layers.{layer}."
            x = x + _attention(here, p, at, x, sizes)
            h = f(here, rms(x, p[f"{at}norm2.weight"]))
            inner = F.silu(linear(p, f"{at}gate", h)) * linear(p, f"{at}up", h)
            x = x + g(here, inner @ p[f"{at}down.weight"].t()) + p[f"{at}down.bias"]
        logits = f(here, rms(x, p["param:norm.weight"])) @ p["param:head.weight"].t()
        loss = _vocabulary_loss(logits.flatten(0, 1), p["input:targets"].reshape(-1), here)
        loss = loss / ids.numel()
        return {"output:loss": loss.detach(), **with_gradients(loss, p)}

    return run


def tensor_parallel(sizes: Sizes | None = None) -> Handwritten:
    """The program with its bugs."""
    sizes = sizes or Sizes()
    cut = {"param:embed.weight": "S(0)", "param:head.weight": "S(0)"}
    for layer in range(sizes.layers):
        at = f"param:layers.{layer}."
        cut |= {f"{at}{name}.{kind}": "S(0)" for name in ("q", "k", "v", "gate", "up") for kind in ("weight", "bias")}
        cut |= {f"{at}{name}.weight": "S(1)" for name in ("o", "down")}
    layouts = cut | {name.replace("param:", "gradient:"): text for name, text in cut.items()}
    return Handwritten("tensor parallel", sizes.shapes(), reference(sizes), step(sizes), BUGS, sizes.integers(), layouts)
