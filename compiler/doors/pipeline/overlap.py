"""Tile loops inside the stages of a pipeline: in every part of a stage that ranks of other axes run together.

A part is a lowered program of its own, with the values of other parts as inputs, so the pass that makes loops is run on each, and
its result proven against the part as it was: a loop never reaches beyond what one instruction of the schedule runs.
"""

from __future__ import annotations

import dataclasses

from ....passes.tiles.fuse import FuseTiles
from ...contract import Context
from ...passmanager import PassRecord, run_passes
from ...program import Decision
from ...stages import Pipeline, StagePart, StageProgram
from ..overlap import OverlapTiles


def with_tile_loops(
    pipeline: Pipeline, tactic: OverlapTiles, context: Context, level: str | None
) -> tuple[Pipeline, tuple[PassRecord, ...], tuple[Decision, ...]]:
    """The stages with their loops, the proofs of the parts that have any, and what was decided about every collective.

    Raises VerificationError where a part with loops is not shown to be the part without.
    """
    records: list[PassRecord] = []
    decisions: list[Decision] = []
    if pipeline.program.mesh is None:
        reason = "every stage has one rank: nothing travels inside it, and what travels between stages is the schedule's to hide"
        return pipeline, (), (Decision(FuseTiles.name, "", applied=False, reason=reason),)
    if tactic.nano_batch:
        reason = "the micro-batches of a pipeline are not cut in halves once more: another of them fills the time"
        decisions.append(Decision("nano-batch", "", applied=False, reason=reason))

    def looped(part: StagePart) -> StagePart:
        program, found = run_passes(part.program, (tactic.loops(),), context, level=level)
        said = program.decisions[len(part.program.decisions) :]
        decisions.extend(dataclasses.replace(one, reason=f"stage {part.stage}, part {part}: {one.reason}") for one in said)
        if not any(one.applied for one in said):
            return part
        records.extend(found)
        return dataclasses.replace(part, program=program)

    def of_stage(stage: StageProgram) -> StageProgram:
        return dataclasses.replace(stage, parts=tuple(map(looped, stage.parts)))

    made = dataclasses.replace(pipeline, stages=tuple(map(of_stage, pipeline.stages)))
    return made, tuple(records), tuple(decisions)
