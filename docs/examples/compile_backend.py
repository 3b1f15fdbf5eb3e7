"""Through torch.compile: nothing of hocket is imported, torch finds the backend by its name."""

import copy

import torch
from torch import nn

torch.manual_seed(0)
model = nn.Sequential(nn.Linear(32, 128), nn.ReLU(), nn.Linear(128, 8))
plain = copy.deepcopy(model)

compiled = torch.compile(model, backend="hocket", options={"mesh": "tp=2"})

x = torch.randn(16, 32)
compiled(x).square().mean().backward()
plain(x).square().mean().backward()

for (name, ours), theirs in zip(model.named_parameters(), plain.parameters(), strict=True):
    difference = (ours.grad - theirs.grad).abs().max().item()
    print(f"{name:10} gradient differs by {difference:.1e}")
    assert difference < 1e-5
