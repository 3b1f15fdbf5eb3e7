"""Random mutation of programs: small changes that a faulty pass could have made, to measure what a checker catches.

A mutant is *live* if it computes something else than the original. A checker is only worth what it kills: every live mutant, and
no other.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from ..compiler.errors import HocketError
from ..compiler.layout import Replicate
from ..compiler.program import Program, Role, copy_program, note
from ..compiler.verify.differential import output_error
from ..compiler.verify.levels import Question, ask, ring_level, types_level
from ..compiler.verify.lockstep import run_ranks
from ..compiler.verify.report import Status, Verdict
from ..compiler.verify.samples import sample_inputs
from .mutations import MUTATIONS

aten = torch.ops.aten
c10d = torch.ops._c10d_functional


@dataclass(frozen=True)
class Mutant:
    """A changed program, and what was changed."""

    program: Program
    kind: str
    description: str


@dataclass(frozen=True)
class Trial:
    """live: whether it computes something else (None: it cannot be run at all); verdict: what types and ring say."""

    mutant: Mutant
    live: bool | None
    verdict: Verdict

    @property
    def killed(self) -> bool:
        """Whether types and ring do not let it pass; a program that divides by zero on every draw is not called equal either."""
        return self.verdict.status is not Status.EQUAL

    @property
    def is_false_alarm(self) -> bool:
        """Called different, though it computes the same."""
        return self.live is False and self.verdict.status is Status.DIFFERENT


def mutants(program: Program, choose: random.Random, count: int) -> list[Mutant]:
    """``count`` random mutants of a lowered program, each with one change; kinds are drawn evenly among those that apply."""
    found: list[Mutant] = []
    attempts = 0
    while len(found) < count:
        attempts += 1
        if attempts > 200 * count:
            raise HocketError(f"expected a program with something to mutate; found none in {attempts} attempts")
        kind = choose.choice(list(MUTATIONS))
        copied, _ = copy_program(program)
        description = MUTATIONS[kind](copied, choose)
        if description:
            copied.graph.graph.lint()
            found.append(Mutant(copied, kind, description))
    return found


def judge(original: Program, mutant: Mutant, *, seeds: int = 2, tolerance: float = 1e-9) -> Trial:
    """Run a mutant in float64 on all ranks to learn whether it is live, and ask the types and the ring about it."""
    live = is_live(original, mutant.program, seeds=seeds, tolerance=tolerance)
    verdict = ask(Question(original, mutant.program), (types_level, ring_level))
    if live is False and verdict.refused:
        live = is_live(original, mutant.program, seeds=seeds, tolerance=tolerance, scale=30.0)
    return Trial(mutant, live, verdict)


def is_live(original: Program, changed: Program, *, seeds: int, tolerance: float, scale: float = 1.0) -> bool | None:
    """Whether some output differs on random inputs (replicas that differ count too); None where the program cannot run."""
    for seed in range(seeds):
        inputs = sample_inputs(original, seed)
        if scale != 1.0:
            inputs = {role: scale * v if v.is_floating_point() else v for role, v in inputs.items()}
        expected = run_ranks(original, inputs, dtype=torch.float64).outputs
        try:
            found = run_ranks(changed, inputs, dtype=torch.float64, check_replicas=False).outputs
        except (HocketError, RuntimeError):
            return None
        if _differs(expected, found, tolerance) or _replicas_differ(changed, inputs, tolerance):
            return True
    return False


def _replicas_differ(program: Program, inputs: Mapping[Role, torch.Tensor], tolerance: float) -> bool:
    """Whether ranks that are to hold the same result do not, by more than rounding: what is zero but for rounding may be scaled."""
    mesh = program.mesh
    if mesh is None:
        return False
    values = run_ranks(program, inputs, dtype=torch.float64, record=True, check_replicas=False).values
    for node in program.results:
        layout = (note(node).layouts or (None,))[0] if node is not None else None
        if node is None or layout is None:
            continue
        held = values[node.name]
        for axis, placement in zip(mesh.names, layout, strict=True):
            for group in mesh.groups(axis) if isinstance(placement, Replicate) else ():
                if any(not output_error(held[group[0]], held[rank])[0] <= tolerance for rank in group[1:]):
                    return True
    return False


def _differs(expected: Mapping[Role, torch.Tensor | None], found: Mapping[Role, torch.Tensor | None], tolerance: float) -> bool:
    for role, value in expected.items():
        other = found[role]
        if (value is None) != (other is None):
            return True
        if value is not None and other is not None and not output_error(value, other)[0] <= tolerance:
            return True
    return False
