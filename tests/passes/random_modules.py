"""Random modules with what makes a backward hard to split: residuals, reuse, several outputs, frozen weights, dropout, norms."""

from __future__ import annotations

import random

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WIDTH, CHANNELS = 6, 4
KINDS = ("linear", "frozen", "reuse", "norm", "batch", "conv", "chunk", "dropout", "gelu", "residual", "sort", "rms")


class RandomModule(nn.Module):
    """A chain drawn from ``KINDS`` on [rows, CHANNELS, WIDTH]; returns a scalar loss."""

    def __init__(self, seed: int, depth: int = 8, kinds: tuple[str, ...] = KINDS) -> None:
        super().__init__()
        draw = random.Random(seed)
        torch.manual_seed(seed)
        self.kinds = ["linear", *(draw.choice(kinds) for _ in range(depth)), "linear"]
        self.shared = nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH))
        self.layers = nn.ModuleList(self._layer(kind) for kind in self.kinds)

    def _layer(self, kind: str) -> nn.Module:
        match kind:
            case "linear" | "frozen":
                return nn.Linear(WIDTH, WIDTH, bias=kind == "linear").requires_grad_(kind == "linear")
            case "norm":
                return nn.LayerNorm(WIDTH)
            case "rms":
                return nn.RMSNorm(WIDTH)
            case "batch":
                return nn.BatchNorm1d(CHANNELS)
            case "conv":
                return nn.Conv1d(CHANNELS, CHANNELS, 3, padding=1)
            case "dropout":
                return nn.Dropout(0.3)
            case "chunk":
                return nn.Linear(WIDTH, 2 * WIDTH)
            case _:
                return nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        values = [x]
        for kind, layer in zip(self.kinds, self.layers, strict=True):
            last = values[-1]
            match kind:
                case "reuse":
                    last = self.shared(last)
                case "chunk":
                    left, right = layer(last).chunk(2, -1)
                    last = left * torch.sigmoid(right)
                case "gelu":
                    last = F.gelu(last)
                case "residual":
                    last = last + values[len(values) // 2]
                case "sort":
                    ordered, where = last.sort(-1)
                    last = ordered * 2 + where
                case _:
                    last = layer(last)
            values.append(last)
        return values[-1].square().mean()


def rows(seed: int, count: int = 4) -> Tensor:
    """An input."""
    return torch.randn(count, CHANNELS, WIDTH, generator=torch.Generator().manual_seed(seed))
