"""Does a schedule run to its end? Ranks run their lists; what each may do depends only on what others have done.

Since tags are unique, no two instructions compete for anything: whatever can run stays able to run until it does. So one run, in
any order, decides: if it gets stuck, every run does.
"""

from __future__ import annotations

from .instruction import Instr, Op, Schedule, reads


def find_deadlock(schedule: Schedule, *, rendezvous: bool) -> str:
    """What waits for ever, "" where nothing does. rendezvous: a SEND blocks until its RECV is posted (else it is buffered)."""
    position = [0] * len(schedule.ranks)
    posted: set[int] = set()
    sent: set[int] = set()
    receive_of = {instr.tag: instr for _, _, instr in schedule if instr.op is Op.RECV}
    tag_of = {(r.flow, r.stage, r.micro_batch): tag for tag, r in receive_of.items()}

    def may_run(instr: Instr) -> bool:
        if instr.op is Op.SEND:
            return not rendezvous or instr.tag in posted
        value = reads(instr, schedule.stages)
        tag = tag_of.get((value.flow, value.reader, value.micro_batch)) if value is not None else None
        return tag is None or tag in sent

    progress = True
    while progress:
        progress = False
        for rank, instructions in enumerate(schedule.ranks):
            while position[rank] < len(instructions) and may_run(instructions[position[rank]]):
                instr = instructions[position[rank]]
                if instr.op is Op.RECV:
                    posted.add(instr.tag)
                elif instr.op is Op.SEND:
                    sent.add(instr.tag)
                position[rank] += 1
                progress = True
    stuck = [f"rank {r} at {schedule.ranks[r][p]}" for r, p in enumerate(position) if p < len(schedule.ranks[r])]
    how = "where a send blocks until its receive is posted" if rendezvous else "even where sends are buffered"
    return f"deadlock {how}: " + ", ".join(stuck) if stuck else ""
