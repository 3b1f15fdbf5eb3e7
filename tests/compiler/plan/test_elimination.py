"""Variable elimination against enumeration, sharing of equal blocks, bounds when tables must be split."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hocket.compiler.plan.elimination import INFINITE, Factor, Infeasible, evaluate, minimise


@st.composite
def problems(draw, forbid=True):
    domains = draw(st.lists(st.integers(1, 4), min_size=1, max_size=6))
    entries = st.integers(0, 9) if not forbid else st.one_of(st.integers(0, 9), st.just(INFINITE))
    factors = []
    for _ in range(draw(st.integers(0, 9))):
        size = draw(st.integers(1, min(3, len(domains))))
        scope = tuple(draw(st.permutations(range(len(domains))))[:size])
        shape = [domains[v] for v in scope]
        cells = draw(st.lists(entries, min_size=int(np.prod(shape)), max_size=int(np.prod(shape))))
        factors.append(Factor(scope, np.array(cells, dtype=np.int64).reshape(shape)))
    return domains, factors


def enumerated(domains, factors):
    return min(evaluate(x, factors) for x in itertools.product(*map(range, domains)))


@given(problems())
@settings(max_examples=150, deadline=None)
def test_elimination_finds_the_enumerated_minimum(problem):
    domains, factors = problem
    least = enumerated(domains, factors)
    if least >= INFINITE:
        with pytest.raises(Infeasible):
            minimise(domains, factors)
        return
    solution = minimise(domains, factors)
    assert solution.objective == least == evaluate(solution.labels, factors)
    assert solution.is_exact


@given(problems(forbid=False), st.integers(4, 20))
@settings(max_examples=150, deadline=None)
def test_bounds_hold_when_tables_are_split(problem, max_table):
    domains, factors = problem
    least = enumerated(domains, factors)
    solution = minimise(domains, factors, max_table=max_table)
    assert solution.lower_bound <= least <= solution.objective == evaluate(solution.labels, factors)


def test_repeated_blocks_are_solved_once():
    rng = np.random.default_rng(0)
    inner, outer = (rng.integers(0, 1000, (5, 5)) for _ in range(2))
    work = {}
    for blocks in (20, 200):
        factors = []
        for i in range(blocks):
            factors += [Factor((2 * i, 2 * i + 1), inner), Factor((2 * i + 1, 2 * i + 2), outer)]
        solution = minimise([5] * (2 * blocks + 1), factors)
        assert solution.is_exact
        work[blocks] = solution.solved
    assert work[200] < 2 * work[20]


def test_ties_go_to_the_first_label():
    assert minimise([3, 3], [Factor((0, 1), np.zeros((3, 3), dtype=np.int64))]).labels == [0, 0]


def test_many_forbidden_entries_do_not_overflow():
    table = np.array([[INFINITE, 0], [0, INFINITE]], dtype=np.int64)
    free = np.array([[INFINITE, INFINITE], [INFINITE, 1]], dtype=np.int64)
    with pytest.raises(Infeasible):
        minimise([2] * 80, [Factor((0, i), table) for i in range(1, 80)] + [Factor((0, i), free) for i in range(1, 80)])
    hub = [Factor((0, i), np.array([[INFINITE, INFINITE], [3, INFINITE]], dtype=np.int64)) for i in range(1, 80)]
    assert minimise([2] * 80, hub).objective == 3 * 79
