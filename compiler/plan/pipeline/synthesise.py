"""Find a schedule for a problem: closed forms, list schedules, then local search (or CP-SAT) from the best of them.

What is returned is the best that was seen under the simulator, with the lower bound that no schedule of the same problem can beat.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, replace

from ....runtime.errors import InputError
from ....runtime.schedule.instruction import Op, Schedule
from .bounds import lower_bound
from .cpsat import available, solve
from .evaluate import Rows, evaluate, fits
from .forms import FOLDED, SINGLE, closed_form
from .improve import Effort, improve
from .listing import Habit, list_schedule
from .problem import INFINITE, Arrays, Problem, arrays

HABITS = (
    Habit(patience=0.3),
    Habit(backward_first=False, patience=0.1, ahead=0.0),
    Habit(backward_first=False, patience=0.6, ahead=0.0),
    Habit(patience=0.0, ahead=1.0),
    Habit(patience=0.1),
    Habit(backward_first=False, patience=1.0, ahead=0.0),
    Habit(backward_first=False, patience=0.1),
    Habit(),
    Habit(deep_first=False, patience=0.5, ahead=0.0),
)
"""In the order in which each adds most to those before it, over problems of many shapes (together within 0.1 % of forty others)."""

_EXACT_LIMIT = 400


@dataclass(frozen=True)
class Synthesis:
    """A schedule and how good it is. seconds: simulated; bound: no schedule of the problem is faster; how: what found it."""

    problem: Problem
    schedule: Schedule
    seconds: float
    bound: float
    how: str

    @property
    def gap(self) -> float:
        """How far above the bound, as a share of it."""
        return max(0.0, self.seconds / self.bound - 1.0) if self.bound else 0.0

    def __str__(self) -> str:
        return f"{self.how}: {self.seconds:.6g} s, at most {self.gap:.2%} above the optimum"


@dataclass
class _Best:
    found: Arrays
    order: Rows
    seconds: float = INFINITE
    how: str = ""

    def offer(self, order: Rows, how: str) -> None:
        """Keep the order where it is the fastest so far and fits."""
        if not all(fits(self.found, row, limit) for row, limit in zip(order, self.found.limits, strict=True)):
            return
        seconds = evaluate(self.found, order).seconds
        if seconds < self.seconds * (1 - 1e-12):
            self.order, self.seconds, self.how = order, seconds, how


def synthesise(problem: Problem, effort: Effort | None = None) -> Synthesis:
    """The best schedule found within the effort. InputError where a limit cannot hold one micro-batch."""
    effort = effort or Effort()
    deadline = time.monotonic() + effort.seconds
    found = arrays(problem)
    bound = lower_bound(found)
    best = construct(found, bound, deadline=time.monotonic() + 0.6 * effort.seconds)
    if best.seconds > bound * (1 + effort.gap) and available() and len(found.operations) <= _EXACT_LIMIT:
        solved = solve(found, best.order, 0.6 * (deadline - time.monotonic()), effort.seed)
        if solved is not None:
            best.offer(solved.order, "exact search")
            bound = max(bound, min(solved.bound, best.seconds))
    if best.seconds > bound * (1 + effort.gap):
        left = max(0.05, deadline - time.monotonic())
        order, _ = improve(found, best.order, bound, replace(effort, seconds=left))
        best.offer(order, f"local search from {best.how}")
    return Synthesis(problem, found.schedule(best.order, best.how), best.seconds, bound, best.how)


def construct(found: Arrays, bound: float, deadline: float = INFINITE, habits: tuple[Habit, ...] = HABITS) -> _Best:
    """The best of closed forms and list schedules; at least one list schedule is made whatever the deadline."""
    best = _Best(found, [])
    for number, habit in enumerate(habits):
        best.offer(list_schedule(found, habit), f"list schedule {number}")
        if not number:
            for name, order in _known(found):
                best.offer(order, name)
        if best.seconds <= bound * (1 + 1e-9) or time.monotonic() > deadline:
            break
    return best


def _known(found: Arrays) -> Iterator[tuple[str, Rows]]:
    """Closed forms of the same placement, as orders of the problem's operations."""
    problem = found.problem
    for name in (*SINGLE, "interleaved", *FOLDED):
        chunks = len(problem.placement) // problem.ranks
        try:
            schedule = closed_form(name, problem.ranks, problem.micro_batches, chunks)
        except InputError:
            continue
        if schedule.placement == problem.placement:
            yield name, numbered(found, schedule)


def numbered(found: Arrays, schedule: Schedule) -> Rows:
    """A schedule's order in the numbers of a problem with the same placement: B becomes I and W, W all its pieces."""
    rows: Rows = []
    for rank in range(found.problem.ranks):
        row: list[int] = []
        for instr in schedule.compute(rank):
            m, stage = instr.micro_batch, instr.stage
            pieces = found.problem.costs.stages[stage].pieces
            every = found.weights[stage][m * pieces : (m + 1) * pieces]
            if instr.op is Op.F:
                row.append(found.forward[stage][m])
            elif instr.op in (Op.I, Op.B):
                row.append(found.backward[stage][m])
            if instr.op is Op.B or (instr.op is Op.W and schedule.pieces[stage] == 1):
                row += every
            elif instr.op is Op.W:
                row.append(every[instr.piece])
        rows.append(row)
    return rows
