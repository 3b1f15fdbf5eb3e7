"""The hall behind every door: a captured program in, a verified per-rank instruction list out."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ...passes.shard import Shard
from ...runtime.mesh import Mesh
from ...runtime.program import RankProgram
from ..contract import Context, Pass
from ..cost.cluster import Cluster
from ..emit import emit
from ..passmanager import PassRecord, run_passes
from ..plan.plan import Plan
from ..plan.planner import plan
from ..plan.tactics import Tactic
from ..program import Program
from ..retrace import Retrace, smaller_program
from ..rules.table import RuleTable


@dataclass(frozen=True)
class Options:
    """What the user asked for, validated.

    outputs: "any" where the engine can read pieces of an output in place, "replicate" where every rank needs all of it; gradients:
    "any" where a gradient may lie otherwise than its parameter, "like-params" where it must not; level: how much to prove, None for
    the environment's HOCKET_VERIFY; passes: rewrites after sharding, in order.
    """

    mesh: Mesh
    tactics: Sequence[Tactic] | str = "auto"
    constraints: Mapping[str, Any] | None = None
    memory_limit: int | None = None
    outputs: str = "any"
    gradients: str = "any"
    level: str | None = None
    cluster: Cluster = field(default_factory=Cluster.current)
    rules: RuleTable = field(default_factory=RuleTable)
    passes: tuple[Pass, ...] = ()


@dataclass(frozen=True)
class Compiled:
    """One specialisation: everything known about it.

    seconds: wall time of each stage of compilation; smaller: gives the same program at small sizes, None where there is none.
    """

    program: Program
    plan: Plan
    lowered: Program
    records: tuple[PassRecord, ...]
    instructions: RankProgram
    seconds: Mapping[str, float]
    smaller: Callable[[], Program | None] | None = None

    def timed(self, **seconds: float) -> Compiled:
        """A copy that also knows how long earlier stages took."""
        return dataclasses.replace(self, seconds={**seconds, **self.seconds})


def compile_program(
    program: Program, options: Options, *, retrace: Retrace | None = None, fixed: Mapping[str, Any] | None = None
) -> Compiled:
    """Plan, shard, verify and emit a captured program.

    retrace: re-captures at other sizes, for the verifier; fixed: parameter layouts that an earlier specialisation has settled, as
    constraints. Raises PlanError or VerificationError.
    """
    marks = [time.perf_counter()]
    chosen = plan(
        program,
        options.mesh,
        options.rules,
        options.cluster,
        options.tactics,
        {**(options.constraints or {}), **(fixed or {})},
        outputs=options.outputs,
        gradients=options.gradients,
        memory_limit=options.memory_limit,
    )
    marks.append(time.perf_counter())
    smaller = None if retrace is None else functools.partial(smaller_program, program, retrace, options.mesh)
    context = Context(options.mesh, options.rules, options.cluster, chosen)
    lowered, records = run_passes(program, (Shard(), *options.passes), context, level=options.level, retrace=smaller)
    marks.append(time.perf_counter())
    instructions = emit(lowered)
    marks.append(time.perf_counter())
    seconds = dict(zip(("plan", "passes and proof", "emit"), (b - a for a, b in itertools.pairwise(marks)), strict=True))
    return Compiled(program, chosen, lowered, records, instructions, seconds, smaller)
