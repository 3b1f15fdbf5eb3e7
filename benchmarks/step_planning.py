"""How long it takes to capture and to plan: CPU seconds, with rules remembered as they are from the second use of a model on."""

from __future__ import annotations

from common import Row, Sample, at_most, cpu_seconds, progress
from step_model import Case

from hocket.compiler.capture import capture
from hocket.compiler.cost.cluster import Cluster
from hocket.compiler.plan.planner import plan
from hocket.compiler.program import Program
from hocket.compiler.rules.table import RuleTable
from hocket.runtime.mesh import Mesh

CLAIM = "capturing and planning"


def rows(*, quick: bool) -> list[Row]:
    """Capture of 64 layers, plans of 32 layers on one axis and of 4 on two."""
    repeats = 1 if quick else 3
    deep, tall, small = (16, 8, 2) if quick else (64, 32, 4)
    progress(f"planning: capturing {deep} layers, planning {tall} layers on one axis and {small} on two")
    model, data = _case(deep).model(), _case(deep).data()
    traced = cpu_seconds(lambda: capture(model, data, {}, train=True), repeats)
    found = [Row(CLAIM, f"capture of {deep} layers (CPU time)", traced.median, spread=traced.spread, text=str(traced))]
    for layers, mesh, goal in ((tall, "d=2", 1.5), (small, "a=2,b=2", None)):
        program = _program(layers)
        seconds = planning(program, mesh, repeats)
        case = f"plan of {layers} layers, {len(program.nodes)} nodes, mesh {mesh} (CPU time)"
        if goal is None:
            found.append(Row(CLAIM, case, seconds.median, spread=seconds.spread, text=str(seconds)))
        else:
            found.append(at_most(CLAIM, case, seconds, goal))
    return found


def planning(program: Program, mesh: str, repeats: int) -> Sample:
    """CPU seconds of the planner alone."""
    rules, cluster, shape = RuleTable(), Cluster.current(), Mesh.parse(mesh)
    return cpu_seconds(lambda: plan(program, shape, rules, cluster), repeats)


def _case(layers: int) -> Case:
    return Case(width=64, hidden=128, layers=layers, batch=4, length=32)


def _program(layers: int) -> Program:
    case = _case(layers)
    return capture(case.model(), case.data(), {}, train=True)
