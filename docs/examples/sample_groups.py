"""Draw an image in groups of positions that tell little of each other (locality-aware parallel decoding): few evaluations."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import hocket

torch.manual_seed(0)
SIDE, STEPS, HIDDEN = 12, 14, 256
groups = hocket.locality_order((SIDE, SIDE), STEPS)
print("positions a group:", [len(group) for group in groups])


class GroupedMade(nn.Module):
    """A masked network whose positions read earlier groups only; train it with the same masks."""

    def __init__(self) -> None:
        super().__init__()
        rank = torch.empty(SIDE * SIDE)
        for i, group in enumerate(groups):
            rank[group] = float(i)
        self.up, self.down = nn.Linear(SIDE * SIDE, HIDDEN), nn.Linear(HIDDEN, SIDE * SIDE)
        sees = torch.arange(HIDDEN) % STEPS  # the last group that a hidden unit may read
        self.register_buffer("first", (sees[:, None] >= rank[None]).float())
        self.register_buffer("second", (rank[:, None] > sees[None]).float())

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(nn.functional.linear(x, self.up.weight * self.first, self.up.bias))
        return nn.functional.linear(hidden, self.down.weight * self.second, self.down.bias)


def draw(logits: Tensor, noise: Tensor) -> Tensor:
    return (noise < logits).float()


made = GroupedMade().eval()
noise = torch.randn(4, SIDE * SIDE)
x, report = hocket.sample(made, draw, noise, order=groups, window=SIDE * SIDE)
print(report)
print(f"{SIDE * SIDE} positions in no more sweeps than groups:", report.sweeps <= STEPS + 1)

group_by_group = torch.zeros_like(noise)
with torch.no_grad():
    for group in groups:
        group_by_group[:, group] = draw(made(group_by_group), noise)[:, group]
print("the same samples:", torch.equal(x, group_by_group))
