"""A DenseNet block as a chain over its layers: what solving it at once costs one core, and what a device a layer would make of it.

The published figure (2.1x) is an estimate of the second kind. Both are shown here, apart.
"""

from __future__ import annotations

import math

import torch
from common import Row, Sample, cpu_seconds, progress, versus
from torch import Tensor, nn

import hocket
from hocket.runtime.fixedpoint.report import RECENT

CLAIM = "a DenseNet block as a chain over its layers, one core: a loss"
ESTIMATE = "the same with one device a layer, by the published way to estimate (sweeps of the slowest layer)"
START, GROWTH, SIDE = 24, 12, 14
TOLERANCE = 1e-5


class DenseBlock(nn.Module):
    """Layers that each read all features so far and add GROWTH: steps of a chain whose weights are stacked."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        self.layers, features = layers, START + layers * GROWTH
        weights = torch.zeros(layers, GROWTH, features, 3, 3)
        for depth in range(layers):
            reads = START + depth * GROWTH
            weights[depth, :, :reads] = torch.randn(GROWTH, reads, 3, 3) * math.sqrt(2 / (9 * reads))
        self.weights = nn.Parameter(weights)
        self.register_buffer("places", torch.eye(layers))

    def forward(self, x: Tensor) -> Tensor:
        """x: ``[images, START, SIDE, SIDE]``; all features of the block."""
        rest = x.new_zeros(x.shape[0], self.layers * GROWTH, *x.shape[2:])

        def step(features: Tensor, layer: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
            weight, place = layer
            made = nn.functional.conv2d(torch.relu(features), weight, padding=1)
            spread = (place[None, :, None, None, None] * made[:, None]).flatten(1, 2)
            return features + nn.functional.pad(spread, (0, 0, 0, 0, START, 0)), made[:, 0, 0, 0]

        return hocket.sequential(step)(torch.cat([x, rest], 1), (self.weights, self.places))[0]

    def plain(self, x: Tensor) -> tuple[Tensor, list[float]]:
        """The block as people write it, and the CPU seconds of each layer."""
        seconds = []
        for depth in range(self.layers):
            weight = self.weights[depth, :, : x.shape[1]].contiguous()
            seconds.append(cpu_seconds(lambda x=x, w=weight: nn.functional.conv2d(torch.relu(x), w, padding=1), 3).median)
            x = torch.cat([x, nn.functional.conv2d(torch.relu(x), weight, padding=1)], 1)
        return x, seconds


@torch.no_grad()
def rows(*, quick: bool) -> list[Row]:
    """The block layer by layer against all layers at once, swept until nothing changes by more than TOLERANCE."""
    torch.set_num_threads(1)
    layers = 8 if quick else 24
    torch.manual_seed(0)
    block, x = DenseBlock(layers).requires_grad_(requires_grad=False).eval(), torch.randn(1, START, SIDE, SIDE)
    progress(f"a DenseNet block of {layers} layers")
    expected, by_layer = block.plain(x)
    tactics = [hocket.Jacobi("jacobi", exact=TOLERANCE)]
    swept = hocket.parallelize(block, "one=1", (x,), tactics=tactics, engine="sim", verify="off")
    found = swept(x)
    sweeps = RECENT[-1].sweeps
    error = float((found - expected).abs().amax() / expected.abs().amax())
    case = f"{layers} layers, {SIDE} x {SIDE}, {sweeps} sweeps to {TOLERANCE:g} (error {error:.0e})"
    layer_by_layer = Sample((sum(by_layer),))
    estimate = versus(ESTIMATE, case, Sample((sweeps * max(by_layer),)), "layer by layer", layer_by_layer)
    return [
        versus(CLAIM, case, cpu_seconds(lambda: swept(x), 3), "layer by layer", layer_by_layer),
        Row(**{**estimate.__dict__, "simulated": True}),
    ]
