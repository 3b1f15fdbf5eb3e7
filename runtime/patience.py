"""How long to wait for ranks, and what counts as progress."""

from __future__ import annotations

import time
from dataclasses import dataclass

from .monitor import Position

LOOK_EVERY = 0.05
"""Seconds between two looks at the pages of the ranks."""


@dataclass(frozen=True)
class Limits:
    """Seconds without any progress after which the ranks count as hung.

    step: in a step (a rank makes progress whenever it reaches another instruction, so this bounds one instruction, not the step);
    first: while ranks load a program and run it for the first time, which may compile; start: until the ranks are up. window: steps
    that may be under way.
    """

    step: float = 300.0
    first: float = 1800.0
    start: float = 120.0
    window: int = 16


class Patience:
    """How long the ranks have made no progress."""

    def __init__(self, limit: float) -> None:
        self.limit = limit
        self.last: list[object] = []
        now = time.monotonic()
        self.since = now
        self.next_look = now + LOOK_EVERY

    def due(self) -> bool:
        """Whether it is time for another look."""
        return time.monotonic() >= self.next_look

    def look(self, positions: list[Position]) -> float:
        """Seconds without progress once they exceed the limit, else 0."""
        now = time.monotonic()
        self.next_look = now + LOOK_EVERY
        marks: list[object] = [position.mark for position in positions]
        if marks != self.last:
            self.last, self.since = marks, now
        return now - self.since if now - self.since > self.limit else 0.0
