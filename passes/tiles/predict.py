"""What a region takes as it stands, and as a loop.

    as it stands   t(collective) + t(region on all rows)
    as a loop      the steps of one rank, one after the other: products write where their tiles belong, so on shared memory only the
                   copies of what is published and collected, and a signal a tile, are added; on a link tiles travel meanwhile

All ranks are alike, so what a rank waits for was sent by its neighbour at the same point of that neighbour's own steps. The number
of tiles, whether they grow, and whether a rank computes its own chunk before it waits are chosen by running the steps for each.

With n equal tiles a chunk a link that is slower than the products hides all but the first tile, 1/n of what a rank computes for
others; tiles that grow by 2 leave 1/(2^n - 1) of it. A link that is quicker hides everything but what splitting costs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
import torch.fx as fx

from ...compiler.cost.cluster import Cluster
from ...compiler.cost.ops import LocalTensor, work
from ...compiler.program import tensor_inputs, tensor_leaves
from ...compiler.redistribute import StepKind
from ...compiler.tiles import MOST_SLOTS, SUMMED, Step, TileLoop, steps
from .cuts import HEAVY, Passage
from .regions import AHEAD, BEHIND, Region, collective_of

IN_MEMORY = ((1, 1), (2, 1), (4, 1))
"""(tiles, growth) to try where ranks see each other's memory: there is little to hide, and every tile costs."""

ON_LINK = (*IN_MEMORY, (3, 2), (4, 2), (5, 2), (8, 1), (16, 1))
"""The same where tiles travel."""


@dataclass(frozen=True)
class Prediction:
    """Seconds of a region as it stands, and as the quickest form of its loop. hidden: seconds of its collectives that independent
    work hides anyway; they are not in ``apart``."""

    apart: float
    fused: float
    loop: TileLoop
    hidden: float = 0.0

    @property
    def gain(self) -> float:
        """Seconds saved."""
        return self.apart - self.fused


def predict(
    region: Region, loop: TileLoop, cluster: Cluster, tiles: int = 0, exposed: Mapping[str, float] | None = None
) -> Prediction:
    """The best form of a region's loop, beside the region as it stands. tiles: per chunk, 0 to choose; exposed: by the name of a
    collective what is left of it where independent work travels beside it, for those of which that is known."""
    apart, hidden = region_seconds(region, region.rows, cluster), 0.0
    for wait, kinds in ((region.ahead, AHEAD), (region.behind, BEHIND)):
        if wait is not None:
            collective = collective_of(wait)
            whole = collective_seconds(collective, kinds[collective.target], loop.parts, loop.axis, cluster)
            left = min(whole, (exposed or {}).get(collective.name, whole))
            apart, hidden = apart + left, hidden + whole - left
    found = [(loop_seconds(region, form, cluster), form) for form in forms(loop, cluster, tiles)]
    seconds, best = min(found, key=lambda pair: pair[0])
    return Prediction(apart, seconds, best, hidden)


def forms(loop: TileLoop, cluster: Cluster, tiles: int = 0) -> Iterator[TileLoop]:
    """Ways to run a loop: its tiles, and whether ranks compute their own chunk first."""
    shapes: tuple[tuple[int, int], ...] = ON_LINK if cluster.link is not None else IN_MEMORY
    if tiles:
        shapes = ((min(tiles, loop.chunk), 1),)
    sums = loop.delivers is not None and loop.results[loop.delivers].kind in SUMMED
    for number, growth in shapes:
        if number > loop.chunk or number * loop.parts > MOST_SLOTS:
            continue
        for eager in (True, False) if sums else (False,):
            yield dataclasses.replace(loop, tiles=number, growth=growth, eager=eager)


