"""Is a schedule right? Every check is independent of how the schedule was made.

once        every F, and either B or I with every W piece, exactly once for each stage and micro-batch, on the stage's rank
data        each reads what an earlier instruction of its rank made, received or copied; forward before backward before weights
messages    every value that changes rank has one SEND and one RECV of the same tag, peers that name each other, tags unique
deadlock    the lists run to the end where sends are buffered, and also where a send blocks until its receive is posted
memory      the bytes of a rank never exceed the limit
order       gradients are added in the order of the micro-batches, so that sums are the same whatever the schedule
weights     OPT after the gradients it uses and before any other; a forward and its backward see the same weights
"""

from __future__ import annotations

from collections.abc import Sequence

from .deadlock import find_deadlock
from .instruction import MOVES, Instr, Op, Schedule, ScheduleError, makes, moved, reads
from .weights import weight_problems

Key = tuple[Op, int, int, int]
Where = tuple[int, int]
_SHOWN = 5


def verify_schedule(schedule: Schedule, memory_limit: Sequence[float] | None = None, *, in_order: bool = True) -> None:
    """Raise ScheduleError with every problem that ``find_problems`` sees."""
    problems = find_problems(schedule, memory_limit, in_order=in_order)
    if problems:
        more = f" (and {len(problems) - _SHOWN} more)" if len(problems) > _SHOWN else ""
        text = "; ".join(problems[:_SHOWN]) + more
        raise ScheduleError(f"the schedule {schedule.name!r} is wrong: {text}", tuple(problems))


def find_problems(schedule: Schedule, memory_limit: Sequence[float] | None = None, *, in_order: bool = True) -> list[str]:
    """All findings, empty where the schedule is right.

    memory_limit: bytes per rank. in_order: gradients must be added in the order of the micro-batches.
    """
    where = _positions(schedule)
    problems = _in_range(schedule)
    if problems:
        return problems
    problems += _once(schedule, where) + _data(schedule, where) + _messages(schedule) + weight_problems(schedule)
    if in_order:
        problems += _accumulation(schedule)
    if memory_limit is not None:
        problems += _memory(schedule, memory_limit)
    if not problems:
        problems += [text for rendezvous in (False, True) if (text := find_deadlock(schedule, rendezvous=rendezvous))]
    return problems


def peak_memory(schedule: Schedule) -> list[float]:
    """Highest number of bytes of each rank, by the instructions' own account; does not depend on timing."""
    peaks = []
    for instructions in schedule.ranks:
        now = peak = 0.0
        for instr in instructions:
            now += instr.memory
            peak = max(peak, now)
        peaks.append(peak)
    return peaks


def _positions(schedule: Schedule) -> dict[Key, list[Where]]:
    where: dict[Key, list[Where]] = {}
    for rank, position, instr in schedule:
        if instr.op not in (Op.SEND, Op.RECV, Op.COPY):
            where.setdefault((instr.op, instr.stage, instr.micro_batch, instr.piece), []).append((rank, position))
    return where


def _in_range(schedule: Schedule) -> list[str]:
    problems = []
    for rank, position, instr in schedule:
        at = f"rank {rank}, instruction {position} ({instr})"
        if not 0 <= instr.stage < schedule.stages or not 0 <= instr.micro_batch < schedule.micro_batches:
            problems.append(f"{at}: stages are 0..{schedule.stages - 1}, micro-batches 0..{schedule.micro_batches - 1}")
        elif not 0 <= instr.piece < schedule.pieces[instr.stage]:
            problems.append(f"{at}: stage {instr.stage} has {schedule.pieces[instr.stage]} pieces")
        elif schedule.placement[instr.stage] != rank:
            problems.append(f"{at}: stage {instr.stage} lives on rank {schedule.placement[instr.stage]}")
        elif instr.op in MOVES and not all(0 <= end < schedule.stages for end in (moved(instr).reader, moved(instr).maker)):
            problems.append(f"{at}: there is no such neighbour of stage {instr.stage}")
        elif instr.op in MOVES and not instr.flow:
            problems.append(f"{at}: what it moves is not said")
    return problems


def _once(schedule: Schedule, where: dict[Key, list[Where]]) -> list[str]:
    problems = [
        f"{op.value} s{stage} m{micro_batch} p{piece} occurs {len(places)} times"
        for (op, stage, micro_batch, piece), places in where.items()
        if len(places) > 1
    ]
    for stage in range(schedule.stages):
        pieces = range(schedule.pieces[stage])
        for micro_batch in range(schedule.micro_batches):
            name = f"s{stage} m{micro_batch}"
            if (Op.F, stage, micro_batch, 0) not in where:
                problems.append(f"F {name} is missing")
            whole = (Op.B, stage, micro_batch, 0) in where
            first = (Op.I, stage, micro_batch, 0) in where
            parts = sum((Op.W, stage, micro_batch, piece) in where for piece in pieces)
            held = sum((Op.ACC, stage, micro_batch, piece) in where for piece in pieces)
            if not schedule.training:
                if whole or first or parts:
                    problems.append(f"{name} has a backward in a schedule of forwards only")
            elif whole and (first or parts):
                problems.append(f"{name} has both B and I or W")
            elif not whole and not (first and parts == len(pieces)):
                problems.append(f"{name} needs B, or I and {len(pieces)} W; it has {int(first)} I and {parts} W")
            if held not in (0, len(pieces)):
                problems.append(f"{name} adds {held} of its {len(pieces)} gradient pieces")
    return problems


