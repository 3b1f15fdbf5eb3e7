"""Sampling a MADE trained on MNIST: by windows, pixel by pixel, and by an incremental sampler that computes each unit once.

The fair baseline is the incremental one: it knows the masks, keeps every hidden unit, and computes each when its inputs are known.
Data: ``chain_digits``.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from chain_digits import draw, is_there, logistic, timed, trained
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
    if not is_there("sampling"):
        return []
    torch.set_num_threads(1)
    torch.manual_seed(0)
    made = Made()
    trained(made, "made", TRAINING / 10 if quick else TRAINING, batch=128, rate=1e-3)
    incremental = Incremental(made)
    (w0, b0), (w1, b1), (w2, b2) = [(w.contiguous(), b) for w, b in made.weights()]
    linear = nn.functional.linear

    def baked(x: Tensor) -> Tensor:
        return linear(torch.relu(linear(torch.relu(linear(x, w0, b0)), w1, b1)), w2, b2)

    found = []
    for count in (1, 16, 100):
        progress(f"sampling {count} images at once")
        noise = logistic(count)
        expected = pixel_by_pixel(baked, noise)
        for _ in range(24):  # "auto" tries its windows
            image, report = hocket.sample(made, draw, noise)
            if not torch.equal(image, expected):
                raise AssertionError(f"windows of {report.window} drew another image")
        contenders = {
            "ours": lambda n=noise: timed(lambda: hocket.sample(made, draw, n)),
            CACHED: lambda n=noise: timed(lambda: incremental(n)),
            NAIVE: lambda n=noise: timed(lambda: pixel_by_pixel(baked, n)),
        }
        samples = take_turns(contenders, 3 if quick else 7)
        _, report = hocket.sample(made, draw, noise)
        case = f"{count} at once, bit for bit the same, {report.sweeps} sweeps in windows of {report.window}"
        found.append(versus(CLAIM, f"{case}; against {NAIVE}", samples["ours"], NAIVE, samples[NAIVE], 100))
        found.append(versus(CLAIM, f"{case}; against {CACHED}", samples["ours"], CACHED, samples[CACHED], 2.5))
    return found
