"""Data parallelism with synchronised batch norm by hand: sums of x and x^2 over all ranks, statistics of the whole batch."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from .llama import EPS, cross_entropy, linear
from .ranks import Handwritten, Ranks, Tensors, as_leaves, sum_both, with_gradients

BUGS = {
    "statistics of a rank's own rows": "every rank normalises with its own mean and variance",
    "running variance biased": "the running variance is divided by n instead of n - 1",
}
MOMENTUM = 0.1

Moments = Callable[[Tensor], tuple[Tensor, Tensor]]


def _whole(x: Tensor) -> tuple[Tensor, Tensor]:
    mean = x.mean((0, 2, 3))
    return mean, (x - mean[:, None, None]).square().mean((0, 2, 3))


def _forward(p: Tensors, moments: Moments) -> tuple[Tensor, Tensor, Tensor]:
    """(summed loss, mean, variance)."""
    x = F.conv2d(p["input:image"], p["param:conv.weight"], None, 1, 1)
    mean, variance = moments(x)
    normed = (x - mean[:, None, None]) * torch.rsqrt(variance + EPS)[:, None, None]
    y = F.relu(normed * p["param:norm.weight"][:, None, None] + p["param:norm.bias"][:, None, None])
    return cross_entropy(linear(p, "param:out", y.mean((2, 3))), p["input:targets"]), mean.detach(), variance.detach()


def _running(p: Tensors, mean: Tensor, variance: Tensor, correction: float) -> Tensors:
    old_mean, old_variance = p["buffer:norm.running_mean"], p["buffer:norm.running_var"]
    return {
        "update:norm.running_mean": (1 - MOMENTUM) * old_mean + MOMENTUM * mean,
        "update:norm.running_var": (1 - MOMENTUM) * old_variance + MOMENTUM * correction * variance,
    }


def _count(x: Tensor) -> int:
    return x.shape[0] * x.shape[2] * x.shape[3]


def reference(tensors: Tensors) -> Tensors:
    """The whole batch in one process."""
    p = as_leaves(tensors)
    loss, mean, variance = _forward(p, _whole)
    loss, n = loss / p["input:targets"].numel(), _count(p["input:image"])
    return {"output:loss": loss.detach(), **with_gradients(loss, p), **_running(p, mean, variance, n / (n - 1))}


def step(here: Ranks, tensors: Tensors) -> Tensors:
    """The step of one rank."""
    p = as_leaves(tensors)
    n = _count(p["input:image"]) * here.size

    def synced(x: Tensor) -> tuple[Tensor, Tensor]:
        if here.has("statistics of a rank's own rows"):
            return _whole(x)
        mean = sum_both(here, x.sum((0, 2, 3))) / n
        return mean, sum_both(here, x.square().sum((0, 2, 3))) / n - mean.square()

    loss, mean, variance = _forward(p, synced)
    loss = loss / (p["input:targets"].numel() * here.size)
    results = {"output:loss": here.sum(loss.detach())}
    results |= {name: here.sum(gradient) for name, gradient in with_gradients(loss, p).items()}
    correction = 1.0 if here.has("running variance biased") else n / (n - 1)
    return results | _running(p, mean, variance, correction)


def synced_norm(rows: int = 4, channels: int = 4, side: int = 3, classes: int = 3) -> Handwritten:
    """The program with its bugs."""
    shapes = {
        "input:image": (rows, 2, side, side),
        "input:targets": (rows,),
        "param:conv.weight": (channels, 2, 3, 3),
        "param:norm.weight": (channels,),
        "param:norm.bias": (channels,),
        "param:out.weight": (classes, channels),
        "param:out.bias": (classes,),
        "buffer:norm.running_mean": (channels,),
        "buffer:norm.running_var": (channels,),
    }
    cut = {"input:image": "S(0)", "input:targets": "S(0)"}
    return Handwritten("synchronised batch norm", shapes, reference, step, BUGS, {"input:targets": classes}, cut)
