"""See on one machine what a network costs and what overlap hides of it: ranks over an emulated link, with and without loops."""

from __future__ import annotations

import time

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import hocket


class Block(nn.Module):
    """A residual MLP."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.gelu(self.up(x)))


torch.manual_seed(0)
model, x = nn.Sequential(Block(256), Block(256)), torch.randn(512, 256)
expected = model(x)
link = "link:20us,500MB/s"  # latency, bandwidth
weights = {"*.up.weight": "tp:S(0)", "*.down.weight": "tp:S(1)"}

for name, extra in (("collectives as they are", []), ("loops where they pay", [hocket.OverlapTiles()])):
    tactics = [hocket.TensorParallel("tp"), *extra]
    with hocket.parallelize(model, "tp=2", (x,), tactics=tactics, constraints=weights, transport=link) as parallel:
        assert torch.allclose(parallel(x), expected, atol=1e-5)
        times = []
        for _ in range(5):
            start = time.perf_counter()
            parallel(x).sum().backward()
            times.append(time.perf_counter() - start)
        loops = " ".join(str(parallel.explain()).split()).count("in one loop")
        print(f"{name}: {min(times) * 1e3:.1f} ms a step, {loops} kinds of loops")
