"""A small model with everything a pipeline meets, and what plain PyTorch does with its micro-batches."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Ranks have one thread here; sums over two threads are added up in another order."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Block(nn.Module):
    """Residual, norm, two products."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.gelu(self.up(self.norm(x))))


class Language(nn.Module):
    """Embedding, blocks, head; tied: the head reads the embedding's weight."""

    def __init__(self, layers: int = 1, width: int = 8, *, tied: bool = False) -> None:
        super().__init__()
        self.embed = nn.Embedding(16, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(layers))
        self.head = nn.Linear(width, 16, bias=False)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        h = self.embed(x)
        for block in self.blocks:
            h = block(h)
        logits: Tensor = self.head(h)
        if y is None:
            return logits
        return (
            -torch.log_softmax(logits, -1).gather(-1, y.unsqueeze(-1)).mean()
        )  # cross_entropy is one kernel, and rounds otherwise


def tokens(rows: int = 8) -> tuple[Tensor, Tensor]:
    """Inputs and targets."""
    generator = torch.Generator().manual_seed(rows)
    return torch.randint(16, (rows, 4), generator=generator), torch.randint(16, (rows, 4), generator=generator)


def plain_step(
    model: nn.Module, batch: tuple[Tensor, Tensor], rows: Sequence[int], between: Callable[[], object] | None = None
) -> Tensor:
    """Losses and gradients of micro-batches of so many rows, one after the other, each weighed by its rows; returns the loss."""
    losses = []
    for x, y in zip(batch[0].split(list(rows)), batch[1].split(list(rows)), strict=True):
        loss = model(x, y) * (len(x) / len(batch[0]))
        loss.backward()
        losses.append(loss.detach())
        if between is not None:
            between()
    return torch.stack(losses).sum()