def loop_seconds(region: Region, loop: TileLoop, cluster: Cluster) -> float:
    """Seconds of one rank's steps."""
    costs, link = cluster.tiles, cluster.link
    published, delivered = (n / loop.chunk for n in _chunk_bytes(region, loop))
    lengths = [loop.tile(0, tile)[1] for tile in range(loop.tiles)]
    compute = {n: region_seconds(region, n, cluster) + costs.turn for n in set(lengths)}
    clock, free = costs.begin, 0.0
    there: dict[tuple[int, int, int], float] = {}
    for step in steps(loop, 0, 0):
        rows = lengths[step.tile]
        carried = rows * (published if step.chunk < 0 else delivered)
        match step.kind:
            case "signal":
                if link is not None:
                    free = max(free, clock) + link.beta * carried
                there[step.peer, _turned(loop, step, 0), step.value] = clock if link is None else free + link.alpha
            case "wait":
                sender = (-step.peer) % loop.parts  # at that peer the same signal goes to this rank
                clock = max(clock, there[sender, _turned(loop, step, step.peer), step.value])
            case "compute":
                clock += compute[rows]
                if step.how == "finish":  # the product adds to a copy of what has arrived
                    clock += 2 * carried / cluster.memory_bandwidth
            case _:
                clock += 2 * carried / cluster.memory_bandwidth
    return clock


def _turned(loop: TileLoop, step: Step, by: int) -> int:
    """A slot as the rank ``by`` further on would call it, if it were rank 0."""
    if step.chunk < 0:
        return step.slot
    chunk, tile = divmod(step.slot, loop.tiles)
    return (chunk - by) % loop.parts * loop.tiles + tile


def _chunk_bytes(region: Region, loop: TileLoop) -> tuple[float, float]:
    """What a rank publishes for each of the others, and what it delivers to each."""
    published = delivered = 0.0
    if region.ahead is not None:
        collective = collective_of(region.ahead)
        pieces = 1 if AHEAD[collective.target] == "gather" else loop.parts
        published = nbytes_of(tensor_inputs(collective)[0]) / pieces
    if region.behind is not None:
        delivered = nbytes_of(tensor_inputs(collective_of(region.behind))[0]) / loop.parts
    return published, delivered


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
    seconds = cluster.op_seconds(float(done.flops) * share, nbytes, outputs[0].dtype)
    if node.target in HEAVY:
        whole = (n for n, cut in zip(inputs, passage.inputs, strict=True) if cut is None)
        seconds += cluster.tiles.repack * sum(nbytes_of(n) for n in whole)
    return seconds


def collective_seconds(node: fx.Node, kind: str, parts: int, axis: str, cluster: Cluster) -> float:
    """A collective by itself. Where nothing was measured the line of a cluster may be that of a slower transport than the ranks of
    one machine use, and a loop must not look good beside what nobody runs."""
    return message_seconds(kind, nbytes_of(tensor_inputs(node)[0]), parts, axis, cluster)


def message_seconds(kind: str, nbytes: float, parts: int, axis: str, cluster: Cluster) -> float:
    """The same for an operand of ``nbytes`` bytes; kind: as in ``AHEAD`` and ``BEHIND``."""
    share = {"gather": parts - 1.0, "all_reduce": 2 * (parts - 1) / parts}.get(kind, (parts - 1) / parts)
    step = {"gather": StepKind.ALL_GATHER, "exchange": StepKind.ALL_TO_ALL}.get(kind) or StepKind(kind)
    line = cluster.line(step, axis).seconds(share * nbytes, parts)
    if cluster.link is not None or cluster.tiles.measured:
        return line
    read = parts * nbytes if kind in ("gather", "all_reduce") else nbytes
    return min(line, cluster.tiles.collective + 2 * (nbytes + read) / cluster.memory_bandwidth)


def _local(value: torch.Tensor) -> LocalTensor:
    return LocalTensor(tuple(value.shape), value.element_size())


def _part(value: torch.Tensor, share: float) -> float:
    return value.numel() * value.element_size() * share


def nbytes_of(node: fx.Node) -> int:
    """Of a node's value."""
    value: torch.Tensor = node.meta["val"]
    return value.numel() * value.element_size()
