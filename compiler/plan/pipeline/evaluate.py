"""How long an order takes, and whether it fits in memory: the simulator in its fastest form, for searches."""

from __future__ import annotations

from collections.abc import Sequence

from .problem import INFINITE, Arrays

Rows = list[list[int]]
"""Operations of each rank, in order."""


class Evaluation:
    """Start (once its value is there) and end of every operation; ``seconds`` is infinite where the order deadlocks."""

    def __init__(self, start: list[float], end: list[float], seconds: float) -> None:
        self.start = start
        self.end = end
        self.seconds = seconds


def evaluate(found: Arrays, order: Sequence[Sequence[int]]) -> Evaluation:
    """Run an order: every operation as soon as its rank and its value are there."""
    source, lag, cost = found.source, found.lag, found.seconds
    early = found.early
    start, end = [0.0] * len(cost), [-1.0] * len(cost)
    clock = [0.0] * len(order)
    pointer = [0] * len(order)
    parked: dict[int, int] = {}
    ready = list(range(len(order)))
    left = sum(map(len, order))
    while ready:
        rank = ready.pop()
        row, at, now = order[rank], pointer[rank], clock[rank]
        while at < len(row):
            number = row[at]
            before = source[number]
            began = now
            now += early[number]
            if before >= 0:
                arrival = end[before]
                if arrival < 0.0:
                    now = began
                    parked[before] = rank
                    break
                arrival += lag[number]
                if arrival > now:
                    now = arrival
            start[number] = now
            now += cost[number]
            end[number] = now
            at += 1
            left -= 1
            if number in parked:
                ready.append(parked.pop(number))
        pointer[rank], clock[rank] = at, now
    return Evaluation(start, end, max(clock) if not left else INFINITE)


def fits(found: Arrays, row: Sequence[int], limit: float) -> bool:
    """Whether a rank's order stays within its bytes."""
    now = 0.0
    limit *= 1 + 1e-9
    for number in row:
        now += found.rise[number]
        if now > limit:
            return False
        now += found.fall[number]
    return True


def peak(found: Arrays, row: Sequence[int]) -> float:
    """Most bytes of a rank's order."""
    now = most = 0.0
    for number in row:
        now += found.rise[number]
        most = max(most, now)
        now += found.fall[number]
    return most
