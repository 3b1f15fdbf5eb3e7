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
from ...runtime.engines.base import Engine
from ...runtime.footprint import peak_bytes
from ...runtime.mesh import Mesh
from ...runtime.program import RankProgram
from ..contract import Context, Pass
from ..cost.cluster import Cluster
from ..emit import emit
from ..errors import PlanError
from ..passmanager import PassRecord, run_passes
from ..plan.plan import Plan
from ..plan.planner import plan
from ..plan.tactics import RewriteTactic, Tactic, placing_tactics, rewrites_of
from ..program import Program
from ..retrace import Retrace, smaller_program
from ..rules.table import RuleTable
from ..verify.canary import canary_level
from ..verify.report import LevelResult, Status, Verdict


@dataclass(frozen=True)
class Options:
    """What the user asked for, validated.

    outputs: "any" where the engine can read pieces of an output in place, "replicate" where every rank needs all of it; gradients:
    "any" where a gradient may lie otherwise than its parameter, "like-params" where it must not; level: how much to prove, None for
    the environment's HOCKET_VERIFY.
    """

    mesh: Mesh
    tactics: Sequence[Tactic | RewriteTactic] | str = "auto"
    constraints: Mapping[str, Any] | None = None
    memory_limit: int | None = None
    outputs: str = "any"
    gradients: str = "any"
    level: str | None = None
    cluster: Cluster = field(default_factory=Cluster.current)
    rules: RuleTable = field(default_factory=RuleTable)

    @property
    def before(self) -> tuple[Pass, ...]:
        """Rewrites of the logical program, in order."""
        return tuple(one for tactic in rewrites_of(self.tactics) for one in tactic.rewrites_before())

    @property
    def after(self) -> tuple[Pass, ...]:
        """Rewrites of the sharded program, in order."""
        return tuple(one for tactic in rewrites_of(self.tactics) for one in tactic.rewrites_after())


Smaller = Sequence[Callable[[], Program | None]]
"""Each captures a program at small sizes, others for every one; None where there are none."""


@dataclass(frozen=True)
class Compiled:
    """One specialisation: everything known about it.

    captured, program: before and after the rewrites that precede planning; seconds: wall time of each stage of compilation;
    smaller_captured, smaller: capture the same two programs at small sizes, None where there are none.
    """

    captured: Program
    program: Program
    plan: Plan
    lowered: Program
    records: tuple[PassRecord, ...]
    instructions: RankProgram
    seconds: Mapping[str, float]
    smaller_captured: Smaller = ()
    smaller: Smaller = ()

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
    smaller = () if retrace is None else smaller_programs(program, retrace, options.mesh)
    context = Context(options.mesh, options.rules, options.cluster)
    rewritten, early = run_passes(program, options.before, context, level=options.level, retrace=smaller)
    marks.append(time.perf_counter())
    chosen = plan(
        rewritten,
        options.mesh,
        options.rules,
        options.cluster,
        placing_tactics(options.tactics),
        {**(options.constraints or {}), **(fixed or {})},
        outputs=options.outputs,
        gradients=options.gradients,
        memory_limit=options.memory_limit,
    )
    marks.append(time.perf_counter())
    small = smaller if not options.before else [functools.partial(_rewritten, one, options.before, context) for one in smaller]
    placed = dataclasses.replace(context, plan=chosen)
    lowered, records = run_passes(rewritten, (Shard(), *options.after), placed, level=options.level, retrace=small)
    marks.append(time.perf_counter())
    instructions = emit(lowered)
    if options.memory_limit is not None:
        _check_footprint(instructions, options.memory_limit)
    marks.append(time.perf_counter())
    stages = ("rewrite", "plan", "passes and proof", "emit")
    seconds = dict(zip(stages, (b - a for a, b in itertools.pairwise(marks)), strict=True))
    return Compiled(program, rewritten, chosen, lowered, (*early, *records), instructions, seconds, smaller, small)


def _check_footprint(instructions: RankProgram, limit: int) -> None:
    """The plan kept the limit in program order; the list that ranks run must keep it too."""
    held = peak_bytes(instructions)
    if held > limit:
        raise PlanError(
            f"memory_limit is {limit} bytes a rank; the plan keeps it, but the lowered program holds {held}: "
            f"give a limit of {held}, or use more ranks"
        )


def prove_again(compiled: Compiled, options: Options, level: str) -> Verdict:
    """Every pass once more, proven to another level; the verdict of the first that is not shown equal, or of the last."""
    context = Context(options.mesh, options.rules, options.cluster)
    _, early = run_passes(compiled.captured, options.before, context, level=level, retrace=compiled.smaller_captured)
    placed = dataclasses.replace(context, plan=compiled.plan)
    _, late = run_passes(compiled.program, (Shard(), *options.after), placed, level=level, retrace=compiled.smaller)
    verdicts = [record.verdict for record in (*early, *late)]
    return next((verdict for verdict in verdicts if verdict.status is not Status.EQUAL), verdicts[-1])


def run_exactly(compiled: Compiled, options: Options, engine: Engine) -> LevelResult:
    """The canary: one tiny step of the lowered program on the engine, in exact integers; at small sizes where there are some."""
    lowered = compiled.lowered
    small = compiled.smaller[0]() if compiled.smaller else None
    if small is not None:
        placed = Context(options.mesh, options.rules, options.cluster, compiled.plan)
        lowered, _ = run_passes(small, (Shard(), *options.after), placed, level="off")
    return canary_level(lowered, engine)


def smaller_programs(program: Program, retrace: Retrace, mesh: Mesh) -> Smaller:
    """The same step at two small sizes, captured when asked for. Two, since a line through the sizes in question and one other pair
    of sizes would say nothing."""
    return [functools.cache(functools.partial(smaller_program, program, retrace, mesh, skip=skip)) for skip in (0, 1)]


def _rewritten(smaller: Callable[[], Program | None], passes: tuple[Pass, ...], context: Context) -> Program | None:
    """The small program after passes that are proven already."""
    small = smaller()
    if small is None:
        return None
    return run_passes(small, passes, context, level="off")[0]
