"""The models of 2BP's table besides the demo's Llama, small enough for one core a stage: BERT, Mamba in plain torch, ResNet."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from pipeline_hooks import Bottleneck
from torch import Tensor, nn

VOCABULARY = 256


@dataclass(frozen=True)
class Case:
    """A model from (inputs, targets) to its loss. data: of that many rows; rows: of a micro-batch."""

    model: Callable[[], nn.Module]
    data: Callable[[int], tuple[Tensor, Tensor]]
    rows: int


class Tokens(nn.Module):
    """An embedding, blocks, and the mean cross-entropy of a linear head."""

    def __init__(self, width: int, blocks: list[nn.Module]) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(VOCABULARY, width), nn.Linear(width, VOCABULARY)
        self.blocks = nn.ModuleList(blocks)

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """[rows, positions] each."""
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x)
        return F.cross_entropy(self.head(x).flatten(0, 1), targets.flatten())


class MambaBlock(nn.Module):
    """A selective state space (Mamba, arXiv 2312.00752, section 3), its scan a loop over the positions."""

    def __init__(self, width: int, states: int = 8) -> None:
        super().__init__()
        self.norm, self.inward, self.outward = nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.Linear(width, width)
        self.conv = nn.Conv1d(width, width, 4, padding=3, groups=width)
        self.select, self.steps = nn.Linear(width, 2 * states), nn.Linear(width, width)
        self.decay = nn.Parameter(torch.rand(width, states))

    def forward(self, x: Tensor) -> Tensor:
        """[rows, positions, width]."""
        inner, gate = self.inward(self.norm(x)).chunk(2, -1)
        inner = F.silu(self.conv(inner.transpose(1, 2))[..., : x.shape[1]].transpose(1, 2))
        b, c = self.select(inner).chunk(2, -1)
        dt = F.softplus(self.steps(inner))
        keep, add = torch.exp(-dt.unsqueeze(-1) * self.decay), (dt * inner).unsqueeze(-1) * b.unsqueeze(2)
        state, found = torch.zeros_like(add[:, 0]), []
        for t in range(x.shape[1]):
            state = keep[:, t] * state + add[:, t]
            found.append((state * c[:, t].unsqueeze(1)).sum(-1))
        return x + self.outward(torch.stack(found, 1) * F.silu(gate))


class ResNet(nn.Module):
    """Bottlenecks of one width, and the cross-entropy of their mean over the image."""

    def __init__(self, channels: int, blocks: int) -> None:
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, channels, 3, padding=1), nn.Linear(channels, 10)
        self.blocks = nn.Sequential(*(Bottleneck(channels) for _ in range(blocks)))

    def forward(self, images: Tensor, targets: Tensor) -> Tensor:
        """[rows, 3, height, width]; [rows]."""
        return F.cross_entropy(self.head(self.blocks(self.stem(images)).mean((2, 3))), targets)


def _tokens(length: int) -> Callable[[int], tuple[Tensor, Tensor]]:
    def data(rows: int) -> tuple[Tensor, Tensor]:
        return torch.randint(0, VOCABULARY, (rows, length)), torch.randint(0, VOCABULARY, (rows, length))

    return data


def _images(rows: int) -> tuple[Tensor, Tensor]:
    return torch.randn(rows, 3, 28, 28), torch.randint(0, 10, (rows,))


def _bert() -> nn.Module:
    return Tokens(256, [nn.TransformerEncoderLayer(256, 4, 1024, 0.0, "gelu", batch_first=True) for _ in range(4)])


CASES = {
    "BERT": Case(_bert, _tokens(128), 2),
    "Mamba": Case(lambda: Tokens(256, [MambaBlock(256) for _ in range(4)]), _tokens(24), 8),
    "ResNet": Case(lambda: ResNet(128, 8), _images, 4),
}
"""By the names of 2BP's table."""
