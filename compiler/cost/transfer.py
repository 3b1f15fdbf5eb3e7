"""Seconds and bytes of moving one value from one layout to another: the steps of ``redistribute`` priced by a cluster.

Besides the wire, a collective along another dimension than the first rearranges memory: ranks' pieces arrive one after another
(all-gather, all-to-all) or must be laid out one after another before they leave (reduce-scatter, all-to-all). Each such copy
reads and writes the tensor once.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from ...runtime.mesh import Mesh
from ..layout import Layout, Shard, local_shape
from ..redistribute import Step, StepKind, is_reachable, steps, wire_bytes
from .cluster import Cluster


@dataclass(frozen=True)
class Transfer:
    """Cost of one redistribution on one rank. step_bytes_moved: memory traffic of the rearranging copies, per step."""

    seconds: float
    bytes_on_wire: float
    steps: tuple[Step, ...]
    step_bytes_moved: tuple[float, ...]

    @property
    def bytes_moved(self) -> float:
        """Memory traffic of all rearranging copies."""
        return sum(self.step_bytes_moved)


@dataclass
class TransferPrices:
    """Prices of redistributions on one mesh and cluster, each computed once."""

    mesh: Mesh
    cluster: Cluster

    def __post_init__(self) -> None:
        self._known: dict[tuple[Layout, Layout, tuple[int, ...], int], Transfer | None] = {}

    def price(self, source: Layout, target: Layout, shape: tuple[int, ...], itemsize: int) -> Transfer | None:
        """Cost for a tensor of global ``shape``; None where no collective leads from source to target (into a partial sum)."""
        key = (source, target, shape, itemsize)
        if key not in self._known:
            self._known[key] = self._price(*key) if is_reachable(source, target) else None
        return self._known[key]

    def _price(self, source: Layout, target: Layout, shape: tuple[int, ...], itemsize: int) -> Transfer:
        found = steps(source, target)
        seconds = wire = 0.0
        moved: list[float] = []
        for step in found:
            step_wire = wire_bytes(step, shape, itemsize, self.mesh)
            copied = self._copied_bytes(step, shape, itemsize)
            seconds += self.cluster.op_overhead + copied / self.cluster.memory_bandwidth
            if step.kind is not StepKind.SLICE:
                axis, ranks = self.mesh.axes[step.axis]
                seconds += self.cluster.line(step.kind, axis).seconds(step_wire, ranks)
            wire += step_wire
            moved.append(copied)
        return Transfer(seconds, wire, found, tuple(moved))

    def _copied_bytes(self, step: Step, shape: tuple[int, ...], itemsize: int) -> float:
        def held(layout: Layout) -> float:
            return 2.0 * math.prod(local_shape(shape, layout, self.mesh)) * itemsize

        def is_inner(dim: int) -> bool:
            return math.prod(shape[:dim]) > 1

        copied = 0.0
        if isinstance(step.source, Shard) and is_inner(step.source.dim):
            copied += held(step.after)  # gathered pieces are joined along an inner dimension
        if isinstance(step.target, Shard) and is_inner(step.target.dim) and step.kind is not StepKind.SLICE:
            copied += held(step.before)  # pieces of an inner dimension are laid out one after another to be sent
        return copied
