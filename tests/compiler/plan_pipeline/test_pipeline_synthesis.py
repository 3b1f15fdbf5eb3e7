"""Schedules that are found by search: right, within memory, never worse than by hand, and near or at the bound."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hocket.compiler.plan.pipeline.bounds import lower_bound
from hocket.compiler.plan.pipeline.chain import Chain, balance
from hocket.compiler.plan.pipeline.chunked_forms import loop_placement, v_placement
from hocket.compiler.plan.pipeline.costs import LinkCosts, PipelineCosts, StageCosts
from hocket.compiler.plan.pipeline.cpsat import solve
from hocket.compiler.plan.pipeline.evaluate import evaluate, fits
from hocket.compiler.plan.pipeline.forms import NAMES, closed_form
from hocket.compiler.plan.pipeline.improve import Effort
from hocket.compiler.plan.pipeline.joint import Space, search_jointly
from hocket.compiler.plan.pipeline.listing import Habit, list_schedule
from hocket.compiler.plan.pipeline.problem import Problem, arrays, need_of_one
from hocket.compiler.plan.pipeline.simulate import simulate
from hocket.compiler.plan.pipeline.synthesise import numbered, synthesise
from hocket.compiler.plan.pipeline.taper import taper, tapers
from hocket.errors import InputError
from hocket.runtime.schedule.verify import peak_memory, verify_schedule

CHEAP = Effort(seconds=20.0, moves=1500)


def stages(count: int, f: float = 1.0, i: float = 1.27, w: float = 0.59, share: float = 1.0) -> tuple[StageCosts, ...]:
    return (StageCosts(f * share, i * share, (w * share,), activation=share, held=(0.73 * share,)),) * count


def random_problem(rng: random.Random) -> Problem:
    """Costs, memory and placement of all kinds; the limit is often as tight as it can be."""
    ranks, chunks = rng.randint(1, 4), rng.randint(1, 3)
    placement = loop_placement(ranks, chunks) if rng.random() < 0.6 else v_placement(ranks)
    some = []
    for _ in placement:
        pieces = rng.randint(1, 2)
        kept = rng.uniform(0.2, 2.0)
        held = tuple(rng.uniform(0, 1.6) * kept / pieces for _ in range(pieces))
        weights = tuple(rng.choice((0.0, rng.uniform(0, 1))) for _ in range(pieces))
        some.append(
            StageCosts(
                rng.uniform(0.1, 1), rng.choice((0.0, 0.5, 1.0)), weights, None, rng.uniform(0, 1), kept, held, 0.2 * kept, 0.1
            )
        )
    micro_batches = rng.randint(1, 6)
    sizes = tuple(rng.choice((0.25, 0.5, 1.0)) for _ in range(micro_batches)) if rng.random() < 0.3 else ()
    recomputed = frozenset(stage for stage in range(len(placement)) if rng.random() < 0.2)
    costs = PipelineCosts(tuple(some), LinkCosts(rng.choice((0.0, 0.1)), 0.01, 0.1, 0.01, 0.1), rng.choice((0.0, 0.02)))
    free = Problem(costs, placement, micro_batches, (), sizes, recomputed)
    limits = tuple(need_of_one(free, rank) * rng.choice((1.0, 1.0, 1.3, 3.0)) for rank in range(free.ranks))
    return Problem(costs, placement, micro_batches, limits, sizes, recomputed)


@settings(max_examples=150, deadline=None)
@given(seed=st.integers(0, 10**9))
def test_list_schedules_never_deadlock_on_memory(seed: int) -> None:
    """Whatever the limit, as long as one micro-batch fits: right schedules, within memory, at the time the simulator gives."""
    rng = random.Random(seed)
    problem = random_problem(rng)
    habit = Habit(rng.random() < 0.7, rng.random() < 0.5, rng.choice((0.0, 0.5, 1.0)), rng.choice((float("inf"), 0.0, 1.0)))
    found = arrays(problem)
    order = list_schedule(found, habit)
    assert all(fits(found, row, limit) for row, limit in zip(order, problem.limits, strict=True))
    seconds = evaluate(found, order).seconds
    assert seconds >= lower_bound(found) * (1 - 1e-9)
    schedule = found.schedule(order, "random")
    verify_schedule(problem.costs.applied(schedule), [limit * (1 + 1e-9) for limit in problem.limits])
    assert simulate(schedule, problem.costs).seconds == pytest.approx(seconds)


@pytest.mark.parametrize(("memory", "optimum"), [(4.0, 28.52), (5.0, 27.04), (6.0, 26.45), (7.0, 26.03)])
def test_known_optima_are_reached(memory: float, optimum: float) -> None:
    """Four ranks, eight micro-batches, costs 1 : 1.27 : 0.59, messages 0.05: optima proved by an exact solver."""
    problem = Problem(PipelineCosts(stages(4), LinkCosts(0.05)), (0, 1, 2, 3), 8, (memory,) * 4)
    best = synthesise(problem, Effort(seconds=30.0, moves=12_000))
    assert best.seconds <= optimum * 1.006
    verify_schedule(problem.costs.applied(best.schedule), [memory] * 4)


@pytest.mark.parametrize("name", NAMES)
def test_search_is_never_worse_than_a_closed_form_of_the_same_memory(name: str) -> None:
    schedule = closed_form(name, 3, 6)
    costs = PipelineCosts(stages(schedule.stages, share=3 / schedule.stages), LinkCosts(0.02))
    by_hand = simulate(schedule, costs)
    problem = Problem(costs, schedule.placement, 6, by_hand.peaks)
    best = synthesise(problem, CHEAP)
    assert best.seconds <= by_hand.seconds * (1 + 1e-9)
    assert all(
        peak <= limit * (1 + 1e-9) for peak, limit in zip(peak_memory(costs.applied(best.schedule)), by_hand.peaks, strict=True)
    )


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**9))
def test_bounds_are_below_every_closed_form(seed: int) -> None:
    rng = random.Random(seed)
    name, ranks = rng.choice(NAMES), rng.randint(1, 4)
    schedule = closed_form(name, ranks, 2 * ranks)
    some = tuple(StageCosts(rng.random(), rng.random(), (rng.random(),)) for _ in range(schedule.stages))
    problem = Problem(PipelineCosts(some, LinkCosts(rng.random() / 5)), schedule.placement, 2 * ranks)
    found = arrays(problem)
    seconds = simulate(schedule, problem.costs).seconds
    assert evaluate(found, numbered(found, schedule)).seconds <= seconds * (1 + 1e-9)
    assert lower_bound(found) <= seconds * (1 + 1e-9)


def test_a_limit_that_one_micro_batch_exceeds_is_refused_with_the_least_that_works() -> None:
    problem = Problem(PipelineCosts(stages(2)), (0, 1), 4, (0.5, 2.0))
    with pytest.raises(InputError, match=r"rank 0 may hold 0 bytes of activations, but one micro-batch alone needs 1 there"):
        synthesise(problem, CHEAP)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 9), st.integers(0, 4), st.integers(0, 4), st.integers(1, 9))
def test_tapers_keep_the_total(total: int, rise: int, fall: int, granularity: int) -> None:
    try:
        sizes = taper(total, rise, fall, granularity)
    except InputError:
        assert rise + fall > total / 2
        return
    assert sum(sizes) == pytest.approx(total)
    assert all(size * granularity == pytest.approx(round(size * granularity)) and 0 < size <= 1 for size in sizes)


def test_the_first_taper_is_the_even_split() -> None:
    assert next(iter(tapers(4, 8))) == (1.0, 1.0, 1.0, 1.0)
    assert taper(5, 3, 3, 4) == (0.25, 0.5, 0.75, 1.0, 1.0, 0.75, 0.5, 0.25)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 20), min_size=2, max_size=8), st.integers(1, 4), st.integers(0, 3))
def test_balance_is_optimal(work: list[int], parts: int, send: int) -> None:
    import itertools

    parts = min(parts, len(work))
    sends = [float(send * (index % 3)) for index in range(len(work))]

    def heaviest(cuts: tuple[int, ...]) -> float:
        bounds = [0, *cuts, len(work)]
        return max(
            sum(work[a:b]) + (sends[a - 1] if a else 0) + (sends[b - 1] if b < len(work) else 0)
            for a, b in itertools.pairwise(bounds)
        )

    best = min(heaviest(cuts) for cuts in itertools.combinations(range(1, len(work)), parts - 1))
    assert heaviest(balance(work, sends, parts)) == best


def test_more_ranks_than_units_are_refused() -> None:
    with pytest.raises(InputError, match="at most 3 ranks, since the model has 3 units; found 4"):
        search_jointly(Chain(stages(3)), 4, 4)


def uneven_chain(ranks: int, seed: int) -> Chain:
    rng = random.Random(seed)
    units = []
    for _ in range(4 * ranks):
        f, kept = rng.uniform(0.15, 0.35), rng.uniform(0.7, 1.3) / 4
        units.append(StageCosts(f, f * 1.2, (f * 0.6,), None, f, kept, (0.7 * kept,), 0.1 * kept))
    head = StageCosts(0.5, 0.5, (0.5,), None, 0.5, 0.3, (0.2,), 0.03)
    return Chain((*units[:-1], head), LinkCosts(0.02, 0.01, 0.0, 0.01, 0.0), fixed=0.02)


def test_joint_search_beats_every_schedule_by_hand_at_equal_memory() -> None:
    chain, p, m = uneven_chain(3, 3), 3, 6
    limit = max(simulate(closed_form("1f1b", p, m), chain.cut(chain.balanced(p))).peaks)
    plan = search_jointly(chain, p, m, (limit,) * p, Space(granularity=4), Effort(seconds=2.0, moves=2000))
    by_hand = []
    for name in NAMES:
        schedule = closed_form(name, p, m)
        result = simulate(schedule, chain.cut(chain.balanced(schedule.stages)))
        if max(result.peaks) <= limit * (1 + 1e-9):
            by_hand.append(result.seconds)
    assert plan.synthesis.seconds < min(by_hand)
    assert plan.synthesis.gap >= 0
    assert sum(plan.choice.sizes or [1.0] * m) == pytest.approx(m)
    assert len(plan.reasons) > 5
    verify_schedule(plan.synthesis.problem.costs.applied(plan.synthesis.schedule), [limit * (1 + 1e-9)] * p)


def test_recomputation_is_chosen_where_nothing_else_fits() -> None:
    chain = uneven_chain(2, 5)
    whole = sum(unit.activation for unit in chain.units) / 2
    with pytest.raises(InputError, match="one micro-batch alone needs"):
        search_jointly(chain, 2, 4, (0.3 * whole,) * 2, Space(placements=("straight",)), CHEAP)
    limits = (1.2 * whole,) * 2
    plan = search_jointly(chain, 2, 4, limits, Space(recompute=True), Effort(seconds=1.5, moves=500))
    verify_schedule(plan.synthesis.problem.costs.applied(plan.synthesis.schedule), [limit * (1 + 1e-9) for limit in limits])


def test_the_exact_solver_proves_the_known_optimum() -> None:
    pytest.importorskip("ortools")
    problem = Problem(PipelineCosts(stages(4), LinkCosts(0.05)), (0, 1, 2, 3), 8, (5.0,) * 4)
    found = arrays(problem)
    solved = solve(found, list_schedule(found, Habit()), seconds=20.0)
    assert solved is not None
    assert all(fits(found, row, 5.0) for row in solved.order)
    assert evaluate(found, solved.order).seconds == pytest.approx(27.04)
    assert 27.04 * 0.995 <= solved.bound <= 27.04 * (1 + 1e-9)
