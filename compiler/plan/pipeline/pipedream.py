"""PipeDream's partition (SOSP 2019, section 3.1): contiguous stages, each replicated, for the best steady-state rate.

On a level of m workers joined at bandwidth B, where a worker is a whole group of the level below,

    T(i..j, m) = max( A_below(i..j), 4 (m-1) |w| / (m B g) ) / m                 one stage on m replicas that sum their gradients
    A(i..j, m) = min of T(i..j, m) and, over k and m', of
                 max( A(i..k, m-m'), 2 a_k / (B m'), T(k+1..j, m') )             a pipeline: its slowest part counts

with |w| the bytes of weights, a_k the bytes handed on after layer k, g the devices of a worker. The result is the time per
micro-batch when the pipeline is full and never flushed; for training with a flush the simulator decides instead (``joint``).

Replicas sum the gradients of one layer while they compute those of another, so the slower of the two counts: the papers' maximum
(arXiv 1806.03377, section 3.2), from which the published partitions follow. The authors' published optimizer adds the two
(``overlap=False``): it then avoids replicas, and does not find those partitions on its own profiles. Its constants are kept.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from ....runtime.errors import InputError


@dataclass(frozen=True)
class Layer:
    """seconds: forward and backward of a micro-batch; weights: bytes of parameters; activation: bytes handed to the next layer."""

    seconds: float
    weights: float
    activation: float


@dataclass(frozen=True)
class Level:
    """workers: groups of the level below (devices on the lowest); bandwidth: bytes per second between them."""

    workers: int
    bandwidth: float


@dataclass(frozen=True)
class ReplicatedStage:
    """Layers ``start .. stop-1`` on so many devices."""

    start: int
    stop: int
    replicas: int


@dataclass(frozen=True)
class Partition:
    """stages: in order; seconds: per micro-batch at the steady rate; in_flight: micro-batches that keep every stage busy (NOAM)."""

    stages: tuple[ReplicatedStage, ...]
    seconds: float

    @property
    def in_flight(self) -> int:
        """Micro-batches admitted at the first stage's replicas: devices over replicas of the first stage, rounded up."""
        return math.ceil(sum(stage.replicas for stage in self.stages) / self.stages[0].replicas)

    @property
    def configuration(self) -> str:
        """As the paper writes it: ``15-1``, or ``straight`` where no stage is replicated, ``data parallel`` for a single stage."""
        if len(self.stages) == 1:
            return "data parallel"
        if all(stage.replicas == 1 for stage in self.stages):
            return "straight"
        return "-".join(str(stage.replicas) for stage in self.stages)


_Choice = tuple[float, int, int]
"""(seconds, split after layer k or -1, workers of the last part)."""


@dataclass
class _Table:
    """Solutions of one level: best[i][j][m-1]."""

    level: Level
    devices: int
    best: list[list[list[_Choice]]]


def pipedream(
    layers: Sequence[Layer],
    levels: Sequence[Level],
    *,
    straight: bool = False,
    transfers: bool = True,
    overlap: bool = True,
) -> Partition:
    """The partition of the best steady rate; nothing is cut where that gains nothing. levels: the innermost first.

    straight: do not replicate; transfers: count the time of activations and their gradients between stages; overlap: replicas sum
    gradients while they compute. O(levels N^3 M^2).
    InputError without layers, levels, or with fewer layers than devices where nothing may be replicated.
    """
    if not layers or not levels or min(level.workers for level in levels) < 1 or min(level.bandwidth for level in levels) <= 0:
        raise InputError("a partition needs layers, and levels of at least one worker with a positive bandwidth")
    if straight and len(layers) < math.prod(level.workers for level in levels):
        raise InputError(
            f"{len(layers)} layers cannot be {math.prod(level.workers for level in levels)} stages of one replica each"
        )
    count = len(layers)
    weights = _prefix([layer.weights for layer in layers])
    prefix = _prefix([layer.seconds for layer in layers])
    inner = [[prefix[j + 1] - prefix[i] if j >= i else math.inf for j in range(count)] for i in range(count)]
    tables: list[_Table] = []
    devices = 1
    for level in levels:
        table = _solve(_Given(layers, weights, inner, straight, transfers, overlap), level, devices)
        tables.append(table)
        inner = [[table.best[i][j][level.workers - 1][0] if j >= i else math.inf for j in range(count)] for i in range(count)]
        devices *= level.workers
    return Partition(tuple(_stages(tables, len(tables) - 1, 0, count - 1, 1)), inner[0][count - 1])


