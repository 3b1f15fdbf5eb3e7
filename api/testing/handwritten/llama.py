"""A small Llama as functions of named tensors, on one rank: the reference that hand-written parallel versions are compared with.

B batch, S sequence, D width, H heads, F inner width of the perceptron, V words.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .ranks import Tensors, as_leaves, with_gradients

EPS = 1e-5


@dataclass(frozen=True)
class Sizes:
    """Global sizes of a model."""

    batch: int = 2
    sequence: int = 6
    width: int = 8
    heads: int = 4
    inner: int = 12
    words: int = 12
    layers: int = 1

    @property
    def head(self) -> int:
        """Width of a head."""
        return self.width // self.heads

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Every input and parameter."""
        d, inner = self.width, self.inner
        found: dict[str, tuple[int, ...]] = {"input:ids": (self.batch, self.sequence), "input:targets": (self.batch, self.sequence)}
        found["param:embed.weight"] = (self.words, d)
        for layer in range(self.layers):
            at = f"param:layers.{layer}."
            found |= {f"{at}norm1.weight": (d,), f"{at}norm2.weight": (d,)}
            for name, out, into in (("q", d, d), ("k", d, d), ("v", d, d), ("o", d, d), ("gate", inner, d), ("up", inner, d)):
                found |= {f"{at}{name}.weight": (out, into), f"{at}{name}.bias": (out,)}
            found |= {f"{at}down.weight": (d, inner), f"{at}down.bias": (d,)}
        return found | {"param:norm.weight": (d,), "param:head.weight": (self.words, d)}

    def integers(self) -> dict[str, int]:
        """Integer inputs and how many values they take."""
        return {"input:ids": self.words, "input:targets": self.words}


def rms(x: Tensor, weight: Tensor, eps: float = EPS) -> Tensor:
    """RMSNorm."""
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight


def linear(p: Tensors, name: str, x: Tensor) -> Tensor:
    """x W^T + b."""
    return F.linear(x, p[f"{name}.weight"], p.get(f"{name}.bias"))


def turn(x: Tensor, start: int = 0) -> Tensor:
    """Rotary embedding of [B, H, S, hd]; start: position of the first row."""
    half = x.shape[-1] // 2
    at = torch.arange(start, start + x.shape[-2], dtype=x.dtype)[:, None] / 10 ** torch.arange(half, dtype=x.dtype)
    first, second = x[..., :half], x[..., half:]
    return torch.cat([first * at.cos() - second * at.sin(), second * at.cos() + first * at.sin()], -1)


def heads(x: Tensor, count: int) -> Tensor:
    """[B, S, D] to [B, H, S, hd]."""
    found: Tensor = x.unflatten(-1, (count, -1)).transpose(1, 2)
    return found


def merged(x: Tensor) -> Tensor:
    """[B, H, S, hd] to [B, S, D]."""
    return x.transpose(1, 2).flatten(2)


def causal(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None, diagonal: int = 1) -> Tensor:
    """Causal attention of [B, H, S, hd]; diagonal: the first that is hidden."""
    hidden = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool).triu(diagonal)
    scores = q @ k.transpose(-1, -2) * (1 / math.sqrt(q.shape[-1]) if scale is None else scale)
    return scores.masked_fill(hidden, -math.inf).softmax(-1) @ v


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Summed over tokens."""
    rows = logits.flatten(0, -2)
    return (rows.logsumexp(-1) - rows.gather(1, targets.reshape(-1, 1))[:, 0]).sum()


Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


def block(p: Tensors, at: str, x: Tensor, count: int, attend: Attend = causal, start: int = 0) -> Tensor:
    """One layer."""
    h = rms(x, p[f"{at}norm1.weight"])
    q, k, v = (heads(linear(p, f"{at}{name}", h), count) for name in "qkv")
    x = x + linear(p, f"{at}o", merged(attend(turn(q, start), turn(k, start), v)))
    h = rms(x, p[f"{at}norm2.weight"])
    return x + linear(p, f"{at}down", F.silu(linear(p, f"{at}gate", h)) * linear(p, f"{at}up", h))


def reference(sizes: Sizes) -> Callable[[Tensors], Tensors]:
    """Loss and gradients of all parameters, in one process."""

    def step(tensors: Tensors) -> Tensors:
        p = as_leaves(tensors)
        x = F.embedding(p["input:ids"], p["param:embed.weight"])
        for layer in range(sizes.layers):
            x = block(p, f"param:layers.{layer}.", x, sizes.heads)
        logits = rms(x, p["param:norm.weight"]) @ p["param:head.weight"].t()
        loss = cross_entropy(logits, p["input:targets"]) / p["input:ids"].numel()
        return {"output:loss": loss.detach(), **with_gradients(loss, p)}

    return step
