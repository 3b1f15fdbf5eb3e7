"""All stages of a pipeline in this process where ranks share each of them: every part runs for all ranks of its stage at once."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import torch

from ....runtime.executors.lockstep import lockstep_executor
from ....runtime.mesh import Mesh
from ....runtime.pieces import cut
from ....runtime.program import RankProgram
from ....runtime.schedule.group import Row, StageGroup, Together
from ....runtime.schedule.stage import HELD, Part, Port, StageCode, StageState
from ...plan.pipeline.stage_code import assemble
from ...program import RoleKind
from ...stages import StagePart, StageProgram
from .compile import CompiledPipeline
from .request import Factored, Programs, factored, fed, held_layouts, updated_ports


def groups_of(compiled: CompiledPipeline, programs: Programs, tensors: Mapping[Port, torch.Tensor]) -> list[StageGroup]:
    """One group per stage. tensors: whole parameters, buffers, states and constants; pieces of them are views."""
    inner = compiled.order.inner
    assert inner is not None, "a mesh of the pipeline's axis alone needs no groups"
    layouts = held_layouts(compiled, programs)
    pieces = {port: cut(tensor.detach(), layouts[port], inner) for port, tensor in tensors.items() if port in layouts}
    given = {name: slot.layout for name, slot in fed(compiled)[0].items()}
    return [_group(compiled, programs, stage, pieces, given) for stage in range(len(compiled.pipeline.stages))]


def _group(
    compiled: CompiledPipeline,
    programs: Programs,
    number: int,
    pieces: Mapping[Port, Sequence[torch.Tensor]],
    given: Mapping[str, tuple[str, ...]],
) -> StageGroup:
    inner = compiled.order.inner
    assert inner is not None
    together: dict[int, Together] = {}
    stages = [form.pipeline.stages[number] for form in compiled.forms]
    shared = factored(compiled)
    codes = [_code(stage, programs, shared, together) for stage in stages]
    kinds = [role for stage in stages for part in stage.parts for role in part.program.signature.inputs]
    ports = {Port(role.kind.value, role.name) for role in kinds if role.kind.value in HELD}
    changed = {
        role.name
        for stage in stages
        for part in stage.parts
        for role in part.program.signature.outputs
        if role.kind is RoleKind.UPDATE
    } & updated_ports(compiled)
    held = {port: found for port, found in pieces.items() if port in ports or port.name in changed}
    variants = {m: codes[form] for m in range(len(compiled.rows)) if (form := compiled.form_of(m))}
    members = [
        StageState(
            codes[0], {port: found[rank] for port, found in held.items()}, variants=variants, joined=compiled.order.tactic.joined
        )
        for rank in range(inner.size)
    ]
    returned = {
        port.name: tuple(port.layout)
        for part in stages[0].parts
        for port in programs[id(part)].outputs
        if port.kind == RoleKind.OUTPUT.value
    }
    wide = {m: _for_all(code, inner) for m, code in variants.items()}
    return StageGroup(_for_all(codes[0], inner), inner, members, together, given, returned, wide)


def _code(stage: StageProgram, programs: Programs, shared: Factored, together: dict[int, Together]) -> StageCode:
    def part_of(part: StagePart) -> Part:
        signature = part.program.signature
        ports = [Port(role.kind.value, role.name) for role in signature.outputs]
        program, outputs = shared.get(id(part), (programs[id(part)], ports))
        made = Part(
            _alone,
            tuple(Port(role.kind.value, role.name) for role in signature.inputs),
            tuple(outputs),
            part.drops,
        )
        together[id(made)] = _run(program)
        return made

    return assemble(stage, part_of)


def _alone(_: Row) -> Row:
    raise AssertionError("a part of a group runs for all its ranks together")


def _for_all(code: StageCode, inner: Mesh) -> StageCode:
    """The code of one rank with the messages of all."""
    return dataclasses.replace(
        code,
        receives=code.receives * inner.size,
        sends=code.sends * inner.size,
        receives_back=code.receives_back * inner.size,
        sends_back=code.sends_back * inner.size,
    )


def _run(program: RankProgram) -> Together:
    """A program on all ranks of its mesh; results of each in the order of its output ports."""
    if not program.outputs:  # a stage that only hands values on
        return lambda rows: [[] for _ in rows]
    executor = lockstep_executor(program)
    segment = program.segments[0].name
    order = program.segment_outputs(segment)

    def run(rows: Sequence[Row]) -> list[list[torch.Tensor | None]]:
        results = executor.run(executor.open(rows), segment)  # type: ignore[arg-type]  # either kind, with its own kind of frame
        found: list[list[torch.Tensor | None]] = [[None] * len(program.outputs) for _ in rows]
        for row, mine in zip(results, found, strict=True):
            for port, value in zip(order, row, strict=True):
                mine[port] = value
        return found

    return run