def _data(schedule: Schedule, where: dict[Key, list[Where]]) -> list[str]:
    """What each compute instruction needs from its own rank, and before it."""
    problems: list[str] = []
    arrived: dict[object, Where] = {}
    for rank, position, instr in schedule:
        if instr.op in (Op.RECV, Op.COPY):
            if moved(instr) in arrived:
                problems.append(f"rank {rank}: {instr} brings a value a second time")
            arrived.setdefault(moved(instr), (rank, position))
    for rank, position, instr in schedule:
        here = (rank, position)
        for need in _needs(schedule, instr, where):
            before = any(place[0] == rank and place[1] < position for place in where.get(need, ()))
            problems += [] if before else [f"rank {rank}: {instr} comes without {need[0].value} s{need[1]} m{need[2]} before it"]
        value = reads(instr, schedule.stages)
        if value is not None and not (value in arrived and arrived[value] < here and arrived[value][0] == rank):
            problems.append(f"rank {rank}: {instr} reads the {value.flow.value} of stage {value.maker} before it is there")
        if instr.op is Op.R and any(place < here for place in _backward_places(where, instr)):
            problems.append(f"rank {rank}: {instr} comes after its backward")
    return problems


def _needs(schedule: Schedule, instr: Instr, where: dict[Key, list[Where]]) -> list[Key]:
    stage, micro_batch = instr.stage, instr.micro_batch
    match instr.op:
        case Op.I | Op.B | Op.R:
            return [(Op.F, stage, micro_batch, 0)]
        case Op.W:
            return [(Op.I, stage, micro_batch, 0)]
        case Op.ACC:
            made = Op.B if (Op.B, stage, micro_batch, 0) in where else Op.W
            return [(made, stage, micro_batch, 0 if made is Op.B else instr.piece)]
        case Op.SEND | Op.COPY:
            value = moved(instr)
            if makes(Instr(Op.F, value.maker, micro_batch), schedule.stages) == value:
                return [(Op.F, value.maker, micro_batch, 0)]
            whole = (Op.B, value.maker, micro_batch, 0)
            return [whole if whole in where else (Op.I, value.maker, micro_batch, 0)]
        case _:
            return []


def _backward_places(where: dict[Key, list[Where]], instr: Instr) -> list[Where]:
    return [place for op in (Op.I, Op.B) for place in where.get((op, instr.stage, instr.micro_batch, 0), ())]


def _messages(schedule: Schedule) -> list[str]:
    problems: list[str] = []
    sends: dict[int, tuple[int, Instr]] = {}
    receives: dict[int, tuple[int, Instr]] = {}
    for rank, _, instr in schedule:
        if instr.op is Op.COPY and schedule.placement[moved(instr).maker] != rank:
            problems.append(f"rank {rank}: {instr} copies a value that another rank makes")
        if instr.op not in (Op.SEND, Op.RECV):
            continue
        table = sends if instr.op is Op.SEND else receives
        if instr.tag in table:
            problems.append(f"rank {rank}: {instr} uses tag {instr.tag} again")
        table[instr.tag] = (rank, instr)
    for tag in sorted(sends.keys() | receives.keys()):
        if tag not in sends or tag not in receives:
            rank, instr = (sends.get(tag) or receives.get(tag)) or (0, Instr(Op.F, 0))
            problems.append(f"rank {rank}: {instr} has no other end")
            continue
        (sender, send), (receiver, receive) = sends[tag], receives[tag]
        if moved(send) != moved(receive):
            problems.append(f"tag {tag}: {send} meets {receive}")
        if (send.peer, receive.peer) != (receiver, sender) or sender == receiver:
            problems.append(f"tag {tag}: {send} on rank {sender} and {receive} on rank {receiver} do not name each other")
    return problems


def _accumulation(schedule: Schedule) -> list[str]:
    problems = []
    explicit = {instr.stage for _, _, instr in schedule if instr.op is Op.ACC}
    last: dict[tuple[str, int, int], int] = {}
    for rank, _, instr in schedule:
        adders = (Op.ACC,) if instr.stage in explicit else (Op.W, Op.B)
        keys: list[tuple[str, int, int]] = []
        if instr.op in (Op.I, Op.B):
            keys.append(("I", instr.stage, 0))
        if instr.op in adders:
            every = range(schedule.pieces[instr.stage]) if instr.op is Op.B else (instr.piece,)
            keys += [("W", instr.stage, piece) for piece in every]
        for key in keys:
            if last.get(key, -1) >= instr.micro_batch:
                problems.append(f"rank {rank}: {instr} adds its gradient after that of micro-batch {last[key]}")
            last[key] = max(last.get(key, -1), instr.micro_batch)
    return problems


def _memory(schedule: Schedule, limit: Sequence[float]) -> list[str]:
    slack = 1 + 1e-9
    return [
        f"rank {rank} holds {peak:,.0f} bytes, its limit is {limit[rank]:,.0f}"
        for rank, peak in enumerate(peak_memory(schedule))
        if peak > limit[rank] * slack
    ]
