"""A pipeline for micro-batches of one size: captured, planned on the axes beside the pipeline's, split, cut into stages, proven."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.fx as fx

from ....passes.backward_split_costs import Costs
from ....passes.joined_micro_batches import SMALL, accumulation, decisions_of, joining, products_of
from ....passes.pipeline import CutStages, cut_stages
from ....passes.shard import Shard
from ....passes.sum_in_buckets import SumInBuckets
from ....passes.sum_once import SumOnce
from ....runtime.mesh import Mesh
from ...capture.front import Example
from ...capture.step import scalar_loss, with_updates
from ...capture.trace import Aim
from ...contract import Context, Pass
from ...cost.cluster import Cluster
from ...errors import InputError
from ...layout import local_shape, local_size, padding
from ...passmanager import PassRecord, run_passes
from ...plan.pipeline.forms import FOLDED
from ...plan.plan import Plan
from ...plan.planner import plan
from ...program import Decision, Program, RoleKind, note, producer
from ...retrace import Retrace
from ...rules.table import RuleTable
from ...stages import ONCE, Pipeline
from ...verify.report import Status, Verdict
from ..hall import smaller_programs
from ..overlap import OverlapTiles
from .batch import CallArgs
from .options import PipelineOrder
from .overlap import with_tile_loops
from .units import partition, partition_as_before, weight_pieces


@dataclass(frozen=True)
class Form:
    """Micro-batches of one size.

    captured: one micro-batch's step; lowered: for one rank of a stage, with its backward split; pipeline: its stages; joined: all
    parts in a row, which was proven equal; passes: those that were run; forward, pieces: where nodes of ``lowered`` are; overlap:
    how loops of the parts of stages were made.
    """

    rows: int
    captured: Program
    lowered: Program
    pipeline: Pipeline
    joined: Program
    records: tuple[PassRecord, ...]
    passes: tuple[Pass, ...]
    context: Context
    forward: Mapping[str, int]
    pieces: Mapping[str, int]
    overlap: OverlapTiles | None = None

    @property
    def finishes(self) -> bool:
        """Whether stages have something to do once a step."""
        return any(part.kind in ONCE for stage in self.pipeline.stages for part in stage.parts)

    def prove_again(self, level: str) -> Verdict:
        """Every pass once more, proven to another level; the verdict of the first that is not shown equal, or of the last."""
        _, records = run_passes(self.captured, self.passes, self.context, level=level)
        if self.overlap is not None:
            stages = cut_stages(self.lowered, dict(self.forward), dict(self.pieces))
            records = (*records, *with_tile_loops(stages, self.overlap, self.context, level)[1])
        verdicts = [record.verdict for record in records]
        return next((verdict for verdict in verdicts if verdict.status is not Status.EQUAL), verdicts[-1])


def make_form(order: PipelineOrder, call: CallArgs, rows: int, share: float, *, train: bool, like: Form | None = None) -> Form:
    """Compile for micro-batches of the form of ``call``.

    share: what the loss is multiplied by. train: the whole step, else the forward alone. like: a form of another size, whose plan,
    split and stages are taken over. Raises InputError, CaptureError, PlanError, VerificationError.
    """
    program = _capture(order, call, share, train=train)
    if like is not None:
        _check_alike(like, program, rows)
    ready, rewritten = _rewritten(order, program, call, share, train=train)
    context = _context(order, ready, like)
    early: tuple[Pass, ...] = (Shard(),) if order.inner is not None else ()
    if train:
        early = (*early, order.tactic.split, SumOnce()) if order.inner is not None else (order.tactic.split,)
    lowered, records = run_passes(ready, early, context, level=order.level)
    records = (*rewritten, *records)
    costs = Costs(context.cluster)
    if like is None:
        forward = _partition(order, lowered, stage_count(order, train=train), costs)
        wanted = order.tactic.pieces if train else 1
        pieces = weight_pieces(lowered, forward, wanted, costs) if wanted > 1 else {}
    else:
        forward, pieces = dict(like.forward), dict(like.pieces)
    if train and order.inner is not None and order.tactic.buckets:
        joint = SumInBuckets(_owners(cut_stages(lowered, forward, pieces)))
        lowered, more = run_passes(lowered, (joint,), context, level=order.level)
        early, records = (*early, joint), (*records, *more)
    cut = CutStages(forward, pieces)
    joined, cut_records = run_passes(lowered, (cut,), context, level=order.level)
    pipeline = cut_stages(lowered, forward, pieces)
    if order.inner is not None:
        _check_even(pipeline, order.inner, rows)
    if train and order.tactic.joined > 1:
        proof, said = _joined_products(order, pipeline, context)
        records, joined = (*records, *proof), joined.decided(*said)
    if order.overlap is not None:
        pipeline, proof, said = with_tile_loops(pipeline, order.overlap, context, order.level)
        records, joined = (*records, *proof), joined.decided(*said)
    passes = (*order.rewrites, *early, cut)
    records = (*records, *cut_records)
    return Form(rows, program, lowered, pipeline, joined, records, passes, context, forward, pieces, order.overlap)


def _joined_products(
    order: PipelineOrder, pipeline: Pipeline, context: Context
) -> tuple[tuple[PassRecord, ...], tuple[Decision, ...]]:
    """The products of several micro-batches made as one: the proof, and what is said of every weight."""
    count = order.tactic.joined
    if not any(products_of(pipeline)):
        return (), decisions_of(pipeline, count, context)
    _, records = run_passes(accumulation("a weight", SMALL, count), (joining(),), context, level=order.level)
    return records, decisions_of(pipeline, count, context)


def _owners(pipeline: Pipeline) -> dict[str, int]:
    """Parameter -> the stage that finishes its gradient."""
    return {
        role.name: stage.stage
        for stage in pipeline.stages
        for part in stage.parts
        if part.kind in ONCE
        for role in part.program.signature.inputs
        if role.kind is RoleKind.GRADIENT
    }


def _partition(order: PipelineOrder, program: Program, stages: int, costs: Costs) -> dict[str, int]:
    homes = order.agreement.homes if order.agreement is not None else {}
    if not homes:
        return partition(program, stages, costs)
    settled = 1 + max(stage for stages in homes.values() for stage in stages)
    forward = partition_as_before(program, homes)
    if stages != settled or set(forward.values()) != set(range(stages)):
        raise InputError(
            f"the first form of call has put the parameters on {settled} stages, this one has {stages} (training with schedule "
            f"{order.tactic.schedule!r} and forwards alone may differ): use a schedule of one stage per rank, or load a checkpoint "
            "into the plain model for this call"
        )
    return forward


def stage_count(order: PipelineOrder, *, train: bool) -> int:
    """Stages of the whole pipeline: two a rank for schedules that want them."""
    return 2 * order.ranks if train and order.tactic.schedule in (*FOLDED, "interleaved") else order.ranks


def _capture(order: PipelineOrder, call: CallArgs, share: float, *, train: bool) -> Program:
    example = Example.of(order.model, *call)
    if not train:
        return example.capture(Aim(train=False))

    def loss_of(result: object) -> torch.Tensor:
        loss = scalar_loss(result, order.tactic.loss)
        return loss if share == 1.0 else loss * share

    program = example.capture(Aim(train=True, loss_of=loss_of))
    if order.optimizer is None:
        return program
    return with_updates(program, order.model, order.optimizer, clip_norm=order.clip_norm, keep_gradients=True)


def _rewritten(
    order: PipelineOrder, program: Program, call: CallArgs, share: float, *, train: bool
) -> tuple[Program, tuple[PassRecord, ...]]:
    """The step after the rewrites that precede planning, proven at small sizes."""
    if not order.rewrites:
        return program, ()
    mesh = order.inner or order.mesh
    retrace = Retrace(order.model, *call, step=lambda args, kwargs: _capture(order, (args, kwargs), share, train=train))
    smaller = smaller_programs(program, retrace, mesh)
    context = Context(mesh, RuleTable(), _cluster(order))
    return run_passes(program, order.rewrites, context, level=order.level, retrace=smaller)


def _cluster(order: PipelineOrder) -> Cluster:
    """What the machine costs; where every rank compiles for itself, what rank 0 believes."""
    return Cluster.current() if order.agreement is None else order.agreement.cluster()


def _context(order: PipelineOrder, program: Program, like: Form | None) -> Context:
    cluster = _cluster(order)
    rules = RuleTable()
    if order.inner is None:
        return Context(Mesh(((order.tactic.axis, order.ranks),)), rules, cluster)
    chosen: Plan | None = like.context.plan if like is not None else None
    if chosen is None:
        chosen = plan(program, order.inner, rules, cluster, order.placing, outputs="any", gradients="like-params")
    return Context(order.inner, rules, cluster, chosen)


def _check_alike(like: Form, program: Program, rows: int) -> None:
    """Micro-batches of all sizes must run the same ops, or no plan and no partition would fit them all."""
    for one, other in itertools.zip_longest(like.captured.nodes, program.nodes):
        if one is None or other is None or (one.name, one.target) != (other.name, other.target):
            place = other if other is not None else one
            raise InputError(
                f"micro-batches of {like.rows} and of {rows} rows do not run the same ops (first at {place.name}, from "
                f"{note(place).source or 'unknown'}): give all micro-batches the same number of rows, or more than one"
            )


def _check_even(pipeline: Pipeline, inner: Mesh, rows: int) -> None:
    """What passes between stages has one shape on all ranks: messages say no more."""
    uneven = any(node.target in (local_size, padding) for node in pipeline.program.nodes)
    for stage in pipeline.stages:
        wanted = {value.name for value in (*stage.sends, *stage.sends_back)}
        for part in stage.parts:
            for role, node in zip(part.program.signature.outputs, part.program.results, strict=True):
                if node is None or role.name not in wanted:
                    continue
                found = {_piece(node, inner, rank) for rank in range(inner.size)}
                if len(found) > 1 or (uneven and None in found):
                    shapes = " and ".join(str(list(shape)) for shape in sorted(shape for shape in found if shape is not None))
                    raise InputError(
                        f"{role.name} (from {note(node).source or 'unknown'}) leaves stage {stage.stage} in pieces of different "
                        f"shapes, {shapes or 'not known'}, over {inner}: with {rows} rows in a micro-batch, make every dimension "
                        "that is cut divisible by its axis"
                    )


def _piece(node: fx.Node, inner: Mesh, rank: int) -> tuple[int, ...] | None:
    """Shape of a rank's piece, None where the note does not say how the value lies."""
    source, index = producer(node)
    known = note(source)
    if known.layouts is None or known.global_shapes is None:
        return None
    layout, shape = known.layouts[index], known.global_shapes[index]
    return None if layout is None or shape is None else local_shape(shape, layout, inner, rank)


def with_decisions(form: Form) -> Form:
    """The form with what the plan decided among the decisions of the joined program, for the report."""
    chosen = form.context.plan
    if chosen is None:
        return form
    return dataclasses.replace(form, joined=form.joined.decided(*chosen.decisions))
