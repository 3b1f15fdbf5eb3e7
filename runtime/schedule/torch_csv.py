"""Exchange schedules with ``torch.distributed.pipelining``: its CSV has a row per rank and an action per cell.

    compute_only     0F0,1F0,1B0,0B0          compute_comms     0F0,0SEND_F0,...

Torch's B is our B, its I and W are ours (of a single piece). Its OVERLAP_F_B cells are read as the actions inside, in order.
Costs, memory, tags and pieces are not part of that format: they are lost on export, and made anew on import.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Sequence

from .instruction import Flow, Instr, Op, Schedule, ScheduleError, makes, moved
from .lower import lower

_ACTION = re.compile(r"(\d+)(SEND_F|RECV_F|SEND_B|RECV_B|F|I|W|B)(\d+)")
_FLOW = {"F": Flow.ACTIVATION, "B": Flow.GRADIENT}
_LETTER = {flow: letter for letter, flow in _FLOW.items()}
_IGNORED = re.compile(r"\d+(UNSHARD|RESHARD|REDUCE_GRAD)\d*")


def to_torch_csv(schedule: Schedule, *, communication: bool = True) -> str:
    """The CSV text: ``compute_comms`` with communication, else ``compute_only``.

    ScheduleError where the schedule has instructions that torch knows no action for (R, ACC, several pieces, weight versions).
    """
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    for instructions in schedule.ranks:
        cells = [_cell(instr) for instr in instructions if communication or instr.op not in (Op.SEND, Op.RECV)]
        writer.writerow([cell for cell in cells if cell])
    return out.getvalue()


def from_torch_csv(text: str, placement: Sequence[int] | None = None, name: str = "torch") -> Schedule:
    """Read either form. placement: stage -> rank, found from the actions when left out. ScheduleError for unknown actions."""
    rows = [[action for cell in row for action in _actions(cell)] for row in csv.reader(io.StringIO(text))]
    if placement is None:
        placement = _placement(rows)
    micro_batches = 1 + max((instr.micro_batch for row in rows for instr in row), default=-1)
    if not micro_batches:
        raise ScheduleError("the CSV holds no action such as 0F0")
    training = any(instr.op in (Op.B, Op.I) for row in rows for instr in row)
    shell = Schedule(tuple(placement), micro_batches, (1,) * len(placement), tuple(map(tuple, rows)), name=name, training=training)
    if not any(instr.op is Op.SEND for row in rows for instr in row):
        return lower(shell)
    return shell.with_ranks([_complete(row, shell) for row in rows])


def _cell(instr: Instr) -> str:
    match instr.op:
        case Op.F | Op.I | Op.B | Op.W if instr.piece == 0:
            return f"{instr.stage}{instr.op.value}{instr.micro_batch}"
        case Op.SEND | Op.RECV:
            return f"{instr.stage}{instr.op.value}_{_LETTER[instr.flow]}{instr.micro_batch}"
        case Op.COPY | Op.OPT | Op.REDUCE:
            return ""
        case _:
            raise ScheduleError(f"torch.distributed.pipelining has no action for {instr}; export a schedule of one piece per stage")


def _actions(cell: str) -> list[Instr]:
    cell = cell.strip()
    if not cell or _IGNORED.fullmatch(cell):
        return []
    if cell.startswith("(") and cell.endswith(")OVERLAP_F_B"):
        inner = cell[1 : cell.index(")")]
        return [instr for part in inner.split(";") for instr in _actions(part)]
    match = _ACTION.fullmatch(cell)
    if match is None:
        raise ScheduleError(f"expected an action such as 0F0 or 1SEND_B3, found {cell!r}")
    stage, word, micro_batch = int(match[1]), match[2], int(match[3])
    if "_" in word:
        op, letter = word.split("_")
        return [Instr(Op[op], stage, micro_batch, flow=_FLOW[letter])]
    return [Instr(Op[word], stage, micro_batch)]


def _placement(rows: Sequence[Sequence[Instr]]) -> list[int]:
    holder: dict[int, int] = {}
    for rank, row in enumerate(rows):
        for instr in row:
            if holder.setdefault(instr.stage, rank) != rank:
                raise ScheduleError(f"stage {instr.stage} has actions on ranks {holder[instr.stage]} and {rank}")
    if sorted(holder) != list(range(len(holder))):
        raise ScheduleError(f"the CSV names the stages {sorted(holder)}, expected 0..n-1")
    return [holder[stage] for stage in range(len(holder))]


def _complete(row: Sequence[Instr], schedule: Schedule) -> list[Instr]:
    """Peers and tags for SEND and RECV, and a COPY after whatever a stage of the same rank reads."""
    done: list[Instr] = []
    for instr in row:
        if instr.op in (Op.SEND, Op.RECV):
            value = moved(instr)
            other = value.reader if instr.op is Op.SEND else value.maker
            done.append(instr._replace(peer=schedule.placement[other], tag=value.tag(schedule.stages)))
            continue
        done.append(instr)
        made = makes(instr, schedule.stages)
        if made is not None and schedule.placement[made.reader] == schedule.placement[instr.stage]:
            done.append(Instr(Op.COPY, made.reader, made.micro_batch, flow=made.flow))
    return done
