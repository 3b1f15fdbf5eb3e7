"""A scheduling problem as flat arrays, for searches that evaluate thousands of orders.

One number per operation: F, I (with the recomputation before it, where there is one) and every piece of W, of each stage and
micro-batch. Each waits for at most one other operation's value (its ``source``); all else is the order of its rank.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from ....runtime.errors import InputError
from ....runtime.schedule.instruction import Instr, Op, Schedule
from .closed_forms import Order
from .costs import PipelineCosts
from .forms import schedule_of

INFINITE = float("inf")


class Operation(NamedTuple):
    """What an operation is."""

    op: Op
    stage: int
    micro_batch: int
    piece: int = 0


@dataclass(frozen=True)
class Problem:
    """What is to be scheduled.

    costs: of every stage; placement: stage -> rank; limits: bytes per rank (none: no limit); sizes: of the micro-batches;
    recomputed: stages whose forward is run again before their backward. InputError where the parts do not fit, or where a limit is
    too small for a single micro-batch, naming the least that would do.
    """

    costs: PipelineCosts
    placement: tuple[int, ...]
    micro_batches: int
    limits: tuple[float, ...] = ()
    sizes: tuple[float, ...] = ()
    recomputed: frozenset[int] = frozenset()

    def __post_init__(self) -> None:
        if len(self.costs.stages) != len(self.placement):
            raise InputError(f"costs of {len(self.costs.stages)} stages for a placement of {len(self.placement)}")
        if self.sizes and len(self.sizes) != self.micro_batches:
            raise InputError(f"expected {self.micro_batches} sizes of micro-batches, found {len(self.sizes)}")
        if self.limits and len(self.limits) != self.ranks:
            raise InputError(f"expected a memory limit for each of {self.ranks} ranks, found {len(self.limits)}")

    @property
    def ranks(self) -> int:
        """How many ranks the placement names."""
        return max(self.placement) + 1

    def size(self, micro_batch: int) -> float:
        """Share of a full micro-batch."""
        return self.sizes[micro_batch] if self.sizes else 1.0


@dataclass(frozen=True)
class Arrays:
    """The problem, one entry per operation.

    rank, seconds (moving its data included), early (seconds before that which need no value: a recomputation), source (-1: none),
    lag (from the source's end to its value's arrival); rise: bytes at its start, fall: change at its end. forward[s][m],
    backward[s][m], weights[s]: numbers of the operations, W in the order
    (m, piece). tail: seconds from an operation's start to the end along the longest chain.
    """

    problem: Problem
    operations: list[Operation]
    rank: list[int]
    seconds: list[float]
    early: list[float]
    source: list[int]
    lag: list[float]
    rise: list[float]
    fall: list[float]
    forward: list[list[int]]
    backward: list[list[int]]
    weights: list[list[int]]
    tail: list[float] = field(default_factory=list)

    @property
    def limits(self) -> tuple[float, ...]:
        """Bytes per rank."""
        return self.problem.limits or (INFINITE,) * self.problem.ranks

    @property
    def readers(self) -> list[list[int]]:
        """Operations that wait for each operation's value."""
        found: list[list[int]] = [[] for _ in self.operations]
        for number, source in enumerate(self.source):
            if source >= 0:
                found[source].append(number)
        return found

    def schedule(self, order: Sequence[Sequence[int]], name: str) -> Schedule:
        """A whole schedule from an order of operations per rank."""
        problem = self.problem
        instructions: Order = [[] for _ in range(problem.ranks)]
        for rank, row in enumerate(order):
            for number in row:
                op, stage, micro_batch, piece = self.operations[number]
                if op is Op.I and stage in problem.recomputed:
                    instructions[rank].append(Instr(Op.R, stage, micro_batch))
                instructions[rank].append(Instr(op, stage, micro_batch, piece))
        return schedule_of(instructions, problem.placement, problem.micro_batches, name=name, sizes=problem.sizes)


def arrays(problem: Problem) -> Arrays:
    """Number the operations of a problem. InputError when a rank's limit cannot hold one micro-batch."""
    stages, count = len(problem.placement), problem.micro_batches
    found = Arrays(problem, [], [], [], [], [], [], [], [], [], [], [])
    for stage in range(stages):
        found.forward.append([_add(found, Operation(Op.F, stage, m)) for m in range(count)])
    for stage in range(stages):
        found.backward.append([_add(found, Operation(Op.I, stage, m)) for m in range(count)])
    for stage in range(stages):
        pieces = problem.costs.stages[stage].pieces
        found.weights.append([_add(found, Operation(Op.W, stage, m, k)) for m in range(count) for k in range(pieces)])
    for number, operation in enumerate(found.operations):
        source = _source(found, operation)
        found.source[number] = source
        if source >= 0 and found.rank[source] != found.rank[number]:
            found.lag[number] = problem.costs.link.latency
    _add_moves(found)
    _add_tails(found)
    _refuse_small_limits(problem)
    return found


