"""From the order in which ranks compute to a whole schedule: insert the SEND, RECV and COPY that the order implies.

Every value is sent as soon as it is made. Its RECV is posted on the reader's rank before the first instruction that starts after
the maker does: late enough to keep few buffers, early enough that no sender waits for a receiver, so that the schedule cannot
deadlock even where a send blocks until its receive is posted.
"""

from __future__ import annotations

from collections.abc import Sequence

from .instruction import COMPUTE, Flow, Instr, Op, Schedule, ScheduleError, Value, makes, reads

UNIT_COST = {Op.F: 1.0, Op.I: 1.0, Op.W: 1.0, Op.B: 2.0, Op.R: 1.0}


def lower(schedule: Schedule) -> Schedule:
    """The schedule with its communication, made anew: SEND, RECV and COPY that it has are dropped first.

    ScheduleError when the order cannot be run: something waits for a value that is made later.
    """
    order = [[instr for instr in instructions if instr.op not in (Op.SEND, Op.RECV, Op.COPY)] for instructions in schedule.ranks]
    position = _global_positions(order, schedule)
    ranks: list[list[tuple[float, Instr]]] = []
    posted: list[list[tuple[float, Instr]]] = [[] for _ in order]
    for rank, instructions in enumerate(order):
        row: list[tuple[float, Instr]] = []
        for index, instr in enumerate(instructions):
            at = float(position[rank][index])
            row.append((at, instr))
            value = makes(instr, schedule.stages)
            if value is None or (instr.op not in COMPUTE):
                continue
            reader = schedule.placement[value.reader]
            if reader == rank:
                row.append((at, Instr(Op.COPY, value.reader, value.micro_batch, flow=value.flow)))
                continue
            tag = value.tag(schedule.stages)
            row.append((at, Instr(Op.SEND, instr.stage, value.micro_batch, flow=value.flow, peer=reader, tag=tag)))
            receive = Instr(Op.RECV, value.reader, value.micro_batch, flow=value.flow, peer=rank, tag=tag)
            posted[reader].append((at, receive))
        ranks.append(row)
    return schedule.with_ranks([_merge(row, sorted(receives, key=_when)) for row, receives in zip(ranks, posted, strict=True)])


def _when(entry: tuple[float, Instr]) -> float:
    return entry[0]


def _merge(row: Sequence[tuple[float, Instr]], receives: Sequence[tuple[float, Instr]]) -> list[Instr]:
    merged: list[Instr] = []
    waiting = list(receives)[::-1]
    for at, instr in row:
        while waiting and waiting[-1][0] < at:
            merged.append(waiting.pop()[1])
        merged.append(instr)
    merged += [instr for _, instr in reversed(waiting)]
    return merged


def _global_positions(order: Sequence[Sequence[Instr]], schedule: Schedule) -> list[list[int]]:
    """The place of every instruction in one order of the whole machine: by earliest start, ties as they become possible."""
    done: dict[Value, float] = {}
    clock = [0.0] * len(order)
    pointer = [0] * len(order)
    found: list[tuple[float, int, int, int]] = []
    timed = any(instr.cost for instructions in order for instr in instructions)
    progress = True
    while progress:
        progress = False
        for rank, instructions in enumerate(order):
            while pointer[rank] < len(instructions):
                instr = instructions[pointer[rank]]
                value = reads(instr, schedule.stages)
                if value is not None and value not in done:
                    break
                start = max(clock[rank], done[value] if value is not None else 0.0)
                clock[rank] = start + (instr.cost if timed else UNIT_COST.get(instr.op, 0.0))
                made = makes(instr, schedule.stages)
                if made is not None:
                    done[made] = clock[rank]
                found.append((start, len(found), rank, pointer[rank]))
                pointer[rank] += 1
                progress = True
    stuck = [f"rank {r}: {order[r][p]}" for r, p in enumerate(pointer) if p < len(order[r])]
    if stuck:
        raise ScheduleError("the order cannot be run, these wait for one another for ever: " + "; ".join(stuck), tuple(stuck))
    positions = [[0] * len(instructions) for instructions in order]
    for place, (_, _, rank, index) in enumerate(sorted(found)):
        positions[rank][index] = place
    return positions


def order_of(text: str) -> list[Instr]:
    """Compute instructions from words such as ``"F0.0 I1.0 W1.0"`` (stage.micro-batch): for tests and small examples."""
    found = []
    for word in text.split():
        stage, micro_batch = word[1:].split(".")
        found.append(Instr(Op[word[0]], int(stage), int(micro_batch), flow=Flow.NONE))
    return found
