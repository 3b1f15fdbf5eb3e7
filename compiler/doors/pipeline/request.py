"""A compiled pipeline as data for ranks: programs, messages, and how every tensor is shared by the ranks of a stage."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from ....runtime.engines.pipeline import Layout, PipelineRequest, Slot
from ....runtime.program import PortSpec, RankProgram
from ....runtime.schedule.resident import MESSAGES, describe_spec
from ....runtime.schedule.sharing import Sharing, Tie
from ....runtime.schedule.stage import HELD, Port, ValueSpec
from ....runtime.schedule.text import format_schedule
from ...layout import format_placement
from ...plan.pipeline.stage_code import as_factors, rank_program
from ...program import RoleKind, note
from ...stages import ONCE, PartKind, Pipeline, StagePart, StageProgram, Value
from .compile import CompiledPipeline

Programs = dict[int, RankProgram]
"""What every part of a pipeline is for ranks, by the part's id."""

Factored = dict[int, tuple[RankProgram, list[Port]]]
"""The same of parts that give the factors of weight gradients, with the ports of their outputs."""

_FED = (RoleKind.INPUT, RoleKind.SEED)


def parts_of(pipeline: Pipeline) -> list[StagePart]:
    """The parts of all stages."""
    return [part for stage in pipeline.stages for part in stage.parts]


def emitted(compiled: CompiledPipeline) -> Programs:
    """All parts of all forms, made ready for ranks."""
    return {id(part): rank_program(part.program) for form in compiled.forms for part in parts_of(form.pipeline)}


def factored(compiled: CompiledPipeline) -> Factored:
    """The parts that give factors instead of products, where micro-batches share products."""
    if compiled.order.tactic.joined == 1:
        return {}
    parts = [part for form in compiled.forms for part in parts_of(form.pipeline) if part.kind is PartKind.BACKWARD_WEIGHT]
    made = {id(part): as_factors(part.program) for part in parts}
    return {number: (rank_program(program), ports) for number, (program, ports) in made.items()}


def sharing_of(compiled: CompiledPipeline) -> Sharing:
    """What stages tell each other once a step; nothing where they have nothing to do then."""
    main = compiled.forms[0]
    if not main.finishes:
        return Sharing()
    ties = tuple(Tie(group.parameter, group.givers) for group in compiled.pipeline.tied if len(group.givers) > 1)
    scalars = {}
    for stage in compiled.pipeline.stages:
        for part in stage.of(PartKind.SHARE):
            results = zip(part.program.signature.outputs, part.program.results, strict=True)
            scalars[stage.stage] = tuple(_scalar(role.name, node.meta["val"]) for role, node in results if node is not None)
    return Sharing(ties, scalars)


def _scalar(name: str, value: torch.Tensor) -> ValueSpec:
    shape = tuple(int(size) for size in value.shape)
    return ValueSpec(name, shape, value.dtype, (1,) * len(shape))


def final_gradients(compiled: CompiledPipeline, programs: Programs) -> dict[tuple[int, str], Slot]:
    """(stage, parameter) -> a gradient that the caller gets; the shares of several stages are the caller's to add.

    Where part O makes more of what was accumulated, its result; where stages are tied and O runs, only that of the first.
    """
    if compiled.order.optimizer is not None:
        return {}
    shared = {tie.parameter: tie.givers[0] for tie in sharing_of(compiled).ties}
    found: dict[tuple[int, str], Slot] = {}
    for part, port in _outputs(compiled, programs, "gradient"):
        if port.name not in shared or shared[port.name] == part.stage:
            found[part.stage, port.name] = _slot(port)  # part O comes last
    return found


def held_layouts(compiled: CompiledPipeline, programs: Programs) -> dict[Port, Layout]:
    """How ranks of a stage share every tensor that is bound; of a mesh without other axes, no layout."""
    layouts: dict[Port, Layout] = {}
    for form in compiled.forms:
        for part in parts_of(form.pipeline):
            for port in programs[id(part)].inputs:
                if port.kind in HELD:
                    layouts[Port(port.kind, port.name)] = _layout(compiled, port)
    return layouts


def updated_ports(compiled: CompiledPipeline) -> set[str]:
    """Names of parameters, buffers and states that a step gives new values."""
    roles = [role for part in parts_of(compiled.pipeline) for role in part.program.signature.outputs]
    return {role.name for role in roles if role.kind is RoleKind.UPDATE}


