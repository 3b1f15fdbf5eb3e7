"""Random mutants of programs that hocket itself has lowered: how many are caught, by the proof and by tolerances."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Mapping, Sequence

import torch
from common import Row

from hocket.compiler.errors import HocketError
from hocket.compiler.program import Program, Role
from hocket.compiler.verify.levels import Question, ask, ring_level, types_level
from hocket.compiler.verify.lockstep import run_ranks
from hocket.compiler.verify.report import Status
from hocket.compiler.verify.samples import sample_inputs
from hocket.testing.models import CASES, lowered
from hocket.testing.mutation import Trial, judge, mutants

Values = Mapping[Role, torch.Tensor | None]
TOLERANCES = {
    "float32, default tolerance": (torch.float32, 1.3e-6, 1e-5),
    "float32, 1e-3": (torch.float32, 1e-3, 1e-3),
    "float32, 1e-2": (torch.float32, 1e-2, 1e-2),
    "bfloat16, default tolerance": (torch.bfloat16, 1.6e-2, 1e-2),
}
FIRST = "first output only, float32, 1e-3"


def judge_case(case: str, count: int) -> Counter[str]:
    """Scores of ``count`` mutants of one lowered model, and what tolerances would have caught of the same ones."""
    program, parallel = lowered(case)
    score: Counter[str] = Counter(mutants=count, live=0, killed=0, equivalent=0, different=0)
    score["alarm"] = ask(Question(program, parallel), (types_level, ring_level)).status is not Status.EQUAL
    for mutant in mutants(parallel, random.Random(77), count):
        trial = judge(program, mutant)
        score["equivalent"] += trial.live is False
        score["different"] += trial.is_false_alarm
        if trial.live:
            score["live"] += 1
            score["killed"] += trial.killed
            score.update(_caught(program, trial))
    return score


def mutation_rows(scores: Sequence[Mapping[str, int]]) -> list[Row]:
    """The scores of all cases together."""
    total: Counter[str] = Counter()
    for score in scores:
        total.update(score)
    live, table = total["live"], f"Mutants caught, of {total['mutants']} random ones in {len(scores)} models"
    rows = [_share(table, "types and ring", total["killed"], live, "all")]
    rows += [_share(table, name, total[name], live) for name in (*TOLERANCES, FIRST)]
    rows.append(_count("False alarms", f"{total['equivalent']} equivalent mutants called different", total["different"]))
    rows.append(_count("False alarms", f"{len(CASES)} programs of hocket's own not proven", total["alarm"]))
    return rows


def _share(claim: str, case: str, caught: int, live: int, goal: str = "") -> Row:
    met = caught == live if goal else None
    return Row(claim, case, caught, "mutants", {"live": live}, goal=goal, met=met, text=f"{caught} of {live}")


def _count(claim: str, case: str, found: int) -> Row:
    return Row(claim, case, found, "programs", goal="0", met=found == 0, text=str(found))


def _caught(program: Program, trial: Trial) -> list[str]:
    """The names of the tolerance checks that see the mutant; crashes count as seen."""
    inputs = sample_inputs(program)
    found = []
    runs: dict[torch.dtype, tuple[Values, Values] | None] = {}
    for name, (dtype, rtol, atol) in TOLERANCES.items():
        if dtype not in runs:
            runs[dtype] = _both(program, trial.mutant.program, inputs, dtype)
        pair = runs[dtype]
        if pair is None or not all(_close(a, pair[1][role], rtol, atol) for role, a in pair[0].items()):
            found.append(name)
    pair = runs[torch.float32]
    first = program.signature.outputs[0]
    if pair is None or not _close(pair[0][first], pair[1][first], 1e-3, 1e-3):
        found.append(FIRST)
    return found


def _both(
    program: Program, mutant: Program, inputs: Mapping[Role, torch.Tensor], dtype: torch.dtype
) -> tuple[Values, Values] | None:
    expected = run_ranks(program, inputs, dtype=dtype, check_replicas=False).outputs
    try:
        return expected, run_ranks(mutant, inputs, dtype=dtype, check_replicas=False).outputs
    except (HocketError, RuntimeError):
        return None


def _close(a: torch.Tensor | None, b: torch.Tensor | None, rtol: float, atol: float) -> bool:
    if a is None or b is None:
        return a is b
    return a.shape == b.shape and a.dtype == b.dtype and torch.allclose(a, b, rtol=rtol, atol=atol, equal_nan=True)
