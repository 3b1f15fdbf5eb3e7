"""Whether the measured decision between a loop and blocks is right: over sizes, batches and memories of a recurrent chain."""

from __future__ import annotations

import itertools
import math

import torch
from common import Row, Sample, at_most, cpu_seconds, progress

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
    cases = cases[:: 12 if quick else 2]
    progress(f"deciding {len(cases)} chains")
    with torch.no_grad():
        found = [_measured(*case) for case in cases]
    right = [ours <= TOLERABLE * best for ours, best, _ in found]
    slowdown = max(ours / plain for ours, _, plain in found)
    share = 100 * sum(right) / len(right)
    regret = sum(ours / best for ours, best, _ in found) / len(found)
    return [
        Row(
            CLAIM,
            f"right in {sum(right)} of {len(right)} chains",
            share,
            "%",
            goal=">= 95 %",
            met=share >= 95,
            text=f"{share:.0f} %",
        ),
        Row(CLAIM, "mean regret against the best in hindsight", regret, "x", text=f"{regret:.2f}x"),
        at_most(CLAIM, "worst slow-down against the loop", Sample((slowdown,), "x"), TOLERABLE),
    ]


def _measured(width: int, steps: int, batch: int, scale: float) -> tuple[float, float, float]:
    """Seconds of our choice, of the best in hindsight, of the loop."""
    decide.forget()
    generator = torch.Generator().manual_seed(width + steps)
    weight = (torch.rand(width, width, generator=generator) * 2 - 1) * scale / math.sqrt(width)
    stream = torch.randn(steps, batch, width, generator=generator) * 0.5
    chain = Chain(TANH, [torch.zeros(batch, width)], [weight], [stream], steps)
    how = How("auto")
    stop = Stop([how.tolerance(torch.float32)])
    for _ in range(14):
        run_solver(chain, how)
    times = {"ours": _best(lambda: run_solver(chain, how)), "loop": _best(lambda: loop(chain))}
    for window in (16, 32, 64, 128):
        if window < steps:
            times[str(window)] = _best(lambda window=window: blocks(chain, stop, window, cap=max(2, steps // (4 * window))))  # type: ignore[misc]
    return times["ours"], min(times.values()), times["loop"]


def _best(work: object) -> float:
    return min(cpu_seconds(work, 4).values)  # type: ignore[arg-type]
