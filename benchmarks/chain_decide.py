"""Whether the measured decision between a loop and blocks is right: over sizes, batches and memories of a recurrent chain."""

from __future__ import annotations

import functools
import itertools
import math
import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
from common import Row, Sample, at_most, progress

from hocket.runtime.fixedpoint import decide
from hocket.runtime.fixedpoint.body import Body, Call
from hocket.runtime.fixedpoint.how import How
from hocket.runtime.fixedpoint.op import run_solver
from hocket.runtime.fixedpoint.solvers import Stop, blocks, loop
from hocket.runtime.fixedpoint.steps import Chain

CLAIM = "choosing between a loop and blocks"
TANH = Body(
    1,
    1,
    1,
    (
        Call("aten.addmm.default", [{"slot": 2}, {"slot": 0}, {"slot": 1}], {}, (3,), spread=False),
        Call("aten.tanh.default", [{"slot": 3}], {}, (4,), spread=False),
    ),
    (4,),
    (4,),
    rows=True,
)
LEAST_TURNS, MOST_TURNS, ENOUGH_SECONDS = 6, 31, 0.8
TOLERABLE = 1.1
"""A choice is right if it takes at most so many times the best of the loop and all windows."""


def rows(*, quick: bool) -> list[Row]:
    """Share of right choices, and the worst slow-down against the loop."""
    torch.set_num_threads(1)
    cases = list(itertools.product((64, 128, 256), (100, 300, 1000), (1, 4, 16), (0.6, 1.0, 1.5, 3.0)))
    cases = cases[::12] if quick else cases[:: len(cases) // 100][:100]
    progress(f"deciding {len(cases)} chains")
    with torch.no_grad():
        found = [_measured(*case) for case in cases]
    right = [choice.ours <= TOLERABLE * choice.best for choice in found]
    parallel = sum(choice.window > 0 for choice in found)
    share = 100 * sum(right) / len(right)
    regret = sum(choice.ours / choice.best for choice in found) / len(found)
    worst = max(found, key=lambda choice: choice.ours)
    return [
        Row(
            CLAIM,
            f"right in {sum(right)} of {len(right)} chains ({parallel} solved in blocks)",
            share,
            "%",
            goal=">= 95 %",
            met=share >= 95,
            text=f"{share:.0f} %",
        ),
        Row(CLAIM, "mean regret against the best in hindsight", regret, "x", text=f"{regret:.2f}x"),
        at_most(CLAIM, f"worst slow-down against the loop ({worst.case})", Sample((worst.ours,), "x"), TOLERABLE),
    ]


class Choice(NamedTuple):
    """window: chosen, 0 for the loop; ours, best: times over that of the loop."""

    case: str
    window: int
    ours: float
    best: float


def _measured(width: int, steps: int, batch: int, scale: float) -> Choice:
    """Let a fresh chain be decided on, then time the chosen way in turns with the loop and with windows that it passed over."""
    decide.forget()
    generator = torch.Generator().manual_seed(width + steps)
    weight = (torch.rand(width, width, generator=generator) * 2 - 1) * scale / math.sqrt(width)
    stream = torch.randn(steps, batch, width, generator=generator) * 0.5
    chain = Chain(TANH, [torch.zeros(batch, width)], [weight], [stream], steps)
    how = How("auto")
    for _ in range(decide.SETTLING):
        run_solver(chain, how)
        if not decide.is_trying():
            break
    known = decide.knowledge(chain, how)
    warm, chosen = 0 if known.merge == math.inf else known.warm, known.window  # which may change: choices are looked at again
    contenders: dict[int, Callable[[], object]] = {0: lambda: loop(chain)}
    for window in {16, 32, 64, 128, chosen} - {0}:
        if window < steps:
            contenders[window] = functools.partial(_in_blocks, chain, how, window, warm)
    contenders[chosen] = lambda: run_solver(chain, how)  # what deciding costs is part of it
    beside = _in_turns(contenders)
    case = f"T={steps}, B={batch}, H={width}, weights x {scale:g}"
    return Choice(case, chosen, beside[chosen], min(beside.values()))


def _in_blocks(chain: Chain, how: How, window: int, warm: int) -> object:
    cap = max(2, chain.count // (4 * window))
    return blocks(chain, Stop([how.tolerance(torch.float32)]), window, cap=cap, warm=warm)


def _in_turns(contenders: dict[int, Callable[[], object]]) -> dict[int, float]:
    """Time of each over that of the loop: medians over turns in which all run once, so that all meet the machine in one mood."""
    turns: list[dict[int, float]] = []
    while len(turns) < LEAST_TURNS or (len(turns) < MOST_TURNS and sum(sum(t.values()) for t in turns) < ENOUGH_SECONDS):
        turns.append({})
        for name, work in contenders.items():
            start = time.process_time()
            work()
            turns[-1][name] = time.process_time() - start
    return {name: statistics.median(turn[name] / turn[0] for turn in turns[1:]) for name in contenders}
