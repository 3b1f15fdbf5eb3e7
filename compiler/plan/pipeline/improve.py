"""Improve an order by local search over the simulator: simulated annealing of moves along the critical path.

The step is as long as its critical path, and on the path only two kinds of arcs can be changed by reordering: an operation that
waits for its rank, and the operation it waits for (the blocks of job-shop scheduling; Nowicki and Smutnicki 1996). So a move takes
an operation of the path ahead of those before it on its rank, or puts the one before it behind. Gradients of a stage keep the order
of their micro-batches, and the bytes of a rank stay within its limit.
"""

from __future__ import annotations

import math
import random
import time
from dataclasses import dataclass

from .evaluate import Evaluation, Rows, evaluate, fits
from .problem import Arrays

_REACH = 6


@dataclass(frozen=True)
class Effort:
    """When to stop: after so many seconds or moves, or at a relative distance from the bound; seed of the random choices."""

    seconds: float = 2.0
    moves: int = 200_000
    gap: float = 1e-9
    seed: int = 0


def improve(found: Arrays, order: Rows, bound: float, effort: Effort) -> tuple[Rows, float]:
    """(best order, its seconds); at least as good as the one given."""
    rng = random.Random(effort.seed)
    rows = [list(row) for row in order]
    now = evaluate(found, rows)
    best, best_seconds = [list(row) for row in rows], now.seconds
    goal = bound * (1 + effort.gap)
    candidates = _critical(found, rows, now)
    deadline = time.monotonic() + effort.seconds
    warmth = 0.004 * now.seconds
    for move in range(effort.moves):
        if best_seconds <= goal or not candidates or (move % 32 == 0 and time.monotonic() > deadline):
            break
        temperature = warmth * (1.0 - move / effort.moves) ** 2 + 1e-12
        rank, place = rng.choice(candidates)
        row = rows[rank]
        changed = _moved(found, row, place, rng)
        if changed is None or not fits(found, changed, found.limits[rank]):
            continue
        rows[rank] = changed
        new = evaluate(found, rows)
        if new.seconds <= now.seconds or rng.random() < math.exp((now.seconds - new.seconds) / temperature):
            now = new
            candidates = _critical(found, rows, now)
            if now.seconds < best_seconds:
                best, best_seconds = [list(r) for r in rows], now.seconds
        else:
            rows[rank] = row
    return best, best_seconds


def _critical(found: Arrays, rows: Rows, now: Evaluation) -> list[tuple[int, int]]:
    """(rank, place) of the operations of a longest path that wait for the one before them on their rank."""
    if now.seconds == float("inf"):
        return []
    before: dict[int, tuple[int, int, int]] = {}
    for rank, row in enumerate(rows):
        for place in range(1, len(row)):
            before[row[place]] = (row[place - 1], rank, place)
    number = max((row[-1] for row in rows if row), key=lambda last: now.end[last])
    path: list[tuple[int, int]] = []
    while True:
        source = found.source[number]
        previous = before.get(number)
        if previous is not None and now.end[previous[0]] + found.early[number] >= now.start[number] - 1e-12:
            path.append((previous[1], previous[2]))
            number = previous[0]
        elif source >= 0:
            number = source
        else:
            return path


def _moved(found: Arrays, row: list[int], place: int, rng: random.Random) -> list[int] | None:
    """The row with the operation at ``place`` taken forward, or the one before it put behind; None where that is not allowed."""
    reach = rng.randint(1, _REACH)
    out = list(row)
    if rng.random() < 0.5:
        at = place
        while at > 0 and place - at < reach and _may_swap(found, out[at - 1], out[at]):
            out[at - 1], out[at] = out[at], out[at - 1]
            at -= 1
        return out if at < place else None
    at = place - 1
    while at + 1 < len(out) and at - place + 1 < reach and _may_swap(found, out[at], out[at + 1]):
        out[at], out[at + 1] = out[at + 1], out[at]
        at += 1
    return out if at > place - 1 else None


def _may_swap(found: Arrays, first: int, second: int) -> bool:
    a, b = found.operations[first], found.operations[second]
    if a.stage == b.stage and (a.op == b.op or a.micro_batch == b.micro_batch):
        return False
    return found.source[second] != first
