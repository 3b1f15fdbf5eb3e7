"""Pipelines that update weights without draining: which weights a micro-batch sees, and the schedule that gives it those.

Stage s of p, micro-batch m, one update after each micro-batch (2bw: after each group of k). Number of updates that the weights have
had that micro-batch m uses, in its forward and in its backward alike:

    flush       0                        one update, at the end
    stash       max(0, m - (p - s) + 1)  the newest at its forward (PipeDream, SOSP 2019, weight stashing)
    vertical    max(0, m - p + 1)        those that stage 0 had: the same at all stages (PipeDream, vertical sync)
    2bw         max(0, m // k - 1)       w(t+1) = w(t) - nu grad f(w(t-1)): two versions (PipeDream-2BW, arXiv 2006.09503)

STASH keeps references to the weights of its moment, so older versions cost memory only where an update has replaced them.
"""

from __future__ import annotations

from ....runtime.errors import InputError
from ....runtime.schedule.instruction import Instr, Op, Schedule
from .closed_forms import one_f_one_b
from .forms import schedule_of

MODES = ("flush", "stash", "vertical", "2bw")


def version(mode: str, stage: int, ranks: int, micro_batch: int, group: int = 1) -> int:
    """Updates that the weights which a micro-batch sees at a stage have had. InputError for an unknown mode."""
    match mode:
        case "flush":
            return 0
        case "stash":
            return max(0, micro_batch - (ranks - stage) + 1)
        case "vertical":
            return max(0, micro_batch - ranks + 1)
        case "2bw":
            return max(0, micro_batch // group - 1)
        case _:
            raise InputError(f"expected one of the weight versions {', '.join(MODES)}; found {mode!r}")


def asynchronous(mode: str, ranks: int, micro_batches: int, group: int = 1) -> Schedule:
    """1F1B over all micro-batches with the updates and kept weights of a mode; one stage per rank.

    group: micro-batches per update (2bw). InputError where 2bw's groups are shorter than the pipeline (two versions would not do)
    or do not divide the micro-batches.
    """
    version(mode, 0, ranks, 0)
    if mode == "2bw" and (group < ranks or micro_batches % group):
        raise InputError(
            f"2bw needs groups of at least {ranks} micro-batches that divide {micro_batches}, found groups of {group}; "
            f"with shorter groups a micro-batch would need more than two versions"
        )
    if mode != "2bw" and group != 1:
        raise InputError(f"groups are part of 2bw only, found groups of {group} with {mode}")
    order = []
    for rank, row in enumerate(one_f_one_b(ranks, micro_batches)):
        updated: list[Instr] = []
        for instr in row:
            updated.append(instr)
            if instr.op is Op.B and _updates(mode, instr.micro_batch, micro_batches, group):
                updated.append(Instr(Op.OPT, rank, instr.micro_batch))
        order.append(_with_kept(updated, [version(mode, rank, ranks, m, group) for m in range(micro_batches)]))
    return schedule_of(order, range(ranks), micro_batches, name=f"1f1b, {mode}")


def _updates(mode: str, micro_batch: int, micro_batches: int, group: int) -> bool:
    match mode:
        case "flush":
            return micro_batch == micro_batches - 1
        case "2bw":
            return (micro_batch + 1) % group == 0
        case _:
            return True


def _with_kept(row: list[Instr], wanted: list[int]) -> list[Instr]:
    """Insert STASH where the weights still have the wanted version, as late as can be, and DROP after the backward."""
    versions, now = [], 0
    for instr in row:
        versions.append(now)
        now += instr.op is Op.OPT
    forward = {instr.micro_batch: place for place, instr in enumerate(row) if instr.op is Op.F}
    backward = {instr.micro_batch: place for place, instr in enumerate(row) if instr.op is Op.B}
    before: dict[int, list[Instr]] = {}
    kept: set[int] = set()
    for m, target in enumerate(wanted):
        if versions[forward[m]] == versions[backward[m]] == target:
            continue
        place = forward[m]
        while versions[place] > target:
            place -= 1
        kept.add(m)
        before.setdefault(place, []).append(Instr(Op.STASH, row[place].stage, m))
    out: list[Instr] = []
    for place, instr in enumerate(row):
        out += [*before.get(place, ()), instr]
        if instr.op is Op.B and instr.micro_batch in kept:
            out.append(Instr(Op.DROP, instr.stage, instr.micro_batch))
    return out
