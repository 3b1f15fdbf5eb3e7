"""Claim 1: how long a training step takes on two one-thread ranks, beside plain torch and torch's own parallelisms.

Contenders train the same weights on the same batch; before anything is timed their losses over two steps are compared. The process
that calls hocket has as many threads as there are ranks, since its ranks rest while it steps the optimizer; plain torch has one.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace

import torch
from common import Row, Sample, progress, take_turns, versus
from step_model import RATE, Case
from step_peers import Peer

import hocket
from hocket.compiler.plan.tactics import DataParallel, Tactic, TensorParallel

RANKS = 2
PLAIN, DTENSOR, DDP = "1 process, 1 thread", "DTensor tensor parallel", "DistributedDataParallel"
ALONE = "2 processes, half the batch each, no exchange"
CLAIM = "step time"
PLANS: dict[str, tuple[Tactic, ...] | str] = {
    "auto": "auto",
    "tensor parallel": (TensorParallel("d"),),
    "data parallel": (DataParallel("d"),),
}
Step = Callable[[], float]


@dataclass(frozen=True)
class Effort:
    """How much to measure. plans: names of PLANS; steps: per block."""

    case: Case
    plans: tuple[str, ...]
    repeats: int
    steps: int

    @classmethod
    def of(cls, *, quick: bool) -> Effort:
        """Quick: half the layers, batch and repeats."""
        if quick:
            return cls(Case(layers=2, batch=4), ("auto",), 3, 1)
        return cls(Case(), tuple(PLANS), 9, 1)


def rows(*, quick: bool) -> list[Row]:
    """Measure everything, the plans one after another so that few contenders take turns, each beside the peers."""
    effort = Effort.of(quick=quick)
    return [row for plan in effort.plans for row in plan_rows(replace(effort, plans=(plan,)))]


def plan_rows(effort: Effort) -> list[Row]:
    """One plan beside its peers."""
    samples = measure(effort)
    found = [versus(CLAIM, f"what two cores can give: {ALONE} ({effort.case}) vs {PLAIN}", samples[ALONE], PLAIN, samples[PLAIN])]
    for name, sample in samples.items():
        if name in (PLAIN, DTENSOR, DDP, ALONE):
            continue
        auto = name.startswith("auto")
        case = f"{name} ({effort.case})"
        found.append(versus(CLAIM, f"{case} vs {PLAIN}", sample, PLAIN, samples[PLAIN], 1.6 if auto else None))
        if not name.startswith("data"):
            found.append(versus(CLAIM, f"{case} vs {DTENSOR}", sample, DTENSOR, samples[DTENSOR], 1.3 if auto else None))
        if not name.startswith("tensor"):
            found.append(versus(CLAIM, f"{case} vs {DDP}", sample, DDP, samples[DDP]))
    return found


def measure(effort: Effort) -> dict[str, Sample]:
    """Seconds per step of every contender."""
    with ExitStack() as stack:
        blocks: dict[str, Callable[[], list[float]]] = {}
        losses: dict[str, list[float]] = {}
        progress(f"step time: starting {DTENSOR} and {DDP}")
        for name, kind in ((DTENSOR, "tensor"), (DDP, "data")):
            peer = stack.enter_context(Peer(kind, effort.case, RANKS))
            losses[name] = peer.losses(2)
            blocks[name] = lambda peer=peer: peer.block(effort.steps)  # type: ignore[misc]
        alone = stack.enter_context(Peer("alone", effort.case, RANKS))
        alone.losses(2)
        blocks[ALONE] = lambda: alone.block(effort.steps)
        for name, (step, threads) in _own(effort, stack).items():
            losses[name] = _losses(step, threads)
            blocks[name] = lambda step=step, threads=threads: _block(step, threads, effort.steps)  # type: ignore[misc]
        _check(losses)
        progress(f"step time: {len(blocks)} contenders take turns, {effort.repeats} rounds of {effort.steps} steps")
        return take_turns(blocks, effort.repeats)


def _own(effort: Effort, stack: ExitStack) -> Mapping[str, tuple[Step, int]]:
    """Contenders that live in this process or are driven from it, with the threads that this process has meanwhile."""
    found: dict[str, tuple[Step, int]] = {PLAIN: (_plain(effort.case), 1)}
    for plan in effort.plans:
        progress(f"step time: compiling the {plan} plan for hocket.train_step and hocket.parallelize")
        found[f"{plan} plan, train_step"] = (_fused(effort.case, plan, stack), RANKS)
        found[f"{plan} plan, parallelize"] = (_ordinary(effort.case, plan, stack), RANKS)
    return found


def _plain(case: Case) -> Step:
    model = case.model()
    return _loop(model, torch.optim.AdamW(model.parameters(), lr=RATE), case)


def _ordinary(case: Case, plan: str, stack: ExitStack) -> Step:
    model = case.model()
    parallel = stack.enter_context(hocket.parallelize(model, f"d={RANKS}", case.data(), tactics=PLANS[plan]))
    return _loop(parallel, torch.optim.AdamW(model.parameters(), lr=RATE), case)


def _fused(case: Case, plan: str, stack: ExitStack) -> Step:
    model = case.model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE)
    step = stack.enter_context(hocket.train_step(model, f"d={RANKS}", optimizer, case.data(), tactics=PLANS[plan]))
    batch = case.data()
    return lambda: float(step(*batch))


def _loop(model: torch.nn.Module, optimizer: torch.optim.Optimizer, case: Case) -> Step:
    tokens, targets = case.data()

    def step() -> float:
        optimizer.zero_grad()
        loss = model(tokens, targets)
        loss.backward()
        optimizer.step()
        return float(loss.detach())

    return step


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _losses(step: Step, threads: int) -> list[float]:
    with _threads(threads):
        return [step() for _ in range(2)]


def _block(step: Step, threads: int, steps: int) -> list[float]:
    seconds = []
    with _threads(threads):
        for _ in range(steps):
            start = time.perf_counter()
            step()
            seconds.append(time.perf_counter() - start)
    return seconds


def _check(losses: Mapping[str, list[float]]) -> None:
    """Contenders that do not compute the same would be no contenders."""
    for name, values in losses.items():
        for step, (value, expected) in enumerate(zip(values, losses[PLAIN], strict=True)):
            if abs(value - expected) > 1e-4 * abs(expected):
                raise AssertionError(f"{name}: loss {value} in step {step}, where plain torch has {expected}")
