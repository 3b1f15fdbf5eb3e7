"""List scheduling of pipelines that cannot deadlock on memory.

Ranks take turns in the order of time; each runs the most urgent operation that it can. With several stages on a rank and a memory
limit a greedy choice can lock itself in: early stages hold all the memory, so that no later stage can run and nothing is freed.
The banker's rule (Dijkstra, EWD 623) forbids it: a forward is admitted only where all micro-batches under way, oldest first, could
still be finished one after the other. Some operation of the oldest one can then always run.
"""

from __future__ import annotations

from dataclasses import dataclass
from heapq import heappop, heappush

from ....runtime.schedule.instruction import Op, ScheduleError
from .evaluate import Rows
from .problem import INFINITE, Arrays, need_of_one

_NEVER = (INFINITE, INFINITE, INFINITE)


@dataclass(frozen=True)
class Habit:
    """How choices are made.

    backward_first: I before F where both can run; deep_first: the later of two stages of a rank first; patience: wait for a more
    urgent operation that arrives within this share of what could be run instead; ahead: how many micro-batches a rank starts at
    most before their backward, beyond those between it and the end (infinite: as memory allows); bias: per operation, added to its
    urgency.
    """

    backward_first: bool = True
    deep_first: bool = True
    patience: float = 0.0
    ahead: float = INFINITE
    bias: tuple[float, ...] = ()


def list_schedule(found: Arrays, habit: Habit) -> Rows:
    """An order of every rank. ScheduleError only where the problem's arrays are inconsistent."""
    return _Lister(found, habit).run()