def fed(compiled: CompiledPipeline) -> list[dict[str, Slot]]:
    """Per micro-batch, its inputs and seeds."""
    rows = []
    for m in range(len(compiled.rows)):
        captured = compiled.forms[compiled.form_of(m)].captured
        layouts = _input_layouts(compiled, m)
        inputs = zip(captured.signature.inputs, captured.placeholders, strict=True)
        rows.append({role.name: _fed_slot(node.meta["val"], layouts[role.name]) for role, node in inputs if role.kind in _FED})
    return rows


def _input_layouts(compiled: CompiledPipeline, m: int) -> dict[str, Layout]:
    """Name of an input of a micro-batch -> how the ranks of a stage share it; empty where a stage is one rank."""
    lowered = compiled.forms[compiled.form_of(m)].lowered
    found: dict[str, Layout] = {}
    for role, node in zip(lowered.signature.inputs, lowered.placeholders, strict=True):
        layouts = note(node).layouts if lowered.mesh is not None else None
        known = layouts[0] if layouts is not None else None
        if role.kind in _FED:
            found[role.name] = () if known is None else tuple(map(format_placement, known))
    return found


def _fed_slot(value: torch.Tensor, layout: Layout) -> Slot:
    return Slot(tuple(int(size) for size in value.shape), value.dtype, layout)


def request_of(compiled: CompiledPipeline, programs: Programs) -> PipelineRequest:
    """Everything that local ranks need to know."""
    forms = compiled.forms
    code_of = [compiled.form_of(m) for m in range(len(compiled.rows))]
    sharing, shared = sharing_of(compiled), factored(compiled)
    outputs = []
    for number in code_of:
        own = {id(part) for part in parts_of(forms[number].pipeline)}
        found = _outputs(compiled, programs, "output")
        outputs.append({(part.stage, port.name): _slot(port) for part, port in found if id(part) in own})
    return PipelineRequest(
        axis=compiled.order.tactic.axis,
        schedule=format_schedule(compiled.schedule),
        stages=[
            [_stage(form.pipeline.stages[s], programs, shared) for form in forms] for s in range(len(compiled.pipeline.stages))
        ],
        code_of=code_of,
        sharing={
            "ties": [[tie.parameter, list(tie.givers)] for tie in sharing.ties],
            "scalars": {str(stage): [describe_spec(spec) for spec in specs] for stage, specs in (sharing.scalars or {}).items()},
        },
        held=held_layouts(compiled, programs),
        given=fed(compiled),
        outputs=outputs,
        gradients=final_gradients(compiled, programs),
        updates=bool(updated_ports(compiled)),
        joined=compiled.order.tactic.joined,
    )


def _outputs(compiled: CompiledPipeline, programs: Programs, kind: str) -> Iterator[tuple[StagePart, PortSpec]]:
    """Every output of a kind, with the part that gives it."""
    for form in compiled.forms:
        for part in parts_of(form.pipeline):
            for port in programs[id(part)].outputs:
                if port.kind == kind:
                    yield part, port if form.lowered.mesh is not None else _without_layout(port)


def _without_layout(port: PortSpec) -> PortSpec:
    return PortSpec(port.kind, port.name, port.shape, port.dtype, ())


def _layout(compiled: CompiledPipeline, port: PortSpec) -> Layout:
    return port.layout if compiled.order.inner is not None else ()


def _slot(port: PortSpec) -> Slot:
    return Slot(tuple(port.shape), getattr(torch, port.dtype), tuple(port.layout))


def _stage(stage: StageProgram, programs: Programs, shared: Factored) -> dict[str, Any]:
    parts = {kind: [_part(part, programs, shared) for part in stage.of(kind)] for kind in PartKind}
    messages = {name: [_value(value) for value in getattr(stage, name)] for name in MESSAGES}

    def only(kind: PartKind) -> dict[str, Any] | None:
        return parts[kind][0] if parts[kind] else None

    return {
        "stage": stage.stage,
        "forward": only(PartKind.FORWARD),
        "backward": only(PartKind.BACKWARD_INPUT),
        "weights": parts[PartKind.BACKWARD_WEIGHT],
        "share": only(PartKind.SHARE),
        "optimizer": only(PartKind.OPTIMIZER),
        **messages,
    }


def _value(value: Value) -> list[Any]:
    return describe_spec(ValueSpec(value.name, value.shape, value.dtype, value.stride))


def _part(part: StagePart, programs: Programs, shared: Factored) -> dict[str, Any]:
    signature = part.program.signature
    ports = [Port(role.kind.value, role.name) for role in signature.outputs]
    program, outputs = shared.get(id(part), (programs[id(part)], ports))
    return {
        "program": program.to_json(),
        "inputs": [[role.kind.value, role.name] for role in signature.inputs],
        "outputs": [list(port) for port in outputs],
        "drops": list(part.drops) if part.kind not in ONCE else [],
    }
