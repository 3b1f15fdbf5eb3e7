"""Which solver pays, from a step's measured cost and the measured length of the chain's memory.

    loop            T c(1)
    n blocks of w   (w + m) c(n) + a sweep's own cost,      w = T / n;  for m > w rounded up to whole blocks

c(n) is the cost of a step on n lanes, m the merge length: after how many steps two trajectories from different starts agree. Both
are measured at the first call of a chain, which runs as a loop; m by lanes started from zero at places where the true state is
known. The loop and the windows that look best are then tried in turn by the next calls, and the fastest stays: what counts is the
median over the turns of the time beside that of the loop in the same turn, which a machine that is busy now and then does not
change. A chain that does not forget (long memory, chaos) has no m and stays a loop; it is looked at again from time to time, since
training changes it. A chain that settles later than planned goes on as a loop from its exact part and is measured anew.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .how import How
from .solvers import TEST_EVERY, Solved, Stop, blocks, loop
from .steps import Chain

SHORTEST = 24
"""Shorter chains are not worth a look."""

LANES = (2, 4, 8, 16, 32, 64, 128)
"""Numbers of blocks that are looked at: far enough apart that the likeliest three are not all wrong in the same way."""

SHORTEST_WINDOW = 8
PROBES, PROBE_STEPS = 8, 256
HOPEFUL = 1.2
"""Windows that are predicted to take more than so many times the loop are not tried."""

TRIED, TURNS = 3, 5
"""How many windows are tried beside the loop, and in how many turns. The first does not count: it makes plans for the sizes."""

SETTLING = 1 + (TRIED + 1) * TURNS
"""Calls of a chain until its solver stays."""

CLEARLY = 0.95
"""A window is taken where it needs at most so much of the loop's time."""

SWEEP_SECONDS = 100e-6
LOOK_AGAIN = 64
"""Calls after which a chain that stayed a loop is measured again (doubled each time, so that looking costs nothing in the end)."""


@dataclass
class Known:
    """What is known of one chain at its shapes.

    merge: steps, inf where trajectories do not meet; window: 0 for the loop; warm: steps ahead of every block; trials: windows
    still to be tried; turns: the seconds that each took, turn by turn.
    """

    costs: dict[int, float] = field(default_factory=dict)
    merge: float = math.inf
    window: int = 0
    warm: int = 0
    reason: str = ""
    wait: int = LOOK_AGAIN
    calls: int = 0
    is_measured: bool = False
    trials: list[int] = field(default_factory=list)
    turns: dict[int, list[float]] = field(default_factory=dict)

    def beside_loop(self, window: int) -> float:
        """Time of a window over that of the loop: the median of the turns."""
        pairs = list(zip(self.turns[window], self.turns[0], strict=True))
        return statistics.median(seconds / plain for seconds, plain in pairs[1:])


_KNOWN: dict[tuple[Any, ...], Known] = {}
_MOST_KNOWN = 256


def knowledge(chain: Chain, how: How) -> Known:
    """What this process knows of a chain (kept by body, sizes and exactness)."""
    shapes = tuple((tuple(t.shape), t.dtype, str(t.device)) for t in (*chain.init, *chain.shared, *chain.streams))
    key = (chain.body.text, chain.count, shapes, how.exact)
    if key not in _KNOWN:
        while len(_KNOWN) >= _MOST_KNOWN:
            _KNOWN.pop(next(iter(_KNOWN)))
        _KNOWN[key] = Known()
    return _KNOWN[key]


def forget() -> None:
    """Measure every chain anew."""
    _KNOWN.clear()


def decided(chain: Chain, how: How, stop: Stop) -> Solved:
    """Solve a chain the way that is expected to be cheapest."""
    known = knowledge(chain, how)
    known.calls += 1
    if known.trials:
        return _tried(chain, stop, known)
    if known.window:
        solved = _blocks(chain, stop, known, known.window)
        if solved.report.fell_back:
            known.is_measured, known.window, known.wait, known.calls = False, 0, known.wait * 2, 0
            known.reason = "it settled later than measured"
            _look(chain, stop, known, solved.trajectory)
        return solved
    solved = loop(chain)
    if not known.is_measured or known.calls >= known.wait:
        known.wait = known.wait * 2 if known.is_measured else known.wait
        known.calls, known.is_measured = 0, True
        _look(chain, stop, known, solved.trajectory)
    return solved


def _blocks(chain: Chain, stop: Stop, known: Known, window: int) -> Solved:
    """In blocks; a start that was not warm enough makes the next ones warmer."""
    solved = blocks(chain, stop, window, cap=_sweeps(known, chain.count, window) + 1, warm=known.warm)
    if solved.report.sweeps > 1 and known.warm < window:
        known.warm += TEST_EVERY
    return solved


def _tried(chain: Chain, stop: Stop, known: Known) -> Solved:
    """Solve a chain in the next way to be tried, against the clock; after the last one the fastest is kept."""
    window = known.trials.pop(0)
    begin = _clock()
    solved = _blocks(chain, stop, known, window) if window else loop(chain)
    if chain.init[0].is_cuda:
        torch.cuda.synchronize()
    seconds = math.inf if solved.report.fell_back else _clock() - begin
    known.turns.setdefault(window, []).append(seconds)
    if not known.trials:
        beside = {w: known.beside_loop(w) for w in known.turns}
        best = min(beside, key=lambda w: beside[w])
        known.window = best if beside[best] <= CLEARLY else 0
        tried = (f"{f'blocks of {w}' if w else 'the loop'} {min(t) * 1e3:.2f} ms" for w, t in sorted(known.turns.items()))
        known.reason = f"memory of {known.merge:.0f} steps; tried " + ", ".join(tried)
    return solved


