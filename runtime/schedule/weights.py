"""Checks of the instructions that touch weights: OPT, REDUCE, STASH and DROP.

A stage may update its weights several times in one schedule (asynchronous pipelines). ``OPT s m`` uses the gradients of the
micro-batches up to m that no earlier OPT used. ``STASH s m`` keeps the weights of that moment for micro-batch m until ``DROP s m``.
"""

from __future__ import annotations

from .instruction import Instr, Op, Schedule

_GRADIENTS = (Op.W, Op.B, Op.ACC, Op.I)
_USES = (Op.F, Op.I, Op.B, Op.W, Op.R)


def weight_problems(schedule: Schedule) -> list[str]:
    """All findings about weights and their versions."""
    problems: list[str] = []
    for stage in range(schedule.stages):
        mine = [instr for _, _, instr in schedule if instr.stage == stage]
        problems += _updates(stage, mine) + _versions(stage, mine)
    updates = {
        stage: [i.micro_batch for _, _, i in schedule if i.op is Op.OPT and i.stage == stage] for stage in range(schedule.stages)
    }
    if len({tuple(found) for found in updates.values()}) > 1:
        problems.append(f"stages update their weights after different micro-batches: {updates}")
    return problems


def _updates(stage: int, mine: list[Instr]) -> list[str]:
    problems = []
    remaining = {i.micro_batch: 0 for i in mine if i.op in _GRADIENTS}
    for instr in mine:
        if instr.op in _GRADIENTS:
            remaining[instr.micro_batch] += 1
    started: set[int] = set()
    closed = reduced = -1
    for instr in mine:
        if instr.op in _GRADIENTS:
            remaining[instr.micro_batch] -= 1
            started.add(instr.micro_batch)
            if instr.micro_batch <= max(closed, reduced):
                problems.append(f"{instr} makes a gradient that an earlier OPT or REDUCE of the stage has used")
        elif instr.op in (Op.OPT, Op.REDUCE):
            late = [m for m, left in remaining.items() if m <= instr.micro_batch and left]
            early = [m for m in started if m > instr.micro_batch]
            if late or early:
                problems.append(f"{instr}: gradients of micro-batches {sorted(late + early)} are only partly there")
            if instr.op is Op.REDUCE:
                reduced = max(reduced, instr.micro_batch)
            elif instr.micro_batch <= closed:
                problems.append(f"{instr} comes after the update of micro-batch {closed}")
            else:
                closed = instr.micro_batch
    if any(i.op is Op.OPT for i in mine) and any(m > closed for m in remaining):
        problems.append(f"stage {stage}: gradients after micro-batch {closed} are never used")
    return problems


def _versions(stage: int, mine: list[Instr]) -> list[str]:
    problems = []
    version = 0
    kept: dict[int, int] = {}
    seen: dict[int, int] = {}
    last_use = {i.micro_batch: at for at, i in enumerate(mine) if i.op in _USES}
    for at, instr in enumerate(mine):
        m = instr.micro_batch
        match instr.op:
            case Op.OPT:
                version += 1
            case Op.STASH:
                if m in kept or m in seen:
                    problems.append(f"{instr} comes twice, or after the forward it is for")
                kept[m] = version
            case Op.DROP:
                if m not in kept or at < last_use.get(m, -1):
                    problems.append(f"{instr} drops weights that are not kept or still needed")
                kept.pop(m, None)
            case Op.F | Op.I | Op.B | Op.W | Op.R:
                used = kept.get(m, version)
                if seen.setdefault(m, used) != used:
                    problems.append(f"{instr} sees weights {used} where its forward saw {seen[m]}; a STASH is missing")
            case _:
                pass
    problems += [f"stage {stage} never drops the weights it keeps for micro-batch {m}" for m in kept]
    return problems
