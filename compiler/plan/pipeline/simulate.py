"""Discrete-event simulation of a schedule: when every instruction runs, how long the step takes, how much memory it needs.

The same instructions that the executor runs, with the same meaning: a rank runs its list in order; SEND takes the sender's
processor and never blocks; a value arrives a latency later; the instruction that reads it waits for it, and pays for the receive.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from ....runtime.schedule.instruction import Instr, Op, Schedule, ScheduleError, moved, reads
from ....runtime.schedule.verify import peak_memory
from .costs import PipelineCosts


class Span(NamedTuple):
    """An instruction and when it ran, in seconds. ready: when the rank was free for it (before ``start`` it waited)."""

    instr: Instr
    ready: float
    start: float
    stop: float


@dataclass(frozen=True)
class Simulation:
    """The result. spans: per rank, in order; peaks: bytes per rank; seconds: from the first start to the last stop."""

    schedule: Schedule
    spans: tuple[tuple[Span, ...], ...]
    peaks: tuple[float, ...]
    seconds: float

    @property
    def busy(self) -> tuple[float, ...]:
        """Seconds that each rank computes or moves data."""
        return tuple(sum(span.stop - span.start for span in spans) for spans in self.spans)

    @property
    def bubble(self) -> float:
        """Share of the ranks' time in which they wait."""
        return 1.0 - sum(self.busy) / (self.seconds * len(self.spans)) if self.seconds else 0.0

    def memory(self, rank: int) -> list[tuple[float, float]]:
        """(seconds, bytes from then on) of a rank."""
        line, now = [(0.0, 0.0)], 0.0
        for span in self.spans[rank]:
            if span.instr.memory:
                now += span.instr.memory
                line.append((span.start if span.instr.memory > 0 else span.stop, now))
        return line


def simulate(schedule: Schedule, costs: PipelineCosts) -> Simulation:
    """Run the schedule on paper. ScheduleError where it deadlocks."""
    priced = costs.applied(schedule)
    latency = costs.link.latency
    arrival: dict[object, float] = {}
    receive_cost = {(instr.flow, instr.stage, instr.micro_batch): instr.cost for _, _, instr in priced if instr.op is Op.RECV}
    clock = [0.0] * len(priced.ranks)
    spans: list[list[Span]] = [[] for _ in priced.ranks]
    progress = True
    while progress:
        progress = False
        for rank, instructions in enumerate(priced.ranks):
            row = spans[rank]
            while len(row) < len(instructions):
                instr = instructions[len(row)]
                value = reads(instr, priced.stages)
                if value is not None and value not in arrival:
                    break
                ready = clock[rank]
                start, cost = ready, instr.cost
                if value is not None:
                    start = max(ready, arrival[value])
                    cost += receive_cost.get(value, 0.0)
                elif instr.op is Op.RECV:
                    cost = 0.0
                stop = clock[rank] = start + cost
                if instr.op is Op.SEND:
                    arrival[moved(instr)] = stop + latency
                elif instr.op is Op.COPY:
                    arrival[moved(instr)] = stop
                row.append(Span(instr, ready, start, stop))
                progress = True
    _refuse_deadlock(priced, spans)
    return Simulation(priced, tuple(map(tuple, spans)), tuple(peak_memory(priced)), max(clock, default=0.0))


def _refuse_deadlock(schedule: Schedule, spans: list[list[Span]]) -> None:
    stuck = [
        f"rank {r} at {row[len(s)]}" for r, (row, s) in enumerate(zip(schedule.ranks, spans, strict=True)) if len(s) < len(row)
    ]
    if stuck:
        raise ScheduleError("the schedule cannot be simulated, it deadlocks: " + ", ".join(stuck), tuple(stuck))
