"""A convolutional autoregressive network evaluated where a window of places can change it: rows of its images, not dense masks.

    place p of an image of width W is pixel (p // W, p % W);    row i of a layer reads rows i + low .. i + high of the layer before

A masked or shifted convolution (PixelCNN, arXiv 1606.05328; PixelCNN++, arXiv 1701.05517) reads rows above and beside a pixel only,
so high <= 0 on the way from input to result. Of every layer the rows before those that the window reaches keep their values, and
rows behind those that its parameters need are left out. Rows of a kernel that are zero (the mask) are not multiplied.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.fx as fx
from torch import Tensor


class Read(NamedTuple):
    """Row i of a layer reads rows i + low .. i + high of another."""

    source: fx.Node
    low: int
    high: int


@dataclass(frozen=True)
class Layer:
    """An image ``[rows, C, H, W]`` of the network. compute: from its sources' rows, one tensor each, its own; shape: without the
    rows of the batch; reads: its sources.
    """

    reads: tuple[Read, ...]
    compute: Callable[..., Tensor]
    shape: tuple[int, int, int]


@dataclass(frozen=True)
class Regions:
    """layers: in order, the pixels first (without a rule); elements: per place and parameter, which element of the last layer,
    int64 ``[places, k]``; shape: of one place's parameters; width: of the image.
    """

    layers: Mapping[fx.Node, Layer]
    pixels: fx.Node
    last: fx.Node
    elements: Tensor
    shape: tuple[int, ...]
    width: int

    def reached(self, row: int) -> dict[fx.Node, int]:
        """The first row of every layer that pixels from ``row`` on can change."""
        found = {self.pixels: row}
        for node, layer in self.layers.items():
            if node is not self.pixels:
                found[node] = max(0, min(found[read.source] - read.high for read in layer.reads))
        return found

    def needed(self, row: int) -> dict[fx.Node, int]:
        """The last row of every layer that parameters up to ``row`` read; -1 for none."""
        found = dict.fromkeys(self.layers, -1)
        found[self.last] = row
        for node in reversed(list(self.layers)):
            for read in self.layers[node].reads:
                if found[node] >= 0:
                    most = self.layers[read.source].shape[1] - 1
                    found[read.source] = max(found[read.source], min(most, found[node] + read.high))
        return found


class RegionNet:
    """The layers of a network with the values of a batch; the same interface as ``SlicedNet``."""

    def __init__(self, regions: Regions, rows: int, dtype: torch.dtype) -> None:
        self._regions = regions
        height = regions.layers[regions.pixels].shape[1]
        self.inputs = torch.zeros(rows, height * regions.width, dtype=dtype)
        self._images = {n: torch.zeros(rows, *layer.shape, dtype=dtype) for n, layer in regions.layers.items()}
        self._images[regions.pixels] = self.inputs.view(rows, 1, height, regions.width)
        self._done = dict.fromkeys(regions.layers, 0)  # rows that hold their last values
        self._last: dict[fx.Node, int] = {}
        self._sweep: list[Callable[[], object]] = []
        self._read = torch.zeros(0, dtype=torch.int64)

    def begin(self, start: int, end: int) -> None:
        """Move to the window of places ``[start, end)``; all places before it are settled."""
        width = self._regions.width
        first, self._last = self._regions.reached(start // width), self._regions.needed((end - 1) // width)
        self._sweep = []
        for node in list(self._regions.layers)[1:]:
            behind = self._last[node] + 1
            settled = min(first[node], behind)
            if settled > self._done[node]:
                self._computing(node, self._done[node], settled)()
                self._done[node] = settled
            if behind > first[node]:
                self._sweep.append(self._computing(node, first[node], behind))
        self._read = self._regions.elements[start:end].flatten()
        self._count = end - start

    def parameters(self) -> Tensor:
        """The parameters of the window's places, from the present values of its pixels."""
        for compute in self._sweep:
            compute()
        image = self._images[self._regions.last]
        return image.flatten(1).index_select(1, self._read).reshape(image.shape[0], self._count, *self._regions.shape)

    def settle(self, place: int) -> None:
        """The places before ``place`` keep the values from which the last parameters were computed."""
        first = self._regions.reached(place // self._regions.width)
        for node, known in self._done.items():
            self._done[node] = max(known, min(first[node], self._last[node] + 1))

    def _computing(self, node: fx.Node, low: int, high: int) -> Callable[[], object]:
        """What computes rows of a layer; views are made here, once a window."""
        layer, out = self._regions.layers[node], self._images[node][:, :, low:high]
        sources = [self._rows(read, low, high) for read in layer.reads]
        return lambda: out.copy_(layer.compute(*[take() for take in sources]))

    def _rows(self, read: Read, low: int, high: int) -> Callable[[], Tensor]:
        """Rows that some rows of a layer read; those outside of the image are zeros."""
        image = self._images[read.source]
        start, stop, most = low + read.low, high + read.high, image.shape[2]
        part = image[:, :, max(start, 0) : min(stop, most)]
        above, below = max(0, min(-start, stop - start)), max(0, min(stop - most, stop - start))
        if not above and not below:
            return lambda: part
        return lambda: torch.nn.functional.pad(part, (0, 0, above, below))