def _clock() -> float:
    """CPU seconds where one thread does all the work, so that a busy machine misleads nobody; wall seconds otherwise."""
    return time.process_time() if torch.get_num_threads() == 1 and not torch.cuda.is_initialized() else time.perf_counter()


def _sweeps(known: Known, count: int, window: int) -> int:
    """Sweeps until every block has merged."""
    return min(-(-count // window), 1 + math.ceil(known.merge / window))


def _look(chain: Chain, stop: Stop, known: Known, states: list[Tensor]) -> None:
    """Measure, and choose."""
    known.is_measured = True
    if chain.count < SHORTEST:
        known.reason = f"{chain.count} steps are too few"
        return
    stop.measure(states)
    if any(not bool(torch.isfinite(s).all()) for s in states if s.is_floating_point()):
        known.reason = "its states are not finite"
        return
    known.merge = merge_length(chain, stop, states)
    if known.merge == math.inf:
        known.window, known.reason = 0, "trajectories from different starts do not meet (long memory or chaos)"
        return
    known.costs = known.costs or step_costs(chain)
    known.warm = math.ceil(known.merge)
    known.turns.clear()
    known.trials = choose(known, chain.count) * TURNS


def choose(known: Known, count: int) -> list[int]:
    """What to try: the loop and the windows that the formula of the module puts first; nothing where it puts the loop far ahead."""
    plain = count * known.costs[1]
    costs: dict[int, float] = {}
    for lanes in LANES:
        window = -(-count // lanes)
        if window >= SHORTEST_WINDOW and lanes < count:
            steps = window * (1 + math.ceil(known.merge / window)) if known.merge > window else window + known.merge
            costs[window] = steps * _interpolated(known.costs, -(-count // window)) + SWEEP_SECONDS
    best = [w for w in sorted(costs, key=lambda w: costs[w]) if costs[w] < HOPEFUL * plain][:TRIED]
    known.window = 0
    known.reason = f"memory of {known.merge:.0f} steps: no window is expected to beat the loop" if not best else ""
    return [0, *best] if best else []


def _interpolated(costs: dict[int, float], lanes: int) -> float:
    sizes = sorted(costs)
    if lanes >= sizes[-1]:
        return costs[sizes[-1]] * lanes / sizes[-1]
    low = max(size for size in sizes if size <= lanes)
    high = min(size for size in sizes if size >= lanes)
    if low == high:
        return costs[low]
    return costs[low] + (costs[high] - costs[low]) * (lanes - low) / (high - low)


def step_costs(chain: Chain) -> dict[int, float]:
    """Seconds of one step on 1, 4, 16, ... lanes, up to what the smallest window needs."""
    most = -(-chain.count // SHORTEST_WINDOW)
    return {n: _seconds(chain, n) for n in ((1, 4, 16, 64, 128) if chain.body.rows else (1, 8, 32)) if n <= most}


def _seconds(chain: Chain, n: int, repeats: int = 4) -> float:
    steps = min(8, chain.count)
    if n == 1:
        return min(_timed(lambda: chain.loop(chain.init, 0, steps)) for _ in range(repeats)) / steps
    lanes = chain.lanes(n)
    state = lanes.pack([torch.stack([first] * n) for first in chain.init])
    slices = [lanes.pack([torch.stack([s[0]] * n) for s in chain.streams])] * steps
    return min(_timed(lambda: lanes.sweep(state, slices)) for _ in range(repeats)) / steps


def _timed(work: Callable[[], object]) -> float:
    begin = _clock()
    work()
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return _clock() - begin


def merge_length(chain: Chain, stop: Stop, states: list[Tensor]) -> float:
    """Steps until lanes started from zero meet the true states; inf where they do not come closer.

    states: [count, *shape] of every carry, after each step. Beyond the steps that are tried the decay is extrapolated.
    """
    length = min(PROBE_STEPS, chain.count // 2)
    starts = [1 + i * (chain.count - length - 1) // PROBES for i in range(PROBES)]
    lanes = chain.lanes(PROBES)
    state = lanes.pack([first.new_zeros((PROBES, *first.shape)) for first in chain.init])
    index = torch.tensor(starts)
    changes = []
    for t in range(length):
        where = (index + t).to(states[0].device)
        state = lanes.step(state, lanes.pack([stream[where] for stream in chain.streams]))
        if t % 4 == 3:
            if stop.settled(lanes.unpack(state), [s[where] for s in states]):
                return t + 1
            changes.append(stop.residual)
    return _extrapolated(changes, [r * s for r, s in zip(stop.relative, stop.scales, strict=True)])


def _extrapolated(changes: list[float], tolerances: list[float]) -> float:
    half, last = changes[len(changes) // 2] if changes else math.inf, changes[-1] if changes else math.inf
    goal = min((t for t in tolerances if t > 0), default=0.0)
    if not (goal > 0.0 and 0.0 < last < half < math.inf):
        return math.inf
    steps = 4 * (len(changes) - 1 - len(changes) // 2)
    rate = math.log(last / half) / steps
    return 4 * len(changes) + math.log(goal / last) / rate if rate < -1e-3 else math.inf
