"""The closed forms by name, as whole schedules."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from ....runtime.errors import InputError
from ....runtime.schedule.instruction import Instr, Op, Schedule
from ....runtime.schedule.lower import lower
from . import chunked_forms, closed_forms
from .closed_forms import Order

SINGLE: dict[str, Callable[[int, int], Order]] = {
    "naive": closed_forms.naive,
    "gpipe": closed_forms.gpipe,
    "1f1b": closed_forms.one_f_one_b,
    "naive-2bp": partial(closed_forms.naive, split=True),
    "gpipe-2bp": partial(closed_forms.gpipe, split=True),
    "1f1b-2bp": partial(closed_forms.one_f_one_b, split=True),
    "zb-h1": closed_forms.zb_h1,
    "zb-h2": closed_forms.zb_h2,
}
"""One stage per rank."""

FOLDED: dict[str, Callable[[int, int], Order]] = {
    "zb-v": chunked_forms.zb_v,
    "v-half": chunked_forms.v_half,
    "dualpipe-v": chunked_forms.dualpipe_v,
}
"""Two stages per rank, in a V."""

NAMES = (*SINGLE, "interleaved", *FOLDED)


def closed_form(name: str, ranks: int, micro_batches: int, chunks: int = 2, sizes: Sequence[float] = ()) -> Schedule:
    """The schedule of that name, with its communication.

    chunks: stages per rank of ``interleaved``; sizes: of the micro-batches. InputError for an unknown name, and where the form does
    not exist for that number of micro-batches.
    """
    if ranks < 1 or micro_batches < 1:
        raise InputError(f"a pipeline needs at least one rank and one micro-batch, found {ranks} and {micro_batches}")
    if name in SINGLE:
        placement, order = tuple(range(ranks)), SINGLE[name](ranks, micro_batches)
    elif name in FOLDED:
        placement, order = chunked_forms.v_placement(ranks), FOLDED[name](ranks, micro_batches)
    elif name == "interleaved":
        placement, order = chunked_forms.loop_placement(ranks, chunks), chunked_forms.interleaved(ranks, micro_batches, chunks)
    else:
        raise InputError(f"expected one of the schedules {', '.join(NAMES)}; found {name!r}")
    return schedule_of(order, placement, micro_batches, name=name, sizes=sizes)


def schedule_of(order: Order, placement: Sequence[int], micro_batches: int, *, name: str, sizes: Sequence[float] = ()) -> Schedule:
    """A whole schedule from the order in which ranks compute; the pieces are those that the order has."""
    pieces = [1] * len(placement)
    for row in order:
        for instr in row:
            pieces[instr.stage] = max(pieces[instr.stage], instr.piece + 1)
    ranks = tuple(tuple(row) for row in order)
    training = any(instr.op is not Op.F for row in order for instr in row)
    return lower(Schedule(tuple(placement), micro_batches, tuple(pieces), ranks, tuple(sizes), name, training))


def inference(ranks: int, micro_batches: int, sizes: Sequence[float] = ()) -> Schedule:
    """Forwards only."""
    return schedule_of(closed_forms.forwards_only(ranks, micro_batches), range(ranks), micro_batches, name="inference", sizes=sizes)


def finishing(schedule: Schedule) -> Schedule:
    """The schedule with the end of a step: every stage shares what others need of it, then runs its optimizer."""
    last = schedule.micro_batches - 1

    def ends(rank: int) -> list[Instr]:
        return [Instr(op, stage, last) for op in (Op.REDUCE, Op.OPT) for stage in schedule.stages_of(rank)]

    return schedule.with_ranks([[*row, *ends(rank)] for rank, row in enumerate(schedule.ranks)])


def cut_weights(schedule: Schedule, pieces: Sequence[int]) -> Schedule:
    """Every W of stage s becomes ``pieces[s]`` W in a row. InputError where it has pieces already."""
    if any(count != 1 for count in schedule.pieces):
        raise InputError(f"the schedule {schedule.name!r} is cut into pieces already: {schedule.pieces}")

    def parts(instr: Instr) -> list[Instr]:
        if instr.op is not Op.W:
            return [instr]
        return [instr._replace(piece=piece) for piece in range(pieces[instr.stage])]

    ranks = tuple(tuple(part for instr in row for part in parts(instr)) for row in schedule.ranks)
    return Schedule(
        schedule.placement, schedule.micro_batches, tuple(pieces), ranks, schedule.sizes, schedule.name, schedule.training
    )
