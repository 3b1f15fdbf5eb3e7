"""Compile one form of call for a pipeline: micro-batches of every size that occurs, one schedule for all of them."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ....passes.backward_split_costs import Costs
from ....runtime.schedule.instruction import Schedule
from ....runtime.schedule.text import format_schedule, parse_schedule
from ....runtime.schedule.verify import peak_memory
from ...errors import InputError
from ...passmanager import PassRecord
from ...plan.pipeline.costs import LinkCosts, PipelineCosts
from ...plan.pipeline.forms import closed_form, cut_weights, finishing, inference
from ...plan.pipeline.problem import Problem
from ...plan.pipeline.synthesise import synthesise
from ...program import Program
from ...stages import Pipeline
from ...verify.report import Status, Verdict
from .batch import Batch, rows_of
from .form import Form, make_form, with_decisions
from .options import PipelineOrder, PipelineParallel, parse_bytes
from .rows import propose_rows, with_overhead
from .units import stage_costs

__all__ = ["CompiledPipeline", "PipelineParallel", "compile_pipeline", "parse_bytes"]


@dataclass(frozen=True)
class CompiledPipeline:
    """One form of call, ready to run.

    rows: of every micro-batch; forms: for every number of rows that occurs, the largest first; schedule: what every rank does when;
    how: why that one; costs: predicted, of the largest micro-batch; seconds: wall time of each stage of compilation.
    """

    order: PipelineOrder
    rows: tuple[int, ...]
    forms: tuple[Form, ...]
    schedule: Schedule
    costs: PipelineCosts
    how: str
    seconds: Mapping[str, float]

    @property
    def captured(self) -> Program:
        """The step of a micro-batch of the largest size."""
        return self.forms[0].captured

    @property
    def pipeline(self) -> Pipeline:
        """Its stages."""
        return self.forms[0].pipeline

    @property
    def joined(self) -> Program:
        """All its parts in a row."""
        return self.forms[0].joined

    @property
    def records(self) -> tuple[PassRecord, ...]:
        """What was run and proven, for every size."""
        return tuple(record for form in self.forms for record in form.records)

    def form_of(self, micro_batch: int) -> int:
        """Which of the forms a micro-batch has."""
        return next(i for i, form in enumerate(self.forms) if form.rows == self.rows[micro_batch])

    def prove_again(self, level: str) -> Verdict:
        """Every pass of every form once more; the verdict of the first that is not shown equal, or of the last."""
        verdicts = [form.prove_again(level) for form in self.forms]
        return next((verdict for verdict in verdicts if verdict.status is not Status.EQUAL), verdicts[-1])


def compile_pipeline(order: PipelineOrder, batch: Batch, *, train: bool) -> CompiledPipeline:
    """Compile for batches of the form of ``batch``. train: the whole step with the loss, else the forward alone.

    Raises InputError, CaptureError, PlanError, VerificationError.
    """
    start = time.perf_counter()
    tactic = order.tactic
    rows = rows_of(batch.rows, tactic.microbatches, order.ranks, order.replicas)
    first = _forms(order, batch, (max(rows),), train=train)[max(rows)]
    joined = tactic.joined if train else 1
    costs = _costs(first, joined)
    reason = ""
    if train and tactic.microbatches == "auto":
        rows, reason = _settled_rows(order, *propose_rows(with_overhead(costs, first), rows, order))
    forms = _forms(order, batch, rows, train=train, known=first)
    made = time.perf_counter()
    ordered = tuple(forms[size] for size in sorted(set(rows), reverse=True))
    if ordered[0] is not first:
        costs = _costs(ordered[0], joined)
    schedule, how = _settled_schedule(order, *_schedule(order, costs, rows, train=train))
    if ordered[0].finishes:
        schedule = finishing(schedule)
    seconds = {"capture, passes and proof": made - start, "schedule": time.perf_counter() - made}
    return CompiledPipeline(order, rows, ordered, schedule, costs, how + reason, seconds)


def _settled_rows(order: PipelineOrder, rows: tuple[int, ...], reason: str) -> tuple[tuple[int, ...], str]:
    """Rank 0's choice, where every rank compiles for itself."""
    if order.agreement is None:
        return rows, reason
    found, why = json.loads(order.agreement.settle(json.dumps([rows, reason])))
    return tuple(found), why


def _settled_schedule(order: PipelineOrder, schedule: Schedule, how: str) -> tuple[Schedule, str]:
    """The same for the schedule, which is searched against the clock."""
    if order.agreement is None:
        return schedule, how
    text, why = json.loads(order.agreement.settle(json.dumps([format_schedule(schedule), how])))
    return parse_schedule(text), why


def _forms(order: PipelineOrder, batch: Batch, rows: Sequence[int], *, train: bool, known: Form | None = None) -> dict[int, Form]:
    """The form of every number of rows; the loss of a micro-batch weighs what its rows are of the batch."""
    found = {known.rows: known} if known is not None else {}
    first = known
    for size in sorted(set(rows), reverse=True):
        if size in found:
            continue
        example = batch.cut((size, *([batch.rows - size] if batch.rows > size else [])))[0]
        share = size / batch.rows if order.tactic.reduction == "mean" else 1.0
        found[size] = make_form(order, example, size, share, train=train, like=first)
        if first is None:
            first = found[size] = with_decisions(found[size])
    return found


def _costs(form: Form, joined: int) -> PipelineCosts:
    costs = Costs(form.context.cluster)
    line = LinkCosts(latency=2e-5, send_byte=costs.seconds_per_byte(), receive_byte=costs.seconds_per_byte())
    return PipelineCosts(tuple(stage_costs(stage, costs) for stage in form.pipeline.stages), line, 2e-5, joined)


def _schedule(order: PipelineOrder, costs: PipelineCosts, rows: Sequence[int], *, train: bool) -> tuple[Schedule, str]:
    """The schedule and why. InputError where no schedule keeps the memory limit, naming the least that would do."""
    tactic, ranks, count = order.tactic, order.ranks, len(rows)
    sizes = tuple(size / max(rows) for size in rows) if len(set(rows)) > 1 else ()
    if not train:
        return inference(ranks, count, sizes), "forwards, one micro-batch after the other"
    limit = parse_bytes(tactic.memory)
    if tactic.schedule != "auto":
        known = closed_form(tactic.schedule, ranks, count, sizes=sizes)
        pieces = [stage.pieces for stage in costs.stages]
        known = known if max(pieces) == 1 else cut_weights(known, pieces)
        if limit is not None:
            _check_memory(costs.applied(known), limit, tactic.schedule)
        return known, f"{tactic.schedule}, as asked for"
    limits = (float(limit),) * ranks if limit is not None else ()
    found = synthesise(Problem(costs, tuple(range(ranks)), count, limits, sizes))
    return found.schedule, str(found)


def _check_memory(schedule: Schedule, limit: int, name: str) -> None:
    needed = int(max(peak_memory(schedule)))
    if needed > limit:
        raise InputError(
            f"schedule {name!r} holds {needed:,} bytes of activations on a rank, memory allows {limit:,}: allow {needed:,}, leave "
            'the choice to schedule="auto", or use smaller micro-batches'
        )
