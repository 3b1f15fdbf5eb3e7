"""Sample a masked autoregressive network by windows: the samples of drawing one position after the other, in fewer sweeps."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import hocket

torch.manual_seed(0)
POSITIONS, HIDDEN = 64, 128


class Made(nn.Module):
    """One hidden layer whose units see a growing part of the positions."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(POSITIONS, HIDDEN), nn.Linear(HIDDEN, POSITIONS)
        sees = torch.arange(HIDDEN) * (POSITIONS - 1) // HIDDEN  # the last position that a hidden unit may read
        place = torch.arange(POSITIONS)
        self.register_buffer("first", (sees[:, None] >= place[None]).float())
        self.register_buffer("second", (place[:, None] > sees[None]).float())

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(nn.functional.linear(x, self.up.weight * self.first, self.up.bias))
        return nn.functional.linear(hidden, self.down.weight * self.second, self.down.bias)


def draw(logits: Tensor, noise: Tensor) -> Tensor:
    return (noise < logits).float()


made = Made().eval()
noise = torch.randn(8, POSITIONS)

x, report = hocket.sample(made, draw, noise, window=16)
print(report)

one_by_one = torch.zeros_like(noise)
with torch.no_grad():
    for position in range(POSITIONS):
        one_by_one[:, position] = draw(made(one_by_one), noise)[:, position]
print("the same samples:", torch.equal(x, one_by_one))

try:
    hocket.sample(made, draw, noise, order=list(reversed(range(POSITIONS))))
except hocket.errors.InputError as error:
    print("InputError:", error)
