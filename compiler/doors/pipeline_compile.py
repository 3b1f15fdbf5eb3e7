"""Compile one form of call for a pipeline: capture a micro-batch's step, split its backward, cut it into stages, prove,
schedule."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ...passes.backward_split import BackwardSplit
from ...passes.backward_split_costs import Costs
from ...passes.pipeline import CutStages, cut_stages
from ...runtime.mesh import Mesh
from ...runtime.schedule.instruction import Schedule
from ..capture.front import Example
from ..capture.step import scalar_loss
from ..capture.trace import Aim
from ..contract import Context, Pass
from ..cost.cluster import Cluster
from ..errors import InputError
from ..passmanager import PassRecord, run_passes
from ..plan.pipeline.costs import LinkCosts, PipelineCosts
from ..plan.pipeline.forms import FOLDED, NAMES, closed_form, cut_weights, inference
from ..plan.pipeline.problem import Problem
from ..plan.pipeline.synthesise import synthesise
from ..plan.tactics import RewriteTactic
from ..program import Program
from ..rules.table import RuleTable
from ..stages import Pipeline
from ..verify.report import Status, Verdict
from .pipeline_units import partition, stage_costs, weight_pieces


@dataclass(frozen=True)
class PipelineParallel(RewriteTactic):
    """Stages of the model on the ranks of one mesh axis, fed with micro-batches.

    axis: of the mesh. microbatches: how many a batch is cut into, "auto" for twice the ranks where that divides it. schedule:
    "auto" searches for one that suits the predicted costs, or the name of a known one ("gpipe", "1f1b", "1f1b-2bp", "zb-h1", ...).
    pieces: into how many parts a stage's weight gradients are cut, at most; more of them fill smaller gaps.
    memory: most bytes of activations a rank may hold ("8GB"), None for no limit. loss: from the model's result to a scalar, None
    where the model returns the loss itself. reduction: "mean" where the loss of a batch is the mean of those of its parts, else
    "sum". split: options of the backward split.
    """

    axis: str = "pp"
    microbatches: int | str = "auto"
    schedule: str = "auto"
    pieces: int = 1
    memory: int | str | None = None
    loss: Callable[[Any], torch.Tensor] | None = None
    reduction: str = "mean"
    split: BackwardSplit = field(default_factory=BackwardSplit)

    def __post_init__(self) -> None:
        wrong = isinstance(self.microbatches, str) and self.microbatches != "auto"
        if wrong or (isinstance(self.microbatches, int) and self.microbatches < 1):
            raise InputError(f'microbatches must be "auto" or a positive number; found {self.microbatches!r}')
        if self.schedule != "auto" and self.schedule not in NAMES:
            raise InputError(f'schedule must be "auto" or one of {", ".join(NAMES)}; found {self.schedule!r}')
        if self.pieces < 1:
            raise InputError(f"pieces must be a positive number; found {self.pieces}")
        if self.reduction not in ("mean", "sum"):
            raise InputError(f'reduction must be "mean" or "sum"; found {self.reduction!r}')
        parse_bytes(self.memory)


@dataclass(frozen=True)
class CompiledPipeline:
    """One form of call, ready to run.

    captured: one micro-batch's step; pipeline: its stages; joined: all parts in a row, which was proven equal; schedule: what every
    rank does; how: why that one; costs: predicted; seconds: wall time of each stage of compilation; passes: those that were run.
    """

    captured: Program
    pipeline: Pipeline
    joined: Program
    schedule: Schedule
    records: tuple[PassRecord, ...]
    costs: PipelineCosts
    how: str
    seconds: Mapping[str, float]
    passes: tuple[Pass, ...]
    context: Context

    def prove_again(self, level: str) -> Verdict:
        """Every pass once more, proven to another level; the verdict of the first that is not shown equal, or of the last."""
        _, records = run_passes(self.captured, self.passes, self.context, level=level)
        verdicts = [record.verdict for record in records]
        return next((verdict for verdict in verdicts if verdict.status is not Status.EQUAL), verdicts[-1])


def compile_pipeline(
    model: nn.Module,
    call: tuple[tuple[Any, ...], dict[str, Any]],
    tactic: PipelineParallel,
    ranks: int,
    microbatches: int,
    *,
    train: bool,
    level: str | None = None,
) -> CompiledPipeline:
    """Compile for one micro-batch of the form of ``call`` (args, kwargs).

    train: the whole step with the loss, else the forward alone. Raises InputError, CaptureError, VerificationError.
    """
    start = time.perf_counter()
    program = _capture(model, call, tactic, microbatches, train=train)
    captured = time.perf_counter()
    context = Context(Mesh(((tactic.axis, ranks),)), RuleTable(), Cluster.current())
    costs = Costs(context.cluster)
    early: tuple[Pass, ...] = (tactic.split,) if train else ()
    split, records = run_passes(program, early, context, level=level)
    stages = 2 * ranks if train and tactic.schedule in (*FOLDED, "interleaved") else ranks
    forward = partition(split, stages, costs)
    pieces = weight_pieces(split, forward, tactic.pieces, costs) if train and tactic.pieces > 1 else {}
    cut = CutStages(forward, pieces)
    joined, cut_records = run_passes(split, (cut,), context, level=level)
    pipeline = cut_stages(split, forward, pieces)
    proven = time.perf_counter()
    line = LinkCosts(latency=2e-5, send_byte=costs.seconds_per_byte(), receive_byte=costs.seconds_per_byte())
    known = PipelineCosts(tuple(stage_costs(stage, costs) for stage in pipeline.stages), line, 2e-5)
    schedule, how = _schedule(tactic, known, ranks, microbatches, train=train)
    seconds = {"capture": captured - start, "passes and proof": proven - captured, "schedule": time.perf_counter() - proven}
    passes = (*early, cut)
    return CompiledPipeline(program, pipeline, joined, schedule, (*records, *cut_records), known, how, seconds, passes, context)


def _capture(
    model: nn.Module, call: tuple[tuple[Any, ...], dict[str, Any]], tactic: PipelineParallel, microbatches: int, *, train: bool
) -> Program:
    example = Example.of(model, *call)
    if not train:
        return example.capture(Aim(train=False))
    share = 1.0 / microbatches if tactic.reduction == "mean" else 1.0

    def loss_of(result: Any) -> torch.Tensor:
        loss = scalar_loss(result, tactic.loss)
        return loss if share == 1.0 else loss * share

    return example.capture(Aim(train=True, loss_of=loss_of))


def _schedule(tactic: PipelineParallel, costs: PipelineCosts, ranks: int, count: int, *, train: bool) -> tuple[Schedule, str]:
    """The schedule and why."""
    if not train:
        return inference(ranks, count), "forwards, one micro-batch after the other"
    if tactic.schedule != "auto":
        known = closed_form(tactic.schedule, ranks, count)
        pieces = [stage.pieces for stage in costs.stages]
        return (known if max(pieces) == 1 else cut_weights(known, pieces)), f"{tactic.schedule}, as asked for"
    limit = parse_bytes(tactic.memory)
    limits = (float(limit),) * ranks if limit is not None else ()
    found = synthesise(Problem(costs, tuple(range(ranks)), count, limits))
    return found.schedule, str(found)


def parse_bytes(text: int | str | None) -> int | None:
    """``"8GB"`` or ``"500 MB"`` as bytes. InputError for what is no size."""
    if text is None or isinstance(text, int):
        return text
    units = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
    number = text.strip().rstrip("KMGTIBkmgtib ")
    unit = text.strip()[len(number) :].strip().upper() or "B"
    try:
        return int(float(number) * units[unit])
    except (ValueError, KeyError):
        raise InputError(f'memory must be a number of bytes or a size such as "8GB"; found {text!r}') from None
