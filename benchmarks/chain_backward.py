"""The backward of a recurrence, as the published code measures it (Song et al., ICML 2021): softplus, H = 128, T = 100, B = 1.

    d[t] = (d[t+1] W + g[t]) s[t],      dL/dW = sum over t of d[t+1]' h[t]

The published sequential baseline adds the gradient of the weight up inside the loop, one outer product a step; the fair one takes
one product over all steps after it, and works in place, as ours does. The published method makes a fixed number of sweeps, so that
its gradient is truncated; ours goes on until it is that of the loop.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from common import Row, Sample, at_most, progress, versus
from torch import Tensor

from hocket.runtime.fixedpoint import decide
from hocket.runtime.fixedpoint.body import Body, Call
from hocket.runtime.fixedpoint.how import How
from hocket.runtime.fixedpoint.op import run_solver
from hocket.runtime.fixedpoint.solvers import Solved
from hocket.runtime.fixedpoint.steps import Chain

CLAIM = "backward of a recurrence, as published: softplus, H=128, B=1"
WIDTH = 128
PUBLISHED_SWEEPS = 20
BODY = Body(
    1,
    1,
    2,
    (
        Call("aten.addmm.default", [{"slot": 2}, {"slot": 0}, {"slot": 1}], {}, (4,), spread=False),
        Call("aten.mul.Tensor", [{"slot": 4}, {"slot": 3}], {}, (5,), spread=False),
    ),
    (5,),
    (5,),
    rows=True,
)


def rows(*, quick: bool) -> list[Row]:
    """At the published length and at a longer one."""
    torch.set_num_threads(1)
    found: list[Row] = []
    with torch.no_grad():
        for steps in (100,) if quick else (100, 1000):
            found += _measured(steps)
    return found


def _measured(steps: int) -> list[Row]:
    progress(f"backward of a recurrence, T={steps}")
    case = _Case(steps)
    for _ in range(decide.SETTLING):  # the first calls measure and try
        ours = case.ours()
    expected = case.in_loop()
    times = _in_turns({"seed": case.in_loop, "fair": case.fair, "fixed": case.fixed, "ours": case.ours})
    how = decide.knowledge(case.chain, case.how)
    chosen = f"blocks of {how.window}" if how.window else "the loop"
    difference = float((ours - expected).abs().amax() / expected.abs().amax())
    truncated = float((case.fixed() - expected).abs().amax() / expected.abs().amax())
    name, published = f"T={steps}, {chosen}", f"T={steps}, the published method ({PUBLISHED_SWEEPS} sweeps, off by {truncated:.0e})"
    return [
        versus(CLAIM, f"{name}; beside the published baseline", times["ours"], "seed", times["seed"]),
        versus(CLAIM, f"{name}; beside the fair one", times["ours"], "fair", times["fair"], 1 / 1.1),
        versus(CLAIM, f"{published}; beside the published baseline", times["fixed"], "seed", times["seed"]),
        versus(CLAIM, f"{published}; beside the fair one", times["fixed"], "fair", times["fair"]),
        at_most(CLAIM, f"{name}: gradient differs by, relative to the largest", Sample((difference,), ""), 5e-6),
    ]


class _Case:
    """One backward: the gradient of the weight, four ways."""

    def __init__(self, steps: int) -> None:
        generator = torch.Generator().manual_seed(0)
        bound = WIDTH**-0.5
        self.weight = torch.empty(WIDTH, WIDTH).uniform_(-bound, bound, generator=generator)
        inputs = torch.randn(steps, 1, WIDTH, generator=generator)
        state, states, before = torch.zeros(1, WIDTH), [], []
        for x in inputs:
            before.append(x + state @ self.weight.t())
            states.append(state)
            state = torch.nn.functional.softplus(before[-1])
        self.states = torch.cat(states).flip(0)  # the backward runs from the end
        self.slopes = torch.stack(before).sigmoid().flip(0)
        self.given = torch.randn(steps, 1, WIDTH, generator=generator) / steps
        self.how = How("auto")
        self.chain = Chain(BODY, [torch.zeros(1, WIDTH)], [self.weight], [self.given, self.slopes], steps)
        decide.forget()

    def in_loop(self) -> Tensor:
        """As published: the gradient of the weight grows in every step."""
        delta, gradient = torch.zeros(1, WIDTH), torch.zeros(WIDTH, WIDTH)
        for given, slope, state in zip(self.given.unbind(0), self.slopes.unbind(0), self.states, strict=True):
            delta = (delta @ self.weight + given) * slope
            gradient = gradient + torch.outer(delta[0], state)
        return gradient

    def fair(self) -> Tensor:
        """The same loop, in place, and one product after it."""
        deltas = torch.empty_like(self.given)
        delta = torch.zeros(1, WIDTH)
        for given, slope, place in zip(self.given.unbind(0), self.slopes.unbind(0), deltas.unbind(0), strict=True):
            delta = torch.addmm(given, delta, self.weight, out=place).mul_(slope)
        return deltas[:, 0].t() @ self.states

    def fixed(self) -> Tensor:
        """The published method."""
        return self._product(run_solver(self.chain, How("jacobi", sweeps=PUBLISHED_SWEEPS)))

    def ours(self) -> Tensor:
        """What hocket runs."""
        return self._product(run_solver(self.chain, self.how))

    def _product(self, solved: Solved) -> Tensor:
        return solved.trajectory[0][:, 0].t() @ self.states


def _in_turns(contenders: dict[str, Callable[[], object]], turns: int = 15) -> dict[str, Sample]:
    found: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(turns):
        for name, work in contenders.items():
            start = time.process_time()
            work()
            found[name].append(time.process_time() - start)
    return {name: Sample(tuple(values)) for name, values in found.items()}
