"""Cut a step into the programs of pipeline stages (GPipe, arXiv 1811.06965; PipeDream, arXiv 1806.03377; 2BP, arXiv 2405.18047).

    step = O . (W_0 | .. | W_p) . I_0 . .. . I_p . F_p . .. . F_0

A partition says which stage each forward node belongs to; the rest follows (``pipeline_place``). What passes between parts, and in
which message, is read off the cut graph. Joining the parts again in the order above gives a program that must equal the step
that was cut: this is what the pass ``CutStages`` returns, so the pass manager proves every decomposition that is used.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import torch

from ..compiler.contract import Context, Contract, Equal
from ..compiler.errors import InputError
from ..compiler.program import Decision, Phase, Program, RoleKind, annotate, copy_program, note
from ..compiler.stages import Pipeline
from .pipeline_drafts import draft_parts, gradients_of
from .pipeline_join import join
from .pipeline_messages import assemble
from .pipeline_place import place
from .unordered_sums import unordered_decisions

aten = torch.ops.aten


@dataclass(frozen=True)
class CutStages:
    """Cut a program into stages and join it again: the joined program is what runs, in one possible order.

    forward: name of a forward node -> stage; pieces: name of a node of a weight gradient -> piece (0 where it is not named).
    """

    name: ClassVar[str] = "pipeline"
    contract: ClassVar[Contract] = Equal()
    forward: Mapping[str, int] = field(default_factory=dict, hash=False)
    pieces: Mapping[str, int] = field(default_factory=dict, hash=False)

    def __call__(self, program: Program, context: Context) -> Program:  # noqa: ARG002
        """The parts of all stages in a row, with a Decision for each boundary."""
        return join(cut_stages(program, self.forward, self.pieces))


def cut_stages(program: Program, forward: Mapping[str, int], pieces: Mapping[str, int] | None = None) -> Pipeline:
    """The stage programs of a step (see ``CutStages`` for the arguments).

    The program's phases say which part a node belongs to: run ``BackwardSplit`` first, or there are no W parts. Raises
    InputError for a partition that cannot be, for a model that changes its inputs, and for an optimizer that couples parameters.
    """
    _check(program)
    ready, _ = copy_program(program)
    _keep_changed_buffers(ready)
    gradients = gradients_of(ready)
    placement = place(ready, forward, gradients)
    drafts = draft_parts(ready, placement, gradients, pieces or {})
    pipeline = assemble(ready, drafts, placement.count)
    return dataclasses.replace(
        pipeline, program=program.decided(*_decisions(pipeline), *unordered_decisions(program, CutStages.name))
    )


def _check(program: Program) -> None:
    """Refuse what a pipeline cannot carry."""
    inputs, updates = program.signature.inputs_of(RoleKind.INPUT), program.signature.outputs_of(RoleKind.UPDATE)
    for name in updates:
        if name in inputs:
            raise InputError(f"the model writes into its input {name}; a pipeline cannot hand that back: pass a copy and return it")


def _keep_changed_buffers(program: Program) -> None:
    """Let the backward read a buffer that the forward changes as it was in that micro-batch's forward."""
    changed = program.signature.outputs_of(RoleKind.UPDATE)
    first = next((node for node in program.nodes if node.op not in ("placeholder",)), None)
    for node in program.placeholders:
        role = note(node).role
        if role is None or role.kind is not RoleKind.BUFFER or role.name not in changed or first is None:
            continue
        late = [user for user in node.users if user.op == "call_function" and note(user).phase is not Phase.FORWARD]
        readers = [user for user in node.users if user.op == "call_function" and note(user).phase is Phase.FORWARD]
        if late:
            with program.graph.graph.inserting_before(readers[0] if readers else first):
                kept = program.graph.graph.call_function(aten.clone.default, (node,))
            kept.meta.update(node.meta)
            annotate(kept, role=None, phase=Phase.FORWARD, added_by=CutStages.name)
            for user in late:
                user.replace_input_with(node, kept)


def _decisions(pipeline: Pipeline) -> list[Decision]:
    """What crosses each boundary, and which parameters are shared."""
    found = []
    for stage in pipeline.stages[:-1]:
        back = pipeline.stages[stage.stage + 1].sends_back
        reason = (
            f"stage {stage.stage} sends {len(stage.sends)} values ({sum(v.bytes for v in stage.sends):,} bytes) on and "
            f"gets {len(back)} ({sum(v.bytes for v in back):,} bytes) back, for each micro-batch"
        )
        found.append(Decision(CutStages.name, f"stage {stage.stage}", applied=True, reason=reason))
    for group in pipeline.tied:
        where = ", ".join(map(str, group.stages))
        reason = f"{group.parameter} is read by stages {where}: each sums its own gradient, they are added once a step"
        found.append(Decision(CutStages.name, group.parameter, applied=True, reason=reason))
    return found
