"""Exact search with the CP-SAT solver of OR-Tools, where that is installed (``pip install ortools``).

One interval per operation; ranks are unary resources, memory is a reservoir that never exceeds the limit, micro-batches of a stage
keep their order. Times are rounded to integers, so the bound is relaxed by the rounding before it is reported.
"""

from __future__ import annotations

import importlib.util
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ....runtime.schedule.instruction import Op
from .evaluate import Rows, evaluate
from .problem import INFINITE, Arrays

_TICKS = 20_000
_BYTES = 10_000


@dataclass(frozen=True)
class Solved:
    """The best order, and seconds that no order of the same micro-batch sequence can beat."""

    order: Rows
    bound: float


def available() -> bool:
    """Whether OR-Tools can be imported."""
    return importlib.util.find_spec("ortools") is not None


def solve(found: Arrays, hint: Sequence[Sequence[int]], seconds: float, seed: int = 0) -> Solved | None:
    """Search for that long from a known order. None where nothing was found in time."""
    from ortools.sat.python import cp_model

    known = evaluate(found, hint)
    tick = known.seconds / _TICKS
    model = cp_model.CpModel()
    cost = [math.floor((c + early) / tick) for c, early in zip(found.seconds, found.early, strict=True)]
    starts = [model.new_int_var(0, _TICKS, "") for _ in cost]
    spans = [model.new_fixed_size_interval_var(start, size, "") for start, size in zip(starts, cost, strict=True)]
    makespan = model.new_int_var(0, _TICKS, "")
    for number, start in enumerate(starts):
        model.add(makespan >= start + cost[number])
        model.add_hint(start, max(0, math.floor((known.start[number] - found.early[number]) / tick)))
        source = found.source[number]
        if source >= 0:
            wait = math.floor((found.lag[number] - found.early[number]) / tick)
            model.add(start >= starts[source] + cost[source] + wait)
    for row in (*found.forward, *found.backward, *found.weights):
        for first, second in itertools.pairwise(row):
            model.add(starts[second] >= starts[first] + cost[first])
    for rank in range(found.problem.ranks):
        mine = [number for number, holder in enumerate(found.rank) if holder == rank]
        model.add_no_overlap([spans[number] for number in mine])
        if found.limits[rank] < INFINITE:
            _limit_memory(model, found, starts, cost, mine)
    model.minimize(makespan)
    solver = cp_model.CpSolver()
    solver.parameters.max_time_in_seconds = max(0.1, seconds)
    solver.parameters.random_seed = seed
    solver.parameters.num_workers = 2
    status = solver.solve(model)
    if status not in (cp_model.OPTIMAL, cp_model.FEASIBLE):
        return None
    at = [solver.value(start) for start in starts]
    kinds = {Op.F: 0, Op.I: 1, Op.W: 2}
    order = [
        sorted(
            (number for number, holder in enumerate(found.rank) if holder == rank),
            key=lambda n: (at[n], cost[n] > 0, kinds[found.operations[n].op], n),
        )
        for rank in range(found.problem.ranks)
    ]
    return Solved(order, solver.best_objective_bound * tick)


def _limit_memory(model: Any, found: Arrays, starts: list[Any], cost: list[int], mine: list[int]) -> None:
    """Bytes in ten-thousandths of the limit: rises rounded down and falls too, so that what is excluded is truly impossible."""
    unit = found.limits[found.rank[mine[0]]] / _BYTES
    times, changes = [], []
    for number in mine:
        rise, fall = math.floor(found.rise[number] / unit), math.floor(found.fall[number] / unit)
        if rise:
            times.append(starts[number])
            changes.append(rise)
        if fall:
            times.append(starts[number] + cost[number])
            changes.append(fall)
    model.add_reservoir_constraint(times, changes, -(10**9), _BYTES)
