"""Whether the measured decision between a loop and blocks is right: over sizes, batches and memories of a recurrent chain."""

from __future__ import annotations

import functools
import itertools
import math
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
    worst = max(found, key=lambda choice: choice.ours / choice.loop)
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
        at_most(CLAIM, f"worst slow-down against the loop ({worst.case})", Sample((worst.ours / worst.loop,), "x"), TOLERABLE),
    ]


class Choice(NamedTuple):
    """Seconds of what was chosen, of the best in hindsight, of the loop. window: chosen, 0 for the loop."""

    case: str
    window: int
    ours: float
    best: float
    loop: float


def _measured(width: int, steps: int, batch: int, scale: float) -> Choice:
    """Let a fresh chain be decided on, then time the choice in turns with the loop and with windows it may have passed over."""
    decide.forget()
    generator = torch.Generator().manual_seed(width + steps)
    weight = (torch.rand(width, width, generator=generator) * 2 - 1) * scale / math.sqrt(width)
    stream = torch.randn(steps, batch, width, generator=generator) * 0.5
    chain = Chain(TANH, [torch.zeros(batch, width)], [weight], [stream], steps)
    how = How("auto")
    for _ in range(14):
        run_solver(chain, how)
    known = decide.knowledge(chain, how)
    warm = 0 if known.merge == math.inf else known.warm
    contenders: dict[str, Callable[[], object]] = {"ours": lambda: run_solver(chain, how), "loop": lambda: loop(chain)}
    for window in (16, 32, 64, 128):
        if window < steps:
            contenders[str(window)] = functools.partial(_in_blocks, chain, how, window, warm)
    seconds = {name: sample.median for name, sample in _in_turns(contenders).items()}
    case = f"T={steps}, B={batch}, H={width}, weights x {scale:g}"
    return Choice(case, known.window, seconds["ours"], min(seconds.values()), seconds["loop"])


def _in_blocks(chain: Chain, how: How, window: int, warm: int) -> object:
    cap = max(2, chain.count // (4 * window))
    return blocks(chain, Stop([how.tolerance(torch.float32)]), window, cap=cap, warm=warm)


def _in_turns(contenders: dict[str, Callable[[], object]], turns: int = 7) -> dict[str, Sample]:
    """One run of each contender a turn, so that all of them meet the machine in the same moods."""
    found: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(turns):
        for name, work in contenders.items():
            start = time.process_time()
            work()
            if turn:
                found[name].append(time.process_time() - start)
    return {name: Sample(tuple(values)) for name, values in found.items()}
