"""Step times of the closed forms are those of theory, exactly, and so is the memory of those that promise it."""

from fractions import Fraction

import pytest

from hocket.compiler.plan.pipeline.costs import PipelineCosts
from hocket.compiler.plan.pipeline.forms import closed_form
from hocket.compiler.plan.pipeline.simulate import simulate
from hocket.errors import InputError
from hocket.runtime.schedule.verify import peak_memory

UNEQUAL = (Fraction(100), Fraction(127), Fraction(59))
EQUAL = (Fraction(1), Fraction(1), Fraction(1))


def seconds(name: str, p: int, m: int, costs: tuple[Fraction, Fraction, Fraction]) -> Fraction:
    schedule = closed_form(name, p, m)
    share = Fraction(p, schedule.stages)
    f, i, w = (cost * share for cost in costs)
    found = simulate(schedule, PipelineCosts.uniform(schedule.stages, f, i, w)).seconds  # type: ignore[arg-type]
    return Fraction(found)


@pytest.mark.parametrize("costs", [EQUAL, UNEQUAL])
@pytest.mark.parametrize("p", [2, 3, 4, 8])
def test_step_times_are_those_of_theory(p: int, costs: tuple[Fraction, Fraction, Fraction]) -> None:
    f, i, w = costs
    whole = f + i + w
    assert seconds("naive", p, 1, costs) == p * whole
    assert seconds("naive-2bp", p, 1, costs) == p * (f + i) + w
    for m in (p, 2 * p):
        assert seconds("gpipe", p, m, costs) == (m + p - 1) * whole
        assert seconds("gpipe-2bp", p, m, costs) == (m + p - 1) * (f + i) + m * w
        assert seconds("1f1b", p, m, costs) == (m + p - 1) * whole
        assert seconds("zb-h1", p, m, costs) == m * whole + (p - 1) * (f + i - w)
    assert seconds("1f1b-2bp", p, p, costs) == (2 * p - 1) * (f + i) + w


@pytest.mark.parametrize("p", [2, 3, 4, 8])
def test_step_times_at_equal_costs(p: int) -> None:
    f, m = EQUAL[0], 2 * p
    assert seconds("1f1b-2bp", p, m, EQUAL) == 7 * p - 1
    assert seconds("zb-h2", p, m, EQUAL) == 3 * m + p - 1
    assert seconds("interleaved", p, m, EQUAL) == 3 * m + (p - 1) * 3 * f / 2
    for name in ("zb-v", "dualpipe-v"):
        assert seconds(name, p, m, EQUAL) == 3 * m + (p - 1) * f / 2


def peak(name: str, p: int, m: int) -> float:
    schedule = closed_form(name, p, m)
    share = p / schedule.stages
    return max(peak_memory(PipelineCosts.uniform(schedule.stages, 1, 1, 1).applied(schedule))) * share


@pytest.mark.parametrize("p", [2, 3, 4, 8])
def test_memory_is_what_each_form_promises(p: int) -> None:
    m = 3 * p
    assert peak("1f1b", p, m) == pytest.approx(p)
    assert peak("gpipe", p, m) == pytest.approx(m)
    assert peak("zb-h1", p, m) == pytest.approx(p)
    assert peak("zb-h2", p, m) == pytest.approx(2 * p - 1)
    assert peak("zb-v", p, m) == pytest.approx(p)
    assert peak("v-half", p, m) <= p / 2 + 1


def test_what_does_not_exist_is_refused() -> None:
    with pytest.raises(InputError, match="expected one of the schedules naive, gpipe"):
        closed_form("zigzag", 2, 2)
    with pytest.raises(InputError, match="a multiple of 4 micro-batches, found 6; use 4, 8"):
        closed_form("interleaved", 4, 6)
    with pytest.raises(InputError, match="at least 8 micro-batches for 4 ranks"):
        closed_form("dualpipe-v", 4, 6)
