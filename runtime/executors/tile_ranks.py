"""Tile loops of all ranks of an axis in one process, in any order that the signals allow.

``order`` chooses who goes on: None takes the ranks in turn; a seed draws an adversary, who lets one rank run as far as it can,
stops another between any two steps, and so finds what only happens when somebody is very late. Values do not depend on it: that is
what the tests show, and why the ``sim`` engine may use any.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch

from ..errors import RankHung
from ..tile_schedule import Step
from .tile_ready import ReadyLoop
from .tiles import LoopRun


@dataclass
class SharedBytes:
    """The buffers of all ranks of an axis; grown between loops, when nobody is in one."""

    parts: int
    buffers: list[torch.Tensor] = field(default_factory=list)

    def at(self, peer: int) -> torch.Tensor:
        """The bytes of a rank."""
        return self.buffers[peer]

    def grow(self, nbytes: int) -> None:
        """Make room; what was there is gone."""
        if not self.buffers or self.buffers[0].numel() < nbytes:
            self.buffers = [torch.zeros(nbytes, dtype=torch.uint8) for _ in range(self.parts)]


@dataclass
class TogetherLoops:
    """The state of one axis group between its loops: buffers, signals and the number of loops run.

    scripts: per rank the steps to run in place of those of ``tile_schedule``, for tests of broken schedules.
    """

    parts: int
    order: int | None = None
    epoch: int = 0
    memory: SharedBytes = field(init=False)
    words: dict[tuple[int, int, int], int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.memory = SharedBytes(self.parts)
        self._random = None if self.order is None else random.Random(self.order)

    def run(
        self, ready: ReadyLoop, operands: Sequence[Sequence[torch.Tensor]], scripts: Sequence[Sequence[Step]] | None = None
    ) -> list[list[torch.Tensor]]:
        """Run a loop on all ranks. operands: per rank, what its instruction reads. Returns the results per rank.

        Raises RankHung when all ranks wait.
        """
        runs = [
            LoopRun(ready, rank, self.epoch, given, self.memory, None if scripts is None else scripts[rank])
            for rank, given in enumerate(operands)
        ]
        self.memory.grow(max(run.sizes.arena for run in runs))
        self.epoch += 1
        works: list[Iterator[Step]] = [run.work() for run in runs]
        held: list[Step | None] = [next(work, None) for work in works]
        while any(step is not None for step in held):
            able = [rank for rank, step in enumerate(held) if step is not None and self._is_open(rank, step)]
            if not able:
                rank, stuck = next((r, s) for r, s in enumerate(held) if s is not None)
                raise RankHung(f"rank {rank} waits for slot {stuck.slot} of rank {stuck.peer}, and all others wait too", rank=rank)
            rank = able[0] if self._random is None else self._random.choice(able)
            step = held[rank]
            assert step is not None
            if step.kind == "signal":
                self.words[rank, step.peer, step.slot] = step.value
            held[rank] = next(works[rank], None)
        return [run.results() for run in runs]

    def _is_open(self, rank: int, step: Step) -> bool:
        return step.kind != "wait" or self.words.get((step.peer, rank, step.slot), 0) >= step.value
