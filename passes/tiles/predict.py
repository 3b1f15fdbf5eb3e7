"""What a region takes as it stands, and as a loop.

    as it stands   t(collective) + t(region on all rows)
    as a loop      the schedule of one rank, tile by tile: products write where their tiles belong, so on shared memory only the
                   copies of what is published and collected, and a signal a tile, are added

The number of tiles is chosen by running the schedule for each candidate.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.fx as fx

from ...compiler.cost.cluster import Cluster
from ...compiler.cost.ops import LocalTensor, work
from ...compiler.layout import local_size
from ...compiler.program import tensor_inputs, tensor_leaves
from ...compiler.redistribute import StepKind
from .cuts import Passage
from .regions import AHEAD, BEHIND, Region, collective_of

SIGNAL = 2e-6
"""Seconds for a signal and the wait for it between two processes that both run."""

LOOP, CALL = 2e-4, 1.5e-5
"""Seconds to begin a loop, and to make each of its calls on a tile, beyond what the same calls cost outside."""

SPLIT = 1.06
"""A product on a part of its rows takes this much longer than its share."""

SHARED = 6e-5
"""Seconds to begin and end a collective in shared memory."""

CANDIDATES = (1, 2, 4, 8, 16)


@dataclass(frozen=True)
class Link:
    """Bytes between ranks that travel by themselves: alpha seconds a message and beta a byte, one message after the other.

    None in its place: the ranks see each other's memory, and a product writes there as fast as at home.
    """

    alpha: float
    beta: float


@dataclass(frozen=True)
class Prediction:
    """Seconds of a region as it stands and as a loop of ``tiles`` tiles a chunk."""

    apart: float
    fused: float
    tiles: int

    @property
    def gain(self) -> float:
        """Seconds saved."""
        return self.apart - self.fused


def predict(region: Region, parts: int, axis: str, cluster: Cluster, link: Link | None) -> Prediction:
    """The best loop of a region, beside the region as it stands."""
    apart = region_seconds(region, region.rows, cluster)
    published = delivered = 0.0
    for wait, kinds in ((region.ahead, AHEAD), (region.behind, BEHIND)):
        if wait is not None:
            collective = collective_of(wait)
            seconds = _collective_seconds(collective, kinds[collective.target], parts, axis, cluster)
            shared = _shared_seconds(collective, kinds[collective.target], parts, cluster)
            apart += seconds if link is not None else min(seconds, shared)
    if region.ahead is not None:
        published = float(_nbytes(tensor_inputs(collective_of(region.ahead))[0]))
    if region.behind is not None:
        delivered = float(_nbytes(tensor_inputs(collective_of(region.behind))[0])) / parts
    chunk = region.rows // parts
    found = []
    for tiles in (t for t in CANDIDATES if t <= chunk):
        compute = [SPLIT * region_seconds(region, local_size(chunk, tiles, 0), cluster)] * tiles
        found.append(Prediction(apart, _schedule(region, parts, compute, (published, delivered), (cluster, link)), tiles))
    return min(found, key=lambda p: p.fused)


def _schedule(
    region: Region, parts: int, compute: list[float], nbytes: tuple[float, float], on: tuple[Cluster, Link | None]
) -> float:
    """Seconds of one rank's loop, all ranks alike: what it waits for was sent by a neighbour at the same point of its own loop."""
    cluster, link = on
    published, delivered = nbytes
    tiles = len(compute)
    copied = published + (delivered * parts if _collects(region) else 0.0)
    clock = LOOP + parts * tiles * len(region.members) * CALL + 2 * copied / cluster.memory_bandwidth
    if link is None:
        return clock + parts * tiles * SIGNAL + parts * sum(compute)
    free = clock
    inbound: dict[tuple[int, int], float] = {}
    if region.ahead is not None:
        for step in range(1, parts):
            for tile in range(tiles):
                free += link.beta * published / tiles
                inbound[step, tile] = free + link.alpha
    arrivals = [0.0] * tiles
    for step in range(parts):
        for tile in range(tiles):
            first = max(clock, inbound.get((step, tile), 0.0))
            clock = max(first, arrivals[tile] if step else 0.0) + compute[tile]
            if region.behind is not None and step < parts - 1:
                free = max(free, clock) + link.beta * delivered / tiles
                arrivals[tile] = free + link.alpha
    return clock


def _collects(region: Region) -> bool:
    if region.behind is None:
        return False
    return BEHIND[collective_of(region.behind).target] != "reduce_scatter"


def region_seconds(region: Region, length: int, cluster: Cluster) -> float:
    """Seconds to run the members on ``length`` rows."""
    return sum(_node_seconds(node, passage, length / region.rows, cluster) for node, passage in region.members.items())


def _node_seconds(node: fx.Node, passage: Passage, share: float, cluster: Cluster) -> float:
    inputs, outputs = tensor_inputs(node), [v for v in tensor_leaves(node.meta["val"]) if isinstance(v, torch.Tensor)]
    read = [_part(n.meta["val"], share if cut is not None else 1.0) for n, cut in zip(inputs, passage.inputs, strict=True)]
    made = [_local(v) for v in outputs]
    done = work(node.target, [_local(n.meta["val"]) for n in inputs], made)
    if done.is_view:
        return 0.0
    nbytes = sum(read) + sum(_part(v, 1.0 if passage.sums else share) for v in outputs)
    return cluster.op_seconds(float(done.flops) * share, nbytes, outputs[0].dtype)


def _shared_seconds(node: fx.Node, kind: str, parts: int, cluster: Cluster) -> float:
    """A collective between ranks that see each other's memory: all is copied there once and read by whom it is for. The line of
    a cluster may be that of a slower transport, and a loop must not look good beside what nobody runs."""
    nbytes = _nbytes(tensor_inputs(node)[0])
    read = parts * nbytes if kind in ("gather", "all_reduce") else nbytes
    return SHARED + 2 * (nbytes + read) / cluster.memory_bandwidth


def _local(value: torch.Tensor) -> LocalTensor:
    return LocalTensor(tuple(value.shape), value.element_size())


def _part(value: torch.Tensor, share: float) -> float:
    return value.numel() * value.element_size() * share


def _nbytes(node: fx.Node) -> int:
    value: torch.Tensor = node.meta["val"]
    return value.numel() * value.element_size()


def _collective_seconds(node: fx.Node, kind: str, parts: int, axis: str, cluster: Cluster) -> float:
    nbytes = _nbytes(tensor_inputs(node)[0])
    share = {"gather": parts - 1.0, "all_reduce": 2 * (parts - 1) / parts}.get(kind, (parts - 1) / parts)
    step = {"gather": StepKind.ALL_GATHER, "exchange": StepKind.ALL_TO_ALL}.get(kind) or StepKind(kind)
    return cluster.line(step, axis).seconds(share * nbytes, parts)
