"""Hypothesis strategies: shapes, meshes, programs and plans.

A program is a chain of layers drawn by name; most of them read the newest value, so that one layer's mistake meets the next one.
A few read an older value, which makes residuals and values with several users. Plans take any rule of the table for any op,
whatever it costs, and prefer rules that cut something, because replication hides mistakes.
"""

from __future__ import annotations

import functools
import random
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor, nn

from ..compiler.capture import capture
from ..compiler.plan.plan import Plan
from ..compiler.program import Program
from ..runtime.mesh import Mesh
from .random_plans import random_plan

UNARY = ("linear", "bias-free", "gelu", "relu", "silu", "softmax", "norm", "transpose", "fold", "mean", "max")
BINARY = ("add", "mul", "gate")


@dataclass(frozen=True)
class Step:
    """One layer. back: how far before the newest value the second operand lies."""

    kind: str
    back: int = 1


class Layers(nn.Module):
    """A chain of steps on [batch, sequence, width]."""

    def __init__(self, steps: tuple[Step, ...], width: int) -> None:
        super().__init__()
        self.steps = steps
        self.maps = nn.ModuleList(_layer(step.kind, width) for step in steps)

    def forward(self, x: Tensor) -> Tensor:
        """The newest value."""
        values = [x]
        for step, layer in zip(self.steps, self.maps, strict=True):
            newest = values[-1]
            older = values[max(len(values) - 1 - step.back, 0)]
            values.append(_apply(step.kind, layer, newest, older))
        return values[-1]


def _layer(kind: str, width: int) -> nn.Module:
    match kind:
        case "linear" | "bias-free":
            return nn.Linear(width, width, bias=kind == "linear")
        case "norm":
            return nn.LayerNorm(width)
    return nn.Identity()


def _apply(kind: str, layer: nn.Module, x: Tensor, older: Tensor) -> Tensor:
    match kind:
        case "gelu" | "relu" | "silu":
            return getattr(F, kind)(x)  # type: ignore[no-any-return]
        case "softmax":
            return x.softmax(-1)
        case "transpose":
            return x.transpose(0, 1).contiguous().transpose(0, 1) * 2
        case "fold":
            return (x.flatten(0, 1) * 2).view(x.shape)
        case "mean":
            return x - x.mean((0, 1), keepdim=True)
        case "max":
            return x - x.amax(-1, keepdim=True)
        case "add":
            return x + older
        case "mul":
            return x * older
        case "gate":
            return x * torch.sigmoid(older)
    return layer(x)  # type: ignore[no-any-return]


def shapes(*, rank: int = 3, smallest: int = 2, largest: int = 6) -> st.SearchStrategy[tuple[int, ...]]:
    """Sizes of one tensor."""
    return st.tuples(*[st.integers(smallest, largest)] * rank)


def meshes(*, most_ranks: int = 4) -> st.SearchStrategy[Mesh]:
    """Meshes of one or two axes with 2 to ``most_ranks`` ranks."""
    one = [Mesh((("a", n),)) for n in range(2, most_ranks + 1)]
    two = [Mesh((("a", n), ("b", m))) for n in range(2, most_ranks + 1) for m in range(2, most_ranks + 1) if n * m <= most_ranks]
    return st.sampled_from([*one, *two])


@st.composite
def programs(draw: st.DrawFn, *, most_layers: int = 4, train: bool = True) -> Program:
    """Captured programs of random layers, with their backward where ``train``."""
    kinds = st.sampled_from([*UNARY, *BINARY])
    steps = st.builds(Step, kinds, st.sampled_from([1, 1, 1, 2, 3]))
    chain = tuple(draw(st.lists(steps, min_size=1, max_size=most_layers)))
    return _captured(chain, draw(shapes()), train)


@functools.lru_cache(maxsize=256)
def _captured(steps: tuple[Step, ...], shape: tuple[int, ...], train: bool) -> Program:  # noqa: FBT001
    torch.manual_seed(0)
    return capture(Layers(steps, shape[-1]), (torch.randn(shape, requires_grad=train),), train=train)


def plans(program: Program, mesh: Mesh) -> st.SearchStrategy[Plan]:
    """Valid plans for a program: any rule on any axis, mostly rules that cut something."""
    return st.integers(0, 1 << 20).map(lambda seed: random_plan(program, mesh, random.Random(seed)))
