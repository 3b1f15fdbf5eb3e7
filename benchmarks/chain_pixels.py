"""Sampling a small PixelCNN++ trained on MNIST: by windows of rows, and pixel by pixel with and without a cache of the rows above.

The cached baseline computes of every layer only the rows that a pixel is read from; what lies above is kept.
"""

from __future__ import annotations

import time

import torch
import torch.nn.functional as F
from chain_digits import draw, is_there, logistic, timed, trained
from common import Row, Sample, progress, take_turns, versus
from torch import Tensor, nn

import hocket

CLAIM = "sampling a small PixelCNN++ of 28 x 28 pixels trained on MNIST"
PUBLISHED = "published: 6.3x over pixel by pixel, 4.2x over a cache, 100 at once on a GPU (arXiv 2002.03629, figure 3)"
TRAINING, CHANNELS, BLOCKS, SIDE = 90.0, 16, 2, 28
CACHED, NAIVE = "pixel by pixel, rows above kept", "pixel by pixel"


class PixelNet(nn.Module):
    """Gated residual blocks on two streams, shifted down and right (PixelCNN++, arXiv 1701.05517); a logit a pixel."""

    def __init__(self, channels: int = CHANNELS, blocks: int = BLOCKS) -> None:
        super().__init__()
        c = channels
        self.above, self.left, self.beside = nn.Conv2d(1, c, (2, 3)), nn.Conv2d(1, c, (1, 3)), nn.Conv2d(1, c, (2, 1))
        self.downs = nn.ModuleList(nn.Conv2d(2 * c, 2 * c, (2, 3)) for _ in range(blocks))
        self.rights = nn.ModuleList(nn.Conv2d(2 * c, 2 * c, (2, 2)) for _ in range(blocks))
        self.joins = nn.ModuleList(nn.Conv2d(2 * c, 2 * c, 1) for _ in range(blocks))
        self.out = nn.Conv2d(c, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        """``[rows, pixels] -> [rows, pixels]``."""
        image = x.view(x.shape[0], 1, SIDE, SIDE)
        u = _lower(self.above(F.pad(image, (1, 1, 1, 0))))
        ul = _lower(self.left(F.pad(image, (1, 1, 0, 0)))) + F.pad(self.beside(F.pad(image, (0, 0, 1, 0))), (1, 0, 0, 0))[..., :-1]
        for down, right, join in zip(self.downs, self.rights, self.joins, strict=True):
            u = _gated(u, down(F.pad(_both(u), (1, 1, 1, 0))))
            ul = _gated(ul, right(F.pad(_both(ul), (1, 0, 1, 0))) + join(_both(u)))
        return self.out(F.elu(ul)).view(x.shape)


def _lower(x: Tensor) -> Tensor:
    return F.pad(x, (0, 0, 1, 0))[:, :, :-1]


def _both(x: Tensor) -> Tensor:
    return F.elu(torch.cat([x, -x], 1))


def _gated(x: Tensor, gates: Tensor) -> Tensor:
    a, b = gates.chunk(2, 1)
    return x + a * torch.sigmoid(b)


@torch.no_grad()
def rows(*, quick: bool) -> list[Row]:
    """CPU seconds on one thread; all ways draw the same images, bit for bit."""
    if not is_there("PixelCNN++"):
        return []
    torch.set_num_threads(1)
    torch.manual_seed(0)
    name = f"pixelnet-{CHANNELS}-{BLOCKS}"
    net = trained(PixelNet(), name, TRAINING / 10 if quick else TRAINING, batch=32, rate=2e-3)
    found = []
    for count in (1,) if quick else (1, 16):
        progress(f"sampling {count} images at once from a PixelCNN++")
        noise = logistic(count, SIDE * SIDE)
        for _ in range(11):  # "auto" tries its windows
            image, report = hocket.sample(net, draw, noise)
        start = time.process_time()
        expected = _pixel_by_pixel(net, noise)
        naive = Sample((time.process_time() - start,))
        if not torch.equal(image, expected) or not torch.equal(hocket.sample(net, draw, noise, window=1).x, expected):
            raise AssertionError(f"windows of {report.window} drew another image")
        contenders = {
            "ours": lambda n=noise: timed(lambda: hocket.sample(net, draw, n)),
            CACHED: lambda n=noise: timed(lambda: hocket.sample(net, draw, n, window=1)),
        }
        samples = take_turns(contenders, 2 if quick else 3)
        _, report = hocket.sample(net, draw, noise)
        case = f"{count} at once, bit for bit the same, {report.sweeps} sweeps in windows of {report.window}"
        found.append(versus(CLAIM, f"{case}; against {NAIVE}", samples["ours"], NAIVE, naive))
        found.append(versus(CLAIM, f"{case}; against {CACHED}", samples["ours"], CACHED, samples[CACHED]))
    return found


def _pixel_by_pixel(net: nn.Module, noise: Tensor) -> Tensor:
    x = torch.zeros_like(noise)
    for i in range(noise.shape[1]):
        x[:, i] = draw(net(x), noise)[:, i]
    return x
