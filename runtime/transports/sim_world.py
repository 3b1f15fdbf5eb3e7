"""Threads that stand for ranks, run one at a time in an order drawn from a seed, and what is on its way between them."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch

from ..mesh import Mesh
from .transport import TransportTimeout

T = TypeVar("T")
_LIMIT = 600.0
"""Seconds for one rank's whole work."""


@dataclass
class Parcel:
    """Something on its way between two ranks. ordered: nothing sent after it may overtake it, and it overtakes nothing."""

    deliver: Callable[[], None]
    ordered: bool
    what: str


@dataclass
class Rank(Generic[T]):
    """A rank: what it waits for, and how it ended."""

    ready: Callable[[], bool] = lambda: True
    what: str = "its first turn"
    result: T | None = None
    error: BaseException | None = None
    ended: bool = False
    stuck: bool = False


class SimWorld:
    """See the module and ``sim``.

    events: what happened, in order; words: signals that have arrived, by (receiver, axis, sender's index, slot); buffers: symmetric
    ones, by (axis, members, number); messages: those that have arrived, by (receiver, axis, sender, tag).
    """

    def __init__(self, mesh: Mesh, seed: int = 0) -> None:
        self.mesh = mesh
        self.random = random.Random(seed)
        self._lateness = self.random.random()  # some worlds deliver at once, some as late as they can
        self.events: list[str] = []
        self.words: dict[tuple[int, str, int, int], int] = {}
        self.buffers: dict[tuple[str, tuple[int, ...], int], tuple[str, tuple[torch.Tensor, ...]]] = {}
        self.messages: dict[tuple[int, str, int, int], list[torch.Tensor]] = {}
        self._wire: dict[tuple[int, int], list[Parcel]] = {}
        self._ranks: list[Rank[object]] = []
        self._turn = -1
        self._changed = threading.Condition()

    def run(self, work: Callable[[int], T]) -> list[T]:
        """Run ``work(rank)`` for every rank to its end; the results. Raises what a rank raised, rather the cause than a shadow."""
        self._ranks = [Rank() for _ in range(self.mesh.size)]
        threads = [threading.Thread(target=self._main, args=(rank, work), daemon=True) for rank in range(self.mesh.size)]
        for thread in threads:
            thread.start()
        with self._changed:
            self._next()
        for thread in threads:
            thread.join(_LIMIT)
        errors = [rank.error for rank in self._ranks if rank.error is not None]
        errors.sort(key=lambda error: isinstance(error, TransportTimeout))
        if errors:
            raise errors[0]
        return [rank.result for rank in self._ranks]  # type: ignore[misc]  # every rank has ended without an error

    def send(self, sender: int, receiver: int, parcel: Parcel) -> None:
        """Put something on its way."""
        self._wire.setdefault((sender, receiver), []).append(parcel)
        self.pause(sender, lambda: True, "its turn")

    def pause(self, rank: int, ready: Callable[[], bool], what: str) -> None:
        """Give the turn away until ``ready`` and drawn. TransportTimeout when nobody can go on any more."""
        me = self._ranks[rank]
        with self._changed:
            me.ready, me.what = ready, what
            self._next()
            self._changed.wait_for(lambda: self._turn == rank or me.stuck)
            if me.stuck:
                raise TransportTimeout(f"rank {rank} waits for {what}, and no rank can go on")

    def _main(self, rank: int, work: Callable[[int], T]) -> None:
        me = self._ranks[rank]
        with self._changed:
            self._changed.wait_for(lambda: self._turn == rank)
        try:
            with torch.no_grad():
                me.result = work(rank)
        except BaseException as error:
            me.error = error
        with self._changed:
            me.ended = True
            if not me.stuck:
                self._next()

    def _next(self) -> None:
        """Deliver some parcels, then draw the rank whose turn it is."""
        while True:
            able = [n for n, rank in enumerate(self._ranks) if not rank.ended and rank.ready()]
            parcels = self._deliverable()
            if parcels and (not able or self.random.random() > self._lateness):
                pair, number = self.random.choice(parcels)
                parcel = self._wire[pair].pop(number)
                self.events.append(f"{pair[0]} -> {pair[1]}: {parcel.what}")
                parcel.deliver()
                continue
            if able:
                self._turn = self.random.choice(able)
                self.events.append(f"{self._turn} runs")
            else:
                self._turn = -1
                for rank in self._ranks:
                    rank.stuck = not rank.ended
            self._changed.notify_all()
            return

    def _deliverable(self) -> list[tuple[tuple[int, int], int]]:
        found = []
        for pair, parcels in sorted(self._wire.items()):
            for number, parcel in enumerate(parcels):
                if not parcel.ordered or number == 0:
                    found.append((pair, number))
                if parcel.ordered:
                    break
        return found