def _add(found: Arrays, operation: Operation) -> int:
    problem = found.problem
    costs, size = problem.costs.stages[operation.stage], problem.size(operation.micro_batch)
    again = operation.stage in problem.recomputed
    fixed = problem.costs.fixed
    plain = costs.seconds(operation.op, operation.piece)
    seconds = plain * size + fixed if plain else 0.0
    more, bytes_ = problem.costs.shifted(operation, [problem.size(m) for m in range(problem.micro_batches)])
    seconds = max(0.0, seconds + more)
    change = costs.change(operation.op, operation.piece, recomputed=again) * size + bytes_
    rise = early = 0.0
    if operation.op is Op.I and again:
        early = costs.seconds(Op.R) * size + fixed
        rise = (costs.activation - costs.stash) * size
    found.operations.append(operation)
    found.rank.append(problem.placement[operation.stage])
    found.seconds.append(seconds)
    found.early.append(early)
    found.source.append(-1)
    found.lag.append(0.0)
    found.rise.append(rise + max(change, 0.0))
    found.fall.append(min(change, 0.0))
    return len(found.operations) - 1


def _source(found: Arrays, operation: Operation) -> int:
    op, stage, m, _ = operation
    if op is Op.F:
        return found.forward[stage - 1][m] if stage else -1
    if op is Op.I:
        return found.backward[stage + 1][m] if stage + 1 < len(found.forward) else found.forward[stage][m]
    return found.backward[stage][m]


def _add_moves(found: Arrays) -> None:
    """The processor time of sending and receiving is part of the operations that make and read a value."""
    problem = found.problem
    for number, (op, stage, m, _) in enumerate(found.operations):
        source = found.source[number]
        if op is Op.W or source < 0 or found.rank[source] == found.rank[number]:
            continue
        maker = stage - 1 if op is Op.F else stage
        moved = problem.costs.stages[maker].boundary * problem.size(m)
        found.seconds[number] += problem.costs.link.receiving(moved)
        found.seconds[source] += problem.costs.link.sending(moved)


def _add_tails(found: Arrays) -> None:
    tails = [0.0] * len(found.operations)
    readers = found.readers
    stages = range(len(found.forward))
    for m in range(found.problem.micro_batches):
        for stage in stages:
            for w in found.weights[stage][m * found.problem.costs.stages[stage].pieces :][
                : found.problem.costs.stages[stage].pieces
            ]:
                tails[w] = found.seconds[w]
            i = found.backward[stage][m]
            tails[i] = found.seconds[i] + max((tails[r] + found.lag[r] for r in readers[i]), default=0.0)
        for stage in reversed(stages):
            f = found.forward[stage][m]
            i = found.backward[stage][m]
            after = [tails[i] + found.early[i]] + [tails[r] + found.lag[r] for r in readers[f]]
            tails[f] = found.seconds[f] + max(after)
    found.tail.extend(tails)


def _refuse_small_limits(problem: Problem) -> None:
    """InputError where some limit cannot hold one micro-batch, naming the most that any rank lacks: so much will do for all."""
    least = [need_of_one(problem, rank) for rank in range(len(problem.limits))]
    short = [rank for rank, limit in enumerate(problem.limits) if limit < least[rank] * (1 - 1e-9)]
    if short:
        worst = max(short, key=lambda rank: least[rank])
        raise InputError(
            f"rank {worst} may hold {problem.limits[worst]:,.0f} bytes of activations, but one micro-batch alone needs "
            f"{math.ceil(least[worst]):,} there; allow at least that, use smaller micro-batches, or recompute the stages "
            f"{_stages_of(problem, worst)}"
        )


def _stages_of(problem: Problem, rank: int) -> list[int]:
    return [stage for stage, holder in enumerate(problem.placement) if holder == rank]


def need_of_one(problem: Problem, rank: int) -> float:
    """Most bytes that the largest micro-batch needs on a rank when nothing else is under way."""
    size = max(problem.sizes, default=1.0)
    now = peak = 0.0
    mine = _stages_of(problem, rank)
    for stage in mine:
        now += problem.costs.stages[stage].change(Op.F, 0, recomputed=stage in problem.recomputed) * size
        peak = max(peak, now)
    for stage in reversed(mine):
        costs, again = problem.costs.stages[stage], stage in problem.recomputed
        now += (costs.activation - costs.stash) * size if again else 0.0
        peak = max(peak, now)
        now += costs.change(Op.I, 0, recomputed=again) * size
        peak = max(peak, now)
        now -= sum(costs.held) * size
    return peak
