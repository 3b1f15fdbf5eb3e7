"""Uneven micro-batches where the simulator prefers them: small ones fill and drain a pipeline sooner."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from ....passes.backward_split_costs import Costs
from ...errors import InputError
from ...plan.pipeline.bounds import lower_bound
from ...plan.pipeline.costs import PipelineCosts, StageCosts
from ...plan.pipeline.problem import INFINITE, Problem, arrays
from ...plan.pipeline.synthesise import HABITS, construct
from ...plan.pipeline.taper import tapers
from ...stages import ONCE
from .form import Form
from .options import PipelineOrder, parse_bytes

WORTH = 0.03
"""A taper must save this share of a step: every other size of micro-batch is one more program to compile and to hold."""

MOST_SIZES = 3
"""Different sizes in one batch, at most."""


def propose_rows(costs: PipelineCosts, rows: tuple[int, ...], order: PipelineOrder) -> tuple[tuple[int, ...], str]:
    """The rows of each micro-batch that take the least simulated time, and a reason where they are not those given.

    costs: of the largest of ``rows``, see ``with_overhead``. Only a schedule that is searched ("auto") is made for uneven ones.
    """
    if order.tactic.schedule != "auto" or len(set(rows)) > 1 or len(rows) < 2:
        return rows, ""
    unit = order.replicas
    before = _simulated(costs, rows, order)
    best, seconds = rows, before
    for candidate in _candidates(len(rows), rows[0] // unit):
        scaled = tuple(unit * size for size in candidate)
        taken = _simulated(costs, scaled, order, full=rows[0])
        if taken < seconds:
            best, seconds = scaled, taken
    if not seconds < before * (1 - WORTH):
        return rows, ""
    shown = ", ".join(map(str, best))
    return (
        best,
        f"; micro-batches of {shown} rows save {1 - seconds / before:.1%} of a step, simulated, against {len(rows)} equal ones",
    )


def _candidates(count: int, granularity: int) -> Iterator[tuple[int, ...]]:
    if granularity < 2:
        return
    for shares in tapers(count, granularity):
        sizes = tuple(round(share * granularity) for share in shares)
        if 1 < len(set(sizes)) <= MOST_SIZES and min(sizes) > 1:  # a single row is often another program
            yield sizes


def _simulated(costs: PipelineCosts, rows: tuple[int, ...], order: PipelineOrder, full: int = 0) -> float:
    """Seconds of a step with a few list schedules; infinite where the memory limit cannot be kept."""
    full = full or max(rows)
    limit = parse_bytes(order.tactic.memory)
    limits = (float(limit),) * order.ranks if limit is not None else ()
    try:
        found = arrays(Problem(costs, tuple(range(order.ranks)), len(rows), limits, tuple(size / full for size in rows)))
    except InputError:
        return INFINITE
    return construct(found, lower_bound(found), habits=HABITS[:3]).seconds


def with_overhead(costs: PipelineCosts, form: Form) -> PipelineCosts:
    """The same costs of a full micro-batch, with what does not shrink with it (starting each op) told apart."""
    overhead = Costs(form.context.cluster).cluster.op_overhead
    parts = [part for stage in form.pipeline.stages for part in stage.parts if part.kind not in ONCE]
    calls = [sum(node.op == "call_function" for node in part.program.nodes) for part in parts]
    fixed = overhead * sum(calls) / max(1, len(calls))

    def without(seconds: float) -> float:
        return max(seconds - fixed, 0.1 * seconds)

    def scaled(stage: StageCosts) -> StageCosts:
        return dataclasses.replace(
            stage,
            forward=without(stage.forward),
            backward_input=without(stage.backward_input),
            backward_weight=tuple(map(without, stage.backward_weight)),
        )

    return dataclasses.replace(costs, stages=tuple(map(scaled, costs.stages)), fixed=costs.fixed + fixed)
