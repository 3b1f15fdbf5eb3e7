"""A link between two rank processes that moves bytes by itself: a product and its reduce-scatter over it, in every form."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from hocket.runtime.executors.tile_ready import ReadyLoop
from hocket.runtime.executors.tile_runner import TileRunner
from hocket.runtime.link import LinkCommunicator
from hocket.runtime.tile_loop import TileLoop
from hocket.runtime.transports.link import LinkSpec, LinkTransport

if TYPE_CHECKING:
    from tiles_ranks import Bench

Form = tuple[int, int, bool]
"""Tiles a chunk, their growth, and whether ranks compute their own chunk first."""


class LinkBench:
    """One rank's end of a link over the shared memory of its ``Bench``. Loops of both follow each other on the same signals."""

    def __init__(self, bench: Bench) -> None:
        self.bench = bench
        self.communicator = LinkCommunicator(bench.shm, LinkTransport(bench.shm.transport, LinkSpec(0.0, 1e12)))
        self.runner = TileRunner.of(self.communicator)

    def tuned(self, line: tuple[float, float]) -> LinkCommunicator:
        """The communicator, with a link of that line."""
        transport = self.communicator.transport
        transport.spec = transport.wire.spec = LinkSpec(line[0], 1 / max(line[1], 1e-15))
        return self.communicator

    def contenders(
        self, loop: TileLoop, shape: Sequence[int], forms: Sequence[Form], line: tuple[float, float]
    ) -> dict[str, Callable[[], Any]]:
        """The product alone, product and collective one after the other, and the loop in every form. line: seconds a message and a
        byte."""
        self.tuned(line)
        m, k, n = shape
        torch.manual_seed(self.bench.rank)
        x, w, out = torch.randn(m, k // loop.parts) / 8, torch.randn(k // loop.parts, n) / 8, torch.empty(m, n)
        link, axis = self.communicator, loop.axis
        found: dict[str, Callable[[], Any]] = {
            "product alone": lambda: torch.mm(x, w, out=out),
            "apart": lambda: link.wait(link.reduce_scatter(torch.mm(x, w), "sum", axis)),
        }
        for tiles, growth, eager in forms:
            ready = ReadyLoop(dataclasses.replace(loop, tiles=tiles, growth=growth, eager=eager), self.bench.site)
            found[name_of((tiles, growth, eager))] = lambda ready=ready: self.runner.run(ready, (x, w))  # type: ignore[misc]
        return found


def name_of(form: Form) -> str:
    """Of a contender."""
    tiles, growth, eager = form
    return f"{tiles} {'growing ' * (growth > 1)}tile{'s' * (tiles > 1)}{', own chunk first' * eager}"


def first_share(tiles: int, growth: int) -> float:
    """The part of a chunk that its first tile is."""
    return 1 / sum(growth**k for k in range(tiles))


def bound(alone: float, wire: float, first: float) -> float:
    """The part of what a link adds that loops of two ranks can hide at most. While the first of the peer's tiles (``first`` of
    them) is computed nothing travels; after that the slower of the two sets the pace."""
    fastest = max(alone, alone / 2 * first + wire)
    return (alone + wire - fastest) / (alone + wire - max(alone, wire))


def median_of(found: dict[str, list[float]]) -> dict[str, float]:
    """Per contender."""
    return {name: statistics.median(times) for name, times in found.items()}
