"""Hide collectives behind the products beside them: one tactic, the same numbers, and a reason for every choice."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import hocket


class Block(nn.Module):
    """A residual MLP."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.gelu(self.up(self.norm(x))))


torch.manual_seed(0)
model, x = nn.Sequential(Block(64), Block(64)), torch.randn(4, 16, 64)
expected = model(x)

# so small a model has nothing to gain; a negative bound fuses what can be fused all the same
tactics = [hocket.SequenceParallel("tp"), hocket.OverlapTiles(least_gain=-100.0)]
with hocket.parallelize(model, "tp=2", (x,), tactics=tactics) as parallel:
    y = parallel(x)
    y.sum().backward()
    print("largest difference from the plain model:", (y - expected).abs().max().item())
    assert torch.allclose(y, expected, atol=1e-5)
    print(parallel.explain("up.weight"))
    text = " ".join(str(parallel.explain()).split())
    print("kinds of tile loops:", text.count("in one loop"))
    assert "in one loop" in text
