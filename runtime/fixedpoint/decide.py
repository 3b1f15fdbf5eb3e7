"""Which solver pays, from a step's measured cost and the measured length of the chain's memory.

    loop            T c(1)
    n blocks of w   (w + m) c(n) + a sweep's own cost,      w = T / n;  for m > w rounded up to whole blocks
    torch's kernel  as measured, where the whole chain is a layer that torch has one for (``native``)

c(n) is the cost of a step on n lanes, m the merge length: after how many steps two trajectories from different starts agree. Both
are measured at the first call of a chain, which runs as a loop; m by lanes started from zero at places where the true state is
known. The loop, torch's kernel and the windows that look best are then tried in turn by the next calls, and the fastest stays: what
counts is the median over the turns of the time beside that of the loop in the same turn, which a machine that is busy now and then
does not change; windows that have lost leave, and neighbours of the best one join. A choice is looked at again from time to time:
blocks run beside the others for a few calls, and a chain that stayed in order is measured anew, since training changes how long it
remembers.
A chain that settles later than planned goes on as a loop from its exact part and is measured anew. What was chosen is kept on disk
for the next process (``remembered``), which checks the length of the memory, and tries again only where that has changed.
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from .hoist import hoist
from .how import How
from .known import LOOK_AGAIN, LOOP, NATIVE, Known, forget, is_trying, key_of, knowledge
from .measure import SHORTEST_WINDOW, clock, interpolated, merge_length, step_costs
from .native import run_native
from .remembered import Remembered, recall, remember
from .report import ChainReport
from .solvers import TEST_EVERY, Solved, Stop, blocks, loop
from .steps import Chain

__all__ = ["LOOK_AGAIN", "SETTLING", "TURNS", "Known", "choose", "decided", "forget", "is_trying", "knowledge"]

SHORTEST = 24
"""Shorter chains are not worth a look."""

LANES = (2, 4, 8, 16, 32, 64, 128)
"""Numbers of blocks that are looked at: far enough apart that the likeliest three are not all wrong in the same way."""

HOPEFUL = 1.2
"""Windows that are predicted to take more than so many times the loop are not tried."""

TRIED, TURNS, MOST_TURNS, ENOUGH_SECONDS = 3, 7, 12, 0.2
"""How many windows are tried beside the loop, and in how many turns at least; more of them, up to a number, until the turns took so
long, since a short time is a poor measurement. The first does not count: it makes plans for the sizes."""

HOPELESS, HOPELESS_AFTER = 1.25, 3
"""A window that after so many turns takes so many times the best is tried no further."""

SETTLING = 1 + (TRIED + 2) * MOST_TURNS
"""Calls of a chain until its solver stays, at most."""

CLEARLY = 0.9
"""A window is taken where it needs at most so much of the time of the loop and of torch's kernel."""

CHECKED = 4
"""Turns in which a chosen window runs beside the best of the others, when it is looked at again."""

ALIKE = 8
"""Steps by which the memory may differ from what a choice was made for."""

SWEEP_SECONDS = 100e-6


def decided(chain: Chain, how: How) -> Solved:
    """Solve a chain the way that is expected to be cheapest. Torch's kernel gives results and no trajectory."""
    return _Decider(chain, how).solved()


