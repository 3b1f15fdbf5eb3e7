"""The tactic behind ``tactics=[..., OverlapTiles()]``: hide what collectives take behind what is computed."""

from __future__ import annotations

from dataclasses import dataclass

from ...passes.nano_batch import NanoBatch
from ...passes.overlap_order import OverlapOrder
from ...passes.swaps.swap import SwapProducts
from ...passes.tiles.fuse import FuseTiles
from ..contract import Pass
from ..plan.tactics import RewriteTactic


@dataclass(frozen=True)
class OverlapTiles(RewriteTactic):
    """Fuse products with the collectives around them into tile loops, and let what stays travel behind independent work.

    tiles: per rank's chunk, 0 to let the cost model choose; least_gain: predicted part of a region's time that a loop must save;
    joined: whether one loop may hold the collectives on both sides of a layer; order: also issue the other collectives early and
    wait for them late, holding at most ``memory`` times the bytes; nano_batch: first run the batch in two halves where collectives
    of one are predicted to travel behind the other (a network that moves data by itself; shared memory does not); swaps: first
    gather the factors of a product instead of adding up products, or the other way round, where that is predicted to be quicker.
    """

    tiles: int = 0
    least_gain: float = 0.03
    joined: bool = True
    order: bool = True
    memory: float = 1.1
    nano_batch: bool = False
    swaps: bool = True

    def loops(self) -> FuseTiles:
        """The pass that makes loops; it remembers what it has chosen, so every program gets a new one."""
        return FuseTiles(tiles=self.tiles, least_gain=self.least_gain, joined=self.joined)

    def rewrites_after(self) -> tuple[Pass, ...]:
        """Halves, swaps, tile loops, then the order of what is left."""
        halves: tuple[Pass, ...] = (NanoBatch(),) if self.nano_batch else ()
        order: tuple[Pass, ...] = (OverlapOrder(memory=self.memory),) if self.order else ()
        swaps: tuple[Pass, ...] = (SwapProducts(),) if self.swaps else ()
        return (*halves, *swaps, self.loops(), *order)
