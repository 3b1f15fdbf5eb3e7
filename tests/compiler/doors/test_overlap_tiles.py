"""``OverlapTiles`` through the doors: proven, equal to eager, and run by real ranks on shared memory."""

from __future__ import annotations

import os
import signal
import time

import pytest
import torch
from torch import nn

import hocket
from hocket.errors import RunError
from hocket.runtime.engines.local import Limits, LocalEngine
from hocket.runtime.mesh import Mesh


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.norm = nn.Linear(16, 32), nn.Linear(32, 16), nn.LayerNorm(16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(x + self.down(torch.relu(self.up(x))))


ALWAYS = hocket.OverlapTiles(least_gain=-1e9)


@pytest.mark.parametrize(
    ("tactic", "engine"),
    [
        (hocket.TensorParallel, "local"),
        (hocket.SequenceParallel, "local"),
        pytest.param(hocket.DataParallel, "sim", marks=pytest.mark.slow),
        (hocket.SequenceParallel, "sim"),
    ],
)
def test_a_step_in_tile_loops_equals_eager(tactic, engine: str) -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(Block(), Block()), torch.randn(4, 8, 16)
    plain = model(x)
    plain.square().sum().backward()
    wanted = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    with hocket.parallelize(model, "tp=2", (x,), tactics=[tactic("tp"), ALWAYS], engine=engine) as parallel:
        for _ in range(3):  # buffers, signals and epochs are used again
            model.zero_grad()
            out = parallel(x)
            out.square().sum().backward()
        found = [p.grad.clone() for p in parallel.parameters()]
        text = str(parallel.explain())
    assert "in one loop" in " ".join(text.split())
    torch.testing.assert_close(out, plain)
    for mine, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("tactic", [hocket.TensorParallel, hocket.SequenceParallel])
def test_four_real_ranks_in_tile_loops_equal_eager(tactic) -> None:
    torch.manual_seed(1)
    model, x = nn.Sequential(Block(), Block()), torch.randn(4, 8, 16)
    with hocket.parallelize(model, "tp=4", (x,), tactics=[tactic("tp"), ALWAYS]) as parallel:
        torch.testing.assert_close(parallel(x), model(x))


@pytest.mark.parametrize("how", [pytest.param(signal.SIGKILL, marks=pytest.mark.slow), signal.SIGSTOP])
def test_a_peer_that_never_comes_is_one_error_in_time(how: signal.Signals) -> None:
    """The other rank waits for a tile; the engine names the culprit within its limit, and leaves nothing behind."""
    model, x = Block(), torch.randn(4, 8, 16)
    with LocalEngine(Mesh.parse("tp=2"), threads=1, limits=Limits(step=2.0, first=5.0)) as engine:
        parallel = hocket.parallelize(model, "tp=2", (x,), tactics=[hocket.TensorParallel("tp"), ALWAYS], engine=engine)
        parallel(x)
        os.kill(engine._crew.ranks[1].pid, how)
        start = time.monotonic()
        with pytest.raises(RunError, match="rank 1"):
            parallel(x)
        assert time.monotonic() - start < 15.0
