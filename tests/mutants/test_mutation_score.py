"""The mutation score: every random mutant that computes something else is refused, and no other is called different."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from hocket.compiler.verify.levels import Question, ask, ring_level, types_level
from hocket.compiler.verify.report import Status
from hocket.testing.models import CASES, lowered
from hocket.testing.mutation import judge, mutants


def _score(case: str, count: int, seed: int) -> str:
    program, parallel = lowered(case)
    assert ask(Question(program, parallel), (types_level, ring_level)).status is Status.EQUAL
    trials = [judge(program, mutant) for mutant in mutants(parallel, random.Random(seed), count)]
    live = [trial for trial in trials if trial.live is not False]
    survivors = [f"{t.mutant.kind}: {t.mutant.description}; {t.verdict}" for t in live if not t.killed]
    alarms = [f"{t.mutant.kind}: {t.mutant.description}; {t.verdict}" for t in trials if t.is_false_alarm]
    assert not survivors, "\n".join(survivors)
    assert not alarms, "\n".join(alarms)
    kinds = Counter(trial.mutant.kind for trial in trials)
    assert len(live) >= count // 3, f"hardly any mutant is live: {kinds}"
    return (
        f"{case}: {len(live)} of {len(live)} live mutants killed, 0 of {len(trials) - len(live)} equivalent ones called different"
    )


@pytest.mark.parametrize("case", list(CASES))
def test_every_live_mutant_is_killed(case: str, capsys: pytest.CaptureFixture[str]) -> None:
    line = _score(case, 7, seed=5)
    with capsys.disabled():
        print(f"\nmutation score, {line}")


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("case", list(CASES))
def test_every_live_one_of_a_thousand_mutants_is_killed(case: str, capsys: pytest.CaptureFixture[str]) -> None:
    line = _score(case, 124, seed=77)
    with capsys.disabled():
        print(f"\nmutation score, {line}")