class _Decider:
    """One solve of a chain."""

    def __init__(self, chain: Chain, how: How) -> None:
        self.chain, self.how = chain, how
        self.known = knowledge(chain, how)

    @functools.cached_property
    def stop(self) -> Stop:
        """What counts as no change."""
        return Stop([self.how.tolerance(first.dtype) for first in self.chain.init])

    @functools.cached_property
    def inner(self) -> Chain:
        """What must be done in order; the passes have split off the rest where the chain is not kept whole."""
        return hoist(self.chain) if self.how.native else self.chain

    @property
    def in_order(self) -> list[int]:
        """Contenders that need no memory to be short."""
        return [LOOP, NATIVE] if self.how.native else [LOOP]

    def solved(self) -> Solved:
        """See ``decided``."""
        known = self.known
        known.calls += 1
        if known.trials:
            return self._tried()
        is_due = known.calls >= known.wait
        if known.window > LOOP:
            if is_due:
                self._check_again()
                return self._tried()
            solved = self._run(known.window)
            if solved.report.fell_back:
                known.window, known.tried, known.wait = LOOP, -1.0, known.wait * 2
                self._look(solved.trajectory, "it settled later than measured; ")
            return solved
        if known.is_measured and not is_due:
            return self._run(known.window)
        known.wait = known.wait * 2 if known.is_measured else known.wait
        solved = self._run(LOOP)
        self._look(solved.trajectory)
        return solved

    def _run(self, contender: int) -> Solved:
        """One contender. Blocks whose start was not warm enough make the next ones warmer."""
        chain, known = self.chain, self.known
        if contender == NATIVE:
            results = run_native(self.how.native, chain.init, chain.shared, chain.streams[0])
            return Solved(
                [], ChainReport(f"torch.{self.how.native}", chain.count, chain.count, 1, exact_prefix=chain.count), results
            )
        if contender == LOOP:
            solved = loop(self.inner)
        else:
            cap = _sweeps(known, chain.count, contender) + 1
            solved = blocks(self.inner, self.stop, contender, cap=cap, warm=known.warm)
            known.warm += TEST_EVERY if solved.report.sweeps > 1 and known.warm < contender else 0
        if self.inner is not chain:
            solved.results = [*[states[-1] for states in solved.trajectory], *self.inner.emits(solved.trajectory)]
        return solved

    def _tried(self) -> Solved:
        """Run the next contender against the clock; after the last one of the last turn the fastest is kept."""
        known = self.known
        contender = known.trials.pop(0)
        self._wait()
        begin = clock()
        solved = self._run(contender)
        self._wait()
        known.turns.setdefault(contender, []).append(math.inf if solved.report.fell_back else clock() - begin)
        if known.trials:
            return solved
        known.rounds -= 1
        if known.rounds > 0 and (len(known.turns[LOOP]) < TURNS or known.spent() < ENOUGH_SECONDS):
            known.trials = still_hopeful(known, self.chain.count)
        else:
            keep_the_fastest(known)
            remember(key_of(self.chain, self.how), Remembered(known.costs, known.merge, known.window, known.reason))
        return solved

    def _wait(self) -> None:
        if self.chain.init[0].is_cuda:
            torch.cuda.synchronize()

    def _check_again(self) -> None:
        """Let the chosen window run beside the others once more."""
        known = self.known
        known.wait, known.rounds, known.turns = known.wait * 2, CHECKED, {}
        known.trials = [*self.in_order, known.window]

    def _look(self, states: list[Tensor], why: str = "") -> None:
        """Measure, and choose what to try. states: [count, *shape] of every carry, after each step."""
        known, before = self.known, recall(key_of(self.chain, self.how))
        known.is_measured, known.calls = True, 0
        known.merge, known.memory = self._memory(states)
        windows: list[int] = []
        if known.merge < math.inf:
            known.costs = known.costs or (before.costs if before else {}) or step_costs(self.inner)
            known.warm, windows = math.ceil(known.merge), choose(known, self.chain.count)
            known.memory += "" if windows else ": no window is expected to beat the loop"
        known.memory = why + known.memory
        contenders = [*self.in_order, *windows]
        if len(contenders) == 1:
            known.window, known.reason = LOOP, known.memory
        elif before is not None and known.tried < 0 and _alike(before.merge, known.merge) and self._can_run(before.window):
            known.window, known.tried, known.reason = before.window, known.merge, f"{before.reason} (by an earlier process)"
        elif not _alike(known.tried, known.merge):
            known.tried, known.window, known.turns, known.rounds = known.merge, LOOP, {}, MOST_TURNS
            known.trials = contenders

    def _can_run(self, contender: int) -> bool:
        """Whether a contender of an earlier process, which may lie between the windows tried at first, fits this chain."""
        return contender in self.in_order or (contender >= SHORTEST_WINDOW and contender < self.chain.count)

    def _memory(self, states: list[Tensor]) -> tuple[float, str]:
        """The merge length, and a word about it."""
        if self.chain.count < SHORTEST:
            return math.inf, f"{self.chain.count} steps are too few"
        self.stop.measure(states)
        if any(not bool(torch.isfinite(s).all()) for s in states if s.is_floating_point()):
            return math.inf, "its states are not finite"
        merge = merge_length(self.inner, self.stop, states)
        if merge == math.inf:
            return merge, "trajectories from different starts do not meet (long memory or chaos)"
        return merge, f"memory of {merge:.0f} steps"


def still_hopeful(known: Known, count: int) -> list[int]:
    """What the next turn tries. When the hopeless windows leave, those halfway to the neighbours of the best one join."""
    turns = len(known.turns[LOOP])
    running = [c for c, taken in known.turns.items() if len(taken) == turns]
    if turns < HOPELESS_AFTER:
        return running
    beside = {c: known.beside_loop(c) for c in running}
    best = min(beside, key=lambda c: beside[c])
    kept = [c for c in running if c <= LOOP or beside[c] <= HOPELESS * beside[best]]
    if turns > HOPELESS_AFTER or best <= LOOP or known.rounds <= CHECKED:
        return kept
    lanes = count / best
    between = {max(SHORTEST_WINDOW, -(-count // max(2, round(lanes * factor)))) for factor in (2**-0.5, 2**0.5)}
    joining = sorted(between - known.turns.keys())
    known.turns |= {window: [None] * turns for window in joining}
    return kept + joining


def keep_the_fastest(known: Known) -> None:
    """Choose from the turns."""
    beside = {c: known.beside_loop(c) for c in known.turns}
    in_order = min((c for c in beside if c <= LOOP), key=lambda c: beside[c])
    best = min(beside, key=lambda c: beside[c])
    known.window = best if best > LOOP and beside[best] <= CLEARLY * beside[in_order] else in_order
    known.calls, known.rounds = 0, 0
    times = ", ".join(
        f"{_named(c)} {min(t for t in taken if t is not None) * 1e3:.2f} ms" for c, taken in sorted(known.turns.items())
    )
    known.reason = f"{known.memory}; tried {times}"


def _named(contender: int) -> str:
    if contender == NATIVE:
        return "torch's kernel"
    return f"blocks of {contender}" if contender else "the loop"


def _alike(tried: float, merge: float) -> bool:
    """Whether what was chosen for one memory still holds for another."""
    return tried == merge or abs(tried - merge) <= ALIKE


def _sweeps(known: Known, count: int, window: int) -> int:
    """Sweeps until every block has merged."""
    return min(-(-count // window), 1 + math.ceil(known.merge / window))


def choose(known: Known, count: int) -> list[int]:
    """The windows that the formula of the module puts first; none where it puts the loop far ahead."""
    plain = count * known.costs[1]
    costs: dict[int, float] = {}
    for lanes in LANES:
        window = -(-count // lanes)
        if window >= SHORTEST_WINDOW and lanes < count:
            steps = window * (1 + math.ceil(known.merge / window)) if known.merge > window else window + known.merge
            costs[window] = steps * interpolated(known.costs, -(-count // window)) + SWEEP_SECONDS
    return [w for w in sorted(costs, key=lambda w: costs[w]) if costs[w] < HOPEFUL * plain][:TRIED]
