"""Solvers of s[t+1] = f(s[t], u[t]) for all t at once.

The system is triangular, so it has one solution, that of the loop, and every iteration here reaches it: after k sweeps the first k
steps (of Jacobi; the first k blocks or windows of the others) are exact from any start (Song et al., ICML 2021, arXiv 2002.03629).
They stop as soon as a sweep changes nothing that counts (``How.tolerance``).

    loop, gauss-seidel   one step after the other: one sweep
    jacobi               all steps at once, from the states of the sweep before
    blocks               T/w blocks at once, w steps each in order; later sweeps go on only until every block has merged with what
                         it did before. The default: a contractive chain forgets its start, so one short second sweep is enough
    windows              w steps at once in order; the window moves on by what has settled (for discrete states, whose changes end)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .report import ChainReport
from .scratch import Scratch
from .steps import Chain, Lanes

TEST_EVERY = 4
"""Steps between two tests for a merge: a test costs about as much as one small step."""


@dataclass
class Solved:
    """trajectory: [count, *shape] of every carry, the state after each step; results: the last carries and what the steps give out,
    where the solver knows them, None where they are to be read off the trajectory."""

    trajectory: list[Tensor]
    report: ChainReport
    results: list[Tensor] | None = None


@dataclass
class Stop:
    """What counts as no change. relative: of the largest state, per carry (0: equality); scales: set from the first sweep."""

    relative: list[float]
    scales: list[float] = field(default_factory=list)
    residual: float = 0.0

    def measure(self, states: Sequence[Tensor]) -> None:
        """Take the largest finite state of every carry as the unit."""
        self.scales = [
            _largest(state.detach()) if relative and state.numel() else 0.0
            for state, relative in zip(states, self.relative, strict=True)
        ]

    def settled(self, new: Sequence[Tensor], old: Sequence[Tensor]) -> bool:
        """Whether two states agree; NaN agrees with nothing. The largest difference becomes ``residual``."""
        worst = 0.0
        for a, b, relative, scale in zip(new, old, self.relative, self.scales, strict=True):
            if relative == 0.0:
                if not torch.equal(a, b):
                    self.residual = math.inf
                    return False
                continue
            change = float((a - b).abs().amax()) if a.numel() else 0.0
            worst = max(worst, change)
            if not change <= relative * scale:
                self.residual = change
                return False
        self.residual = worst
        return True

    def rows_settled(self, new: Sequence[Tensor], old: Sequence[Tensor]) -> Tensor:
        """For states [n, *shape]: which of the n agree."""
        good = torch.ones(new[0].shape[0], dtype=torch.bool, device=new[0].device)
        for a, b, relative, scale in zip(new, old, self.relative, self.scales, strict=True):
            same = (a == b) if relative == 0.0 else (a - b).abs() <= relative * scale
            good &= same.reshape(same.shape[0], -1).all(1)
        return good


def _largest(state: Tensor) -> float:
    """Of the finite magnitudes; 0 where there is none."""
    found = float(state.abs().amax())
    return found if math.isfinite(found) else float(torch.nan_to_num(state.abs(), nan=0.0, posinf=0.0).amax())


def loop(chain: Chain) -> Solved:
    """One step after the other."""
    states = chain.loop(chain.init, 0, chain.count)
    return Solved(states, ChainReport("sequential", chain.count, chain.count, 1, exact_prefix=chain.count))


def jacobi(chain: Chain, stop: Stop, sweeps: int = 0, cap: int = 0) -> Solved:
    """All steps at once. sweeps: exactly so many; cap: most sweeps before the rest is done by the loop (0: as many as steps)."""
    count = chain.count
    lanes = chain.lanes(count)
    streams = lanes.pack(chain.streams)
    guess = [torch.cat([first[None], first.new_zeros((count - 1, *first.shape))]) for first in chain.init]
    most = sweeps or min(cap or count, count)
    done, settled = 0, False
    states: list[Tensor] = []
    while done < most and not settled:
        states = lanes.unpack(lanes.step(lanes.pack(guess), streams))
        done += 1
        new = shifted(chain.init, states)
        if not sweeps:
            stop.measure(new)
            settled = done >= count or stop.settled(new, guess)
        guess = new
    if sweeps or settled:
        residual = 0.0 if done >= count else stop.residual
        return Solved(states, ChainReport("jacobi", count, done, done, residual, exact_prefix=min(done, count)))
    return finish(chain, states, done, ChainReport("jacobi", count, done, done, stop.residual, exact_prefix=done))


def blocks(chain: Chain, stop: Stop, window: int, cap: int = 0, warm: int = 0) -> Solved:
    """Blocks of ``window`` steps at once. cap: most sweeps before the rest is done by the loop (0: as many as blocks).

    warm: so many steps are believed to be all that a state remembers: a block starts where the last ``warm`` steps before it lead
    from zero. If that holds, one sweep is enough, and all that is to be tested is that blocks end where the next ones started.
    """
    count, number = chain.count, -(-chain.count // window)
    lanes, scratch = chain.lanes(number), Scratch()
    columns = [by_step(lanes, stream, window, scratch) for stream in chain.streams]
    slices = [[column[t] for column in columns] for t in range(window)]
    guess = [torch.cat([first[None], first.new_zeros((number - 1, *first.shape))]) for first in chain.init]
    warm = min(warm, window) if number > 1 else 0
    if warm:
        led = lanes.sweep(lanes.pack(guess), slices[window - warm :], keep=False)
        guess = shifted(chain.init, lanes.unpack([s[-1] for s in led]))
    stored = lanes.sweep(lanes.pack(guess), slices, scratch=scratch)
    ends = [s[-1] for s in stored]
    stop.measure(ends)
    if not all(stop.scales):
        stop.measure(stored)
    steps, sweeps, contraction, residual = warm + window, 1, None, 0.0
    new = shifted(chain.init, lanes.unpack(ends))
    settled = number == 1 or stop.settled(new, guess)
    while not settled and sweeps < min(cap or number, number):
        guess, sweeps = new, sweeps + 1
        made, merged, rate = _resweep(lanes, lanes.pack(new), slices, stored, stop)
        steps += made
        residual = stop.residual
        contraction = contraction if rate is None else rate
        new = shifted(chain.init, lanes.unpack([s[-1] for s in stored]))
        settled = sweeps >= number or (merged and stop.settled(new, guess))
    trajectory = [in_order(lanes, s, count) for s in stored]
    if number > 1 and window > 1:  # else what is in order is a view
        scratch.give_back()
    exact = min(sweeps * window, count)
    residual = 0.0 if exact == count else max(residual, stop.residual)
    report = ChainReport(f"blocks:{window}", count, steps, sweeps, residual, contraction, exact)
    return Solved(trajectory, report) if settled else finish(chain, trajectory, exact, report)


def _resweep(
    lanes: Lanes, state: list[Tensor], slices: list[list[Tensor]], stored: list[Tensor], stop: Stop
) -> tuple[int, bool, float | None]:
    """Go on from new starts until every lane has merged with its stored states, which are replaced.

    Returns the steps made, whether all merged, and the factor a step by which the last differences shrank.
    """
    rate, last = None, math.inf
    for t in range(0, len(slices), TEST_EVERY):
        found = lanes.sweep(state, slices[t : t + TEST_EVERY])
        state, done = [f[-1] for f in found], t + len(found[0])
        merged = stop.settled(state, [s[done - 1] for s in stored])
        for old, new in zip(stored, found, strict=True):
            old[t:done] = new
        rate = (stop.residual / last) ** (1 / TEST_EVERY) if 0.0 < stop.residual < last < math.inf else rate
        last = stop.residual
        if merged:
            return done, True, rate
    return len(slices), False, rate


def windows(chain: Chain, stop: Stop, window: int) -> Solved:
    """A window of ``window`` steps at once, moved on by what has settled; its first step is exact in every sweep."""
    count, width = chain.count, min(window, chain.count)
    lanes = chain.lanes(width)
    trajectory = [first.new_zeros((count + width, *first.shape)) for first in chain.init]
    last = [stream[-1:].expand(width, *stream.shape[1:]) for stream in chain.streams]
    padded = [torch.cat([stream, more]) for stream, more in zip(chain.streams, last, strict=True)]
    start, sweeps, before = 0, 0, list(chain.init)
    while start < count:
        known = [states[start : start + width] for states in trajectory]
        inputs = [torch.cat([b[None], k[:-1]]) for b, k in zip(before, known, strict=True)]
        slices = [stream[start : start + width] for stream in padded]
        found = lanes.unpack(lanes.step(lanes.pack(inputs), lanes.pack(slices)))
        sweeps += 1
        stop.measure(found)
        unsettled = (~stop.rows_settled(found, known)).nonzero()
        for states, new in zip(trajectory, found, strict=True):
            states[start : start + width] = new
        ahead = width if len(unsettled) == 0 else int(unsettled[0]) + 1
        start += ahead
        before = [states[start - 1] for states in trajectory]
    report = ChainReport(f"windows:{window}", count, sweeps, sweeps, exact_prefix=count)
    return Solved([states[:count] for states in trajectory], report)


def finish(chain: Chain, trajectory: list[Tensor], exact: int, report: ChainReport) -> Solved:
    """The rest by the loop, from the last exact state."""
    before = [states[exact - 1] for states in trajectory] if exact else chain.init
    rest = chain.loop(before, exact, chain.count) if exact < chain.count else []
    whole = [torch.cat([states[:exact], more]) for states, more in zip(trajectory, rest, strict=True)] if rest else trajectory
    made = report.steps + chain.count - exact
    why = "the states had not settled within the sweeps that pay"
    return Solved(whole, ChainReport(report.solver, report.count, made, report.sweeps, 0.0, None, chain.count, why))


def shifted(init: Sequence[Tensor], after: Sequence[Tensor]) -> list[Tensor]:
    """The states before, from those after: each lane starts where the one before it ended."""
    return [torch.cat([first[None], states[:-1]]) for first, states in zip(init, after, strict=True)]


def by_step(lanes: Lanes, stream: Tensor, window: int, scratch: Scratch | None = None) -> tuple[Tensor, ...]:
    """The slices of a stream [count, ...] for all lanes, by step within the block. The last block repeats the last slice. scratch:
    where they may lie."""
    take = (scratch or Scratch()).take
    count, sizes = stream.shape[0], stream.shape[1:]
    if lanes.rows == 1:
        if lanes.n * window > count:
            filled = take((lanes.n * window, *sizes), stream)
            filled[:count], filled[count:] = stream, stream[-1]
            stream = filled
        return stream.reshape(lanes.n, window, *sizes[1:]).unbind(1)  # without a copy
    split = take((window, lanes.n, *sizes), stream)
    whole = count // window
    split[:, :whole] = stream[: whole * window].reshape(whole, window, *sizes).transpose(0, 1)
    if whole < lanes.n:
        rest = count - whole * window
        split[:rest, whole], split[rest:, whole] = stream[whole * window :], stream[-1]
    return lanes.pack_each(split).unbind(0)


def in_order(lanes: Lanes, by_step: Tensor, count: int) -> Tensor:
    """States stored by step within the block, [window, *packed], as states in the order of the chain."""
    return lanes.unpack_each(by_step).transpose(0, 1).flatten(0, 1)[:count]
