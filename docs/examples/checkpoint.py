"""A checkpoint is a checkpoint: saved from the parallel model, loaded into the plain one, and back."""

import tempfile
from pathlib import Path

import torch
from torch import nn

import hocket


def build() -> nn.Module:
    """The plain model."""
    return nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 16))


torch.manual_seed(0)
x = torch.randn(8, 16)
path = Path(tempfile.mkdtemp()) / "model.pt"

with hocket.parallelize(build(), "tp=2", example_args=(x,)) as parallel:
    optimizer = torch.optim.AdamW(parallel.parameters(), lr=1e-2)
    for _ in range(3):
        optimizer.zero_grad()
        (parallel(x) - x).square().mean().backward()
        optimizer.step()
    torch.save(parallel.state_dict(), path)

    plain = build()
    plain.load_state_dict(torch.load(path))
    difference = (plain(x) - parallel(x)).abs().max().item()
    print(f"plain model after loading differs by {difference:.1e}")
    assert difference < 1e-5

    other = build()
    parallel.load_state_dict(other.state_dict())
    difference = (other(x) - parallel(x)).abs().max().item()
    print(f"parallel model after loading differs by {difference:.1e}")
    assert difference < 1e-5