@dataclass(frozen=True)
class _Given:
    layers: Sequence[Layer]
    weights: list[float]
    inner: list[list[float]]
    straight: bool
    transfers: bool
    overlap: bool


def _prefix(values: Sequence[float]) -> list[float]:
    total = [0.0]
    for value in values:
        total.append(total[-1] + value)
    return total


def _solve(given: _Given, level: Level, devices: int) -> _Table:
    count, most = len(given.layers), level.workers

    def one_stage(i: int, j: int, m: int) -> float:
        size = given.weights[j + 1] - given.weights[i]
        return _replicated(given.inner[i][j], size, m, level.bandwidth * devices, overlap=given.overlap)

    single = [[[one_stage(i, j, m) for m in range(1, most + 1)] if j >= i else [] for j in range(count)] for i in range(count)]
    best = [[[(math.inf, -1, m) for m in range(1, most + 1)] for _ in range(count)] for _ in range(count)]
    moved = [2 * layer.activation / level.bandwidth if given.transfers else 0.0 for layer in given.layers]
    for i in range(count):
        for j in range(i, count):
            for m in range(1, most + 1):
                if m == 1 or not given.straight:
                    best[i][j][m - 1] = (single[i][j][m - 1], -1, m)
                for k in range(i, j):
                    for last in range(1, 2 if given.straight else m):
                        if m - last < 1:
                            continue
                        seconds = max(best[i][k][m - last - 1][0], single[k + 1][j][last - 1], moved[k] / last)
                        if seconds < best[i][j][m - 1][0]:
                            best[i][j][m - 1] = (seconds, k, last)
    return _Table(level, devices, best)


def _stages(tables: Sequence[_Table], level: int, start: int, stop: int, copies: int) -> list[ReplicatedStage]:
    """Layers start..stop (inclusive) on all workers of a level; copies: of the group that this level is part of."""
    if level < 0:
        return [ReplicatedStage(start, stop + 1, copies)]
    found: list[ReplicatedStage] = []
    workers = tables[level].level.workers
    while True:
        _, split, last = tables[level].best[start][stop][workers - 1]
        inside = _stages(tables, level - 1, start if split < 0 else split + 1, stop, copies * last)
        found = inside + found
        if split < 0:
            return found
        stop, workers = split, workers - last


def steady_seconds(layers: Sequence[Layer], level: Level, stages: Sequence[ReplicatedStage], *, overlap: bool = True) -> float:
    """Seconds per micro-batch of given stages on one level of devices: the slowest stage or transfer, as the recurrence counts."""
    slowest = 0.0
    for stage in stages:
        mine = layers[stage.start : stage.stop]
        work, size = sum(layer.seconds for layer in mine), sum(layer.weights for layer in mine)
        slowest = max(slowest, _replicated(work, size, stage.replicas, level.bandwidth, overlap=overlap))
        if stage.start:
            slowest = max(slowest, 2 * layers[stage.start - 1].activation / (level.bandwidth * stage.replicas))
    return slowest


def _replicated(work: float, weights: float, replicas: int, bandwidth: float, *, overlap: bool) -> float:
    """Seconds per micro-batch of one stage. work: of one replica; bandwidth: of all its devices."""
    shared = 4 * (replicas - 1) * weights / (bandwidth * replicas)
    return (max(work, shared) if overlap else work + shared) / replicas
