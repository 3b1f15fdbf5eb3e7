"""What the choice of a solver is made from: the cost of a step on some lanes, and how long a chain remembers."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

import torch
from torch import Tensor

from .solvers import Stop
from .steps import Chain

SHORTEST_WINDOW = 8
PROBES, PROBE_STEPS = 8, 256


def clock() -> float:
    """CPU seconds where one thread does all the work, so that a busy machine misleads nobody; wall seconds otherwise."""
    return time.process_time() if torch.get_num_threads() == 1 and not torch.cuda.is_initialized() else time.perf_counter()


def interpolated(costs: dict[int, float], lanes: int) -> float:
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
    begin = clock()
    work()
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return clock() - begin


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
