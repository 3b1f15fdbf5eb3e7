"""The verifier accepts what runs and refuses everything else."""

import random

import pytest
from broken_schedules import MUTATIONS

from hocket.compiler.plan.pipeline.costs import PipelineCosts
from hocket.compiler.plan.pipeline.forms import NAMES, closed_form, cut_weights, schedule_of
from hocket.errors import InputError
from hocket.runtime.schedule.deadlock import find_deadlock
from hocket.runtime.schedule.instruction import Flow, Instr, Op, Schedule, ScheduleError
from hocket.runtime.schedule.lower import lower, order_of
from hocket.runtime.schedule.verify import find_problems, peak_memory, verify_schedule

SOME = [closed_form(name, p, m) for p, m in ((2, 4), (2, 6), (3, 6)) for name in NAMES]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("ranks", [1, 2, 4, 5])
def test_closed_forms_are_right(name: str, ranks: int) -> None:
    for micro_batches in (2 * ranks, 3 * ranks):
        verify_schedule(closed_form(name, ranks, micro_batches))


def break_many(count: int, seed: int) -> None:
    rng = random.Random(seed)
    refused = 0
    while refused < count:
        schedule = rng.choice(SOME)
        mutation = rng.choice(MUTATIONS)
        broken = mutation(schedule, rng)
        if broken is None or broken == schedule:
            continue
        assert find_problems(broken), f"{mutation.__name__} of {schedule.name} was accepted"
        refused += 1


def test_two_thousand_broken_schedules_are_refused() -> None:
    break_many(2_000, seed=1)


@pytest.mark.slow
@pytest.mark.timeout(1500)
@pytest.mark.parametrize("part", range(10))
def test_a_hundred_thousand_broken_schedules_are_refused(part: int) -> None:
    break_many(10_000, seed=100 + part)


def test_a_deadlock_between_buffered_sends_is_found() -> None:
    """Each rank waits for the value that the other makes only afterwards."""
    first = lower(schedule_of([order_of("F0.0 B0.0 F0.1 B0.1"), order_of("F1.0 B1.0 F1.1 B1.1")], (0, 1), 2, name="right"))
    crossed = first.with_ranks(
        [list(first.ranks[0]), [*first.ranks[1][len(first.ranks[1]) // 2 :], *first.ranks[1][: len(first.ranks[1]) // 2]]]
    )
    assert "deadlock even where sends are buffered" in find_deadlock(crossed, rendezvous=False)
    assert find_problems(crossed)


def test_a_deadlock_of_blocking_sends_only_is_found() -> None:
    """1F1B that posts each receive only when it is needed: both ranks send to one another, and neither listens."""
    schedule = closed_form("1f1b", 2, 4)

    def posted_late(row: tuple[Instr, ...]) -> list[Instr]:
        receives = {(i.flow, i.stage, i.micro_batch): i for i in row if i.op is Op.RECV}
        out: list[Instr] = []
        for instr in row:
            flow = Flow.ACTIVATION if instr.op is Op.F else Flow.GRADIENT
            if instr.op in (Op.F, Op.B) and (flow, instr.stage, instr.micro_batch) in receives:
                out.append(receives[flow, instr.stage, instr.micro_batch])
            if instr.op is not Op.RECV:
                out.append(instr)
        return out

    late = schedule.with_ranks([posted_late(row) for row in schedule.ranks])
    assert not find_deadlock(late, rendezvous=False)
    assert "blocks until its receive is posted" in find_deadlock(late, rendezvous=True)
    with pytest.raises(ScheduleError, match="deadlock where a send blocks"):
        verify_schedule(late)


def test_an_order_that_cannot_run_is_refused_by_name() -> None:
    with pytest.raises(ScheduleError, match="wait for one another for ever: rank 0: B s0 m0; rank 1: F s1 m1"):
        schedule_of([order_of("F0.0 B0.0 F0.1 B0.1"), order_of("F1.1 B1.1 F1.0 B1.0")], (0, 1), 2, name="crossed")


def test_more_memory_than_allowed_is_refused() -> None:
    schedule = PipelineCosts.uniform(4, 1, 1, 1).applied(closed_form("zb-h2", 4, 8))
    peaks = peak_memory(schedule)
    assert peaks[0] == pytest.approx(7)
    verify_schedule(schedule, memory_limit=peaks)
    with pytest.raises(ScheduleError, match=r"rank 0 holds 7 bytes, its limit is 6"):
        verify_schedule(schedule, memory_limit=[6.0] * 4)


def test_gradients_out_of_order_are_refused_unless_allowed() -> None:
    order = [order_of("F0.0 F0.1 I0.0 I0.1 W0.1 W0.0")]
    schedule = schedule_of(order, (0,), 2, name="backwards")
    assert find_problems(schedule) == ["rank 0: W s0 m0 p0 adds its gradient after that of micro-batch 1"]
    assert not find_problems(schedule, in_order=False)


def test_pieces_of_a_weight_gradient_must_all_be_there() -> None:
    schedule = cut_weights(closed_form("zb-h1", 2, 4), (3, 2))
    verify_schedule(schedule)
    row = [i for i in schedule.ranks[0] if not (i.op is Op.W and i.piece == 1 and i.micro_batch == 2)]
    assert find_problems(schedule.with_ranks([row, list(schedule.ranks[1])])) == ["s0 m2 needs B, or I and 3 W; it has 1 I and 2 W"]


def test_weights_that_change_between_forward_and_backward_need_a_stash() -> None:
    def stage(*extra: Instr) -> Schedule:
        f0, f1, b0, b1 = (Instr(op, 0, m) for op, m in ((Op.F, 0), (Op.F, 1), (Op.B, 0), (Op.B, 1)))
        opt0, opt1 = Instr(Op.OPT, 0, 0), Instr(Op.OPT, 0, 1)
        row = (f0, *extra[:1], f1, b0, opt0, b1, *extra[1:], opt1)
        return Schedule((0,), 2, (1,), (row,))

    assert any("a STASH is missing" in text for text in find_problems(stage()))
    assert not find_problems(stage(Instr(Op.STASH, 0, 1), Instr(Op.DROP, 0, 1)))
    assert any("never drops" in text for text in find_problems(stage(Instr(Op.STASH, 0, 1))))


def test_an_update_before_its_gradients_is_refused() -> None:
    row = (Instr(Op.F, 0), Instr(Op.I, 0), Instr(Op.OPT, 0), Instr(Op.W, 0))
    problems = find_problems(Schedule((0,), 1, (1,), (row,)))
    assert any("only partly there" in text for text in problems)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"placement": (0, 2)}, "names ranks outside 0..1"),
        ({"pieces": (1,)}, "at least one piece for each of 2 stages"),
        ({"sizes": (1.0,)}, "expected 2 positive sizes"),
        ({"micro_batches": 0}, "at least one stage, one micro-batch"),
    ],
)
def test_contradictions_are_refused_at_the_door(changes: dict[str, object], message: str) -> None:
    fields: dict[str, object] = {"placement": (0, 1), "micro_batches": 2, "pieces": (1, 1), "ranks": ((), ())}
    with pytest.raises(InputError, match=message):
        Schedule(**(fields | changes))  # type: ignore[arg-type]
