"""The same training twice, side by side: plain torch in this process, and the parallel module; losses and times of both."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

Batch = tuple[tuple[Any, ...], dict[str, Any]]
"""(args, kwargs) of one call."""

LossOf = Callable[[Any], Tensor]


@dataclass
class Lane:
    """One of the two trainings: its losses, and seconds per step by how it ran."""

    losses: list[float] = field(default_factory=list)
    seconds: dict[str, list[float]] = field(default_factory=dict)

    def median(self, how: str) -> float:
        """Median seconds of a step."""
        return statistics.median(self.seconds[how])


@dataclass
class Race:
    """The result. plain runs alternately on one thread and on as many as there are ranks."""

    plain: Lane
    ranks: Lane
    workers: int

    @property
    def worst_loss_difference(self) -> float:
        """Largest relative difference between the two losses of one step."""
        return max(abs(a - b) / max(abs(a), 1e-12) for a, b in zip(self.plain.losses, self.ranks.losses, strict=True))

    def speedup(self, how: str) -> float:
        """How many times faster a step of the ranks is than plain torch run ``how``."""
        return self.plain.median(how) / self.ranks.median(self.how_ranks)

    @property
    def how_single(self) -> str:
        """Name of plain torch's runs on one thread."""
        return "1 process, 1 thread"

    @property
    def how_threads(self) -> str:
        """Name of plain torch's runs on as many threads as ranks."""
        return f"1 process, {self.workers} threads" if self.workers > 1 else self.how_single

    @property
    def how_ranks(self) -> str:
        """Name of the ranks' runs."""
        return f"{self.workers} ranks, 1 thread each" if self.workers > 1 else "1 rank, 1 thread"


def race(
    plain: nn.Module,
    parallel: nn.Module,
    batches: Iterator[Batch],
    *,
    steps: int,
    workers: int,
    loss_of: LossOf,
    rate: float = 1e-3,
) -> Race:
    """Train both on the same batches with AdamW, in alternating blocks so that both meet the same state of the machine."""
    result = Race(Lane(), Lane(), workers)
    stepper_plain = _stepper(plain, loss_of, rate)
    stepper_ranks = _stepper(parallel, loss_of, rate)
    block = max(1, min(10, steps // 6))
    for start in range(0, steps, block):
        todo = [next(batches) for _ in range(min(block, steps - start))]
        threads, how = (1, result.how_single) if (start // block) % 2 == 0 else (workers, result.how_threads)
        with _threads(threads):
            _run(stepper_plain, todo, result.plain, how)
        _run(stepper_ranks, todo, result.ranks, result.how_ranks)
    return result


def _stepper(model: nn.Module, loss_of: LossOf, rate: float) -> Callable[[Batch], float]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate)

    def step(batch: Batch) -> float:
        args, kwargs = batch
        loss = loss_of(model(*args, **kwargs))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.item()

    return step


def _run(step: Callable[[Batch], float], batches: list[Batch], lane: Lane, how: str) -> None:
    for batch in batches:
        begin = time.perf_counter()
        lane.losses.append(step(batch))
        lane.seconds.setdefault(how, []).append(time.perf_counter() - begin)


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
