"""The tactic behind ``tactics=[..., OverlapTiles()]``: hide what collectives take behind what is computed."""

from __future__ import annotations

from dataclasses import dataclass

from ...passes.overlap_order import OverlapOrder
from ...passes.tiles.fuse import FuseTiles
from ..contract import Pass
from ..plan.tactics import RewriteTactic


@dataclass(frozen=True)
class OverlapTiles(RewriteTactic):
    """Fuse products with the collectives around them into tile loops, and let what stays travel behind independent work.

    tiles: per rank's chunk, 0 to let the cost model choose; least_gain: predicted part of a region's time that a loop must save;
    joined: whether one loop may hold the collectives on both sides of a layer; order: also issue the other collectives early and
    wait for them late, holding at most ``memory`` times the bytes.
    """

    tiles: int = 0
    least_gain: float = 0.03
    joined: bool = True
    order: bool = True
    memory: float = 1.1

    def rewrites_after(self) -> tuple[Pass, ...]:
        """Tile loops, then the order of what is left."""
        fuse = FuseTiles(tiles=self.tiles, least_gain=self.least_gain, joined=self.joined)
        return (fuse, OverlapOrder(memory=self.memory)) if self.order else (fuse,)