class _Lister:
    """The state of one construction."""

    def __init__(self, found: Arrays, habit: Habit) -> None:
        problem = found.problem
        self.found, self.habit = found, habit
        self.count = problem.micro_batches
        stages = range(len(problem.placement))
        self.mine = [[s for s in stages if problem.placement[s] == r] for r in range(problem.ranks)]
        self.next_f, self.next_i, self.next_w = [0] * len(stages), [0] * len(stages), [0] * len(stages)
        self.pieces = [problem.costs.stages[s].pieces for s in stages]
        self.held = [0.0] * problem.ranks
        self.limits = [limit * (1 + 1e-9) for limit in found.limits]
        self.end = [-1.0] * len(found.operations)
        self.order: Rows = [[] for _ in range(problem.ranks)]
        self.whole = [need_of_one(problem, rank) for rank in range(problem.ranks)]
        depth = len(problem.placement)
        self.cap = [
            sum(min(self.count, depth - s + habit.ahead) if habit.ahead < INFINITE else self.count for s in row)
            for row in self.mine
        ]

    def run(self) -> Rows:
        """Events in the order of time: a rank becomes free, or a value arrives for it."""
        found = self.found
        clock = [0.0] * len(self.mine)
        idle = [False] * len(self.mine)
        events = [(0.0, rank) for rank in range(len(self.mine))]
        readers = found.readers
        left = len(found.operations)
        while events:
            now, rank = heappop(events)
            if now < clock[rank]:
                continue
            number = self.choose(rank, now)
            idle[rank] = number < 0
            if number < 0:
                continue
            end = now + found.early[number] + found.seconds[number]
            clock[rank] = self.end[number] = end
            self.start(rank, number)
            left -= 1
            heappush(events, (end, rank))
            for reader in readers[number]:
                other = found.rank[reader]
                if other != rank:
                    heappush(events, (end + found.lag[reader], other))
        if left:
            raise ScheduleError(f"{left} operations could not be placed; the memory account of this problem is inconsistent")
        return self.order

    def start(self, rank: int, number: int) -> None:
        """Take an operation into the order."""
        op, stage, _, _ = self.found.operations[number]
        self.order[rank].append(number)
        self.held[rank] += self.found.rise[number] + self.found.fall[number]
        if op is Op.F:
            self.next_f[stage] += 1
        elif op is Op.I:
            self.next_i[stage] += 1
        else:
            self.next_w[stage] += 1

    def choose(self, rank: int, now: float) -> int:
        """The most urgent operation that can start now, -1 where the rank had better wait for one that arrives soon."""
        best, urgency, later = -1, _NEVER, []
        in_flight = sum(self.next_f[s] - self.next_i[s] for s in self.mine[rank])
        for stage in self.mine[rank]:
            for op, number in self.heads(stage):
                arrival = self.arrival(number)
                if arrival == INFINITE or (op is Op.F and not self.admits(rank, stage, number, in_flight)):
                    continue
                if op is Op.I and not self.allows(rank, stage, number):
                    continue
                key = self.urgency(op, stage, number)
                if arrival > now + 1e-15:
                    later.append((arrival, key))
                elif key < urgency:
                    best, urgency = number, key
        if best < 0:
            best = self.oldest_weight(rank)
        if best < 0:
            return -1
        until = now + self.habit.patience * self.found.seconds[best]
        return -1 if any(arrival < until and key < urgency for arrival, key in later) else best

    def heads(self, stage: int) -> list[tuple[Op, int]]:
        """The next F and I of a stage."""
        found = []
        if self.next_i[stage] < self.next_f[stage]:
            found.append((Op.I, self.found.backward[stage][self.next_i[stage]]))
        if self.next_f[stage] < self.count:
            found.append((Op.F, self.found.forward[stage][self.next_f[stage]]))
        return found

    def arrival(self, number: int) -> float:
        """When its value is there; infinite while that is not known."""
        source = self.found.source[number]
        if source < 0:
            return 0.0
        end = self.end[source]
        return end + self.found.lag[number] if end >= 0.0 else INFINITE

    def urgency(self, op: Op, stage: int, number: int) -> tuple[float, float, float]:
        """Smaller is sooner."""
        habit = self.habit
        kind = 0.0 if (op is Op.I) == habit.backward_first else 1.0
        depth = float(-stage if habit.deep_first else stage) if op is Op.F else float(-stage)
        return (kind + habit.bias[number], depth, float(number)) if habit.bias else (kind, depth, float(number))

    def oldest_weight(self, rank: int) -> int:
        """The W whose I is longest past, of all stages of the rank; -1 where there is none."""
        best, when = -1, INFINITE
        for stage in self.mine[rank]:
            number = self.next_w[stage]
            if number < self.next_i[stage] * self.pieces[stage]:
                weight = self.found.weights[stage][number]
                if self.end[self.found.source[weight]] < when:
                    best, when = weight, self.end[self.found.source[weight]]
        return best

    def admits(self, rank: int, stage: int, number: int, in_flight: int) -> bool:
        """Whether a forward leaves every micro-batch under way a way to its end (the banker's rule)."""
        if in_flight >= max(1, self.cap[rank]) and not self.is_oldest(rank, stage):
            return False
        after = self.held[rank] + self.found.rise[number]
        if after > self.limits[rank]:
            return False
        if self.limits[rank] == INFINITE:
            return True
        self.next_f[stage] += 1
        safe = self.is_safe(rank, self.limits[rank] - after)
        self.next_f[stage] -= 1
        return safe

    def allows(self, rank: int, stage: int, number: int) -> bool:
        """Whether a backward that needs memory (to recompute, or for what it holds for W) leaves all others a way to their end."""
        rise, fall = self.found.rise[number], self.found.fall[number]
        if rise <= 0.0 or self.limits[rank] == INFINITE:
            return True
        if self.held[rank] + rise > self.limits[rank]:
            return False
        self.next_i[stage] += 1
        safe = self.is_safe(rank, self.limits[rank] - self.held[rank] - rise - fall)
        self.next_i[stage] -= 1
        return safe

    def is_oldest(self, rank: int, stage: int) -> bool:
        """Whether the next forward of a stage belongs to the oldest micro-batch under way: that one is always let through."""
        return self.next_f[stage] <= min(self.next_i[s] for s in self.mine[rank])

    def is_safe(self, rank: int, free: float) -> bool:
        """Could the micro-batches, oldest first, be finished one after the other with these free bytes?"""
        mine = self.mine[rank]
        if free >= self.whole[rank]:
            return True
        oldest = min(self.next_w[s] // self.pieces[s] for s in mine)
        newest = max(self.next_f[s] for s in mine)
        for micro_batch in range(oldest, newest):
            need, back = self.remaining(mine, micro_batch)
            if need > free:
                return False
            free += back
        return True

    def remaining(self, mine: list[int], m: int) -> tuple[float, float]:
        """(most further bytes until it is finished, bytes it gives back) of one micro-batch on a rank."""
        found, now, most = self.found, 0.0, 0.0
        for stage in mine:
            if m >= self.next_f[stage]:
                now += found.rise[found.forward[stage][m]]
                most = max(most, now)
        for stage in reversed(mine):
            if m >= self.next_i[stage]:
                number = found.backward[stage][m]
                most = max(most, now + found.rise[number])
                now += found.rise[number] + found.fall[number]
            pieces = self.pieces[stage]
            for weight in found.weights[stage][max(m * pieces, self.next_w[stage]) : (m + 1) * pieces]:
                now += found.fall[weight]
        return most, -now
