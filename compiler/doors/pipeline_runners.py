"""Who runs the stages of a pipeline: this process, all in turns (engine ``sim``), or a process for every rank (``local``)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
import torch.fx as fx

from ...runtime.engines.local import LocalEngine
from ...runtime.engines.pipeline import LocalPipeline, PipelineRequest, Shape
from ...runtime.schedule.loopback import LoopbackPipeline
from ...runtime.schedule.resident import describe_spec
from ...runtime.schedule.stage import Port, ValueSpec
from ...runtime.schedule.text import format_schedule
from ..emit import emit
from ..plan.pipeline.stage_code import states_of
from ..program import RoleKind
from ..stages import PartKind, StagePart, StageProgram, Value
from .pipeline_compile import CompiledPipeline

Tensors = Mapping[Port, torch.Tensor]
Outputs = list[dict[str, torch.Tensor]]


class Runner(Protocol):
    """Runs one compiled pipeline, step after step."""

    def step(self, given: Sequence[Mapping[str, torch.Tensor]]) -> Outputs:
        """One step. given: per micro-batch, inputs by name. Returns the outputs of each micro-batch by name. Changed buffers are
        written into the tensors that were bound; gradients wait to be taken."""
        ...

    def gradients(self) -> dict[str, torch.Tensor]:
        """The summed gradients of the latest step by parameter; valid until the next one."""
        ...

    def close(self) -> None:
        """Free everything."""
        ...


class LoopbackRunner:
    """All stages in this process, taking turns wherever one waits: exact and deterministic, for any number of stages."""

    def __init__(self, compiled: CompiledPipeline, tensors: Tensors) -> None:
        self._tensors = dict(tensors)
        self._states = states_of(compiled.pipeline, self._tensors)
        self._pipeline = LoopbackPipeline(compiled.schedule, self._states)

    def step(self, given: Sequence[Mapping[str, torch.Tensor]]) -> Outputs:
        """See ``Runner``."""
        outputs = self._pipeline.step(given)
        with torch.no_grad():
            for state in self._states:
                for port, value in state.held.items():
                    bound = self._tensors.get(port)
                    if bound is not None and value is not bound:  # a stage replaces what it updates
                        bound.copy_(value)
                        state.held[port] = bound
        return outputs

    def gradients(self) -> dict[str, torch.Tensor]:
        """See ``Runner``. What several stages contribute to is added, the last stage's share first."""
        found: dict[str, torch.Tensor] = {}
        for state in reversed(self._states):
            for name in state.gradients:
                share = state.gradient(name)
                if share is not None:
                    found[name] = share if name not in found else found[name] + share
        return found

    def close(self) -> None:
        """See ``Runner``."""
        self._states = []


class LocalRunner:
    """Every rank a process of this machine; gradients are added up in memory that this process reads."""

    def __init__(self, compiled: CompiledPipeline, tensors: Tensors, engine: LocalEngine, axis: str) -> None:
        self._constants = {Port("constant", name): value.clone() for name, value in compiled.captured.constants.items()}
        read = {role for part in _parts(compiled) for role in part.program.signature.inputs}
        ports = [Port(role.kind.value, role.name) for role in compiled.captured.signature.inputs if role in read]
        bound = {port: tensors[port] for port in ports if port in tensors}
        updated = {Port("buffer", role.name) for role in compiled.captured.signature.outputs if role.kind is RoleKind.UPDATE}
        bound.update((port, tensors[port]) for port in updated if port in tensors)
        constants = {port: value for port, value in self._constants.items() if port in ports}
        self._updated = [tensors[port] for port in updated if port in tensors]
        self._pipeline = LocalPipeline(engine, _request(compiled, axis), {**bound, **constants})

    def step(self, given: Sequence[Mapping[str, torch.Tensor]]) -> Outputs:
        """See ``Runner``."""
        outputs = self._pipeline.step(given)
        torch.autograd.graph.increment_version(self._updated)
        return [{name: value.clone() for name, value in output.items()} for output in outputs]

    def gradients(self) -> dict[str, torch.Tensor]:
        """See ``Runner``. What several stages contribute to is added, the last stage's share first."""
        found: dict[str, torch.Tensor] = {}
        for (_, name), share in sorted(self._pipeline.gradients.items(), key=lambda entry: -entry[0][0]):
            found[name] = share if name not in found else found[name] + share
        return found

    def close(self) -> None:
        """See ``Runner``. The engine ends the ranks."""


def _parts(compiled: CompiledPipeline) -> list[StagePart]:
    return [part for stage in compiled.pipeline.stages for part in stage.parts]


def _request(compiled: CompiledPipeline, axis: str) -> PipelineRequest:
    """A compiled pipeline as data for ranks."""
    captured = compiled.captured
    shapes = {
        role.name: _shape(node)
        for role, node in zip(captured.signature.inputs, captured.placeholders, strict=True)
        if role.kind in (RoleKind.INPUT, RoleKind.SEED)
    }
    outputs, gradients = {}, {}
    for part in _parts(compiled):
        for role, node in zip(part.program.signature.outputs, part.program.results, strict=True):
            if node is not None and role.kind is RoleKind.OUTPUT:
                outputs[part.stage, role.name] = _shape(node)
            elif node is not None and role.kind is RoleKind.GRADIENT:
                gradients[part.stage, role.name] = _shape(node)
    return PipelineRequest(
        axis=axis,
        schedule=format_schedule(compiled.schedule),
        micro_batches=compiled.schedule.micro_batches,
        stages=[_stage(stage) for stage in compiled.pipeline.stages],
        given=shapes,
        outputs=outputs,
        gradients=gradients,
    )


def _shape(node: fx.Node) -> Shape:
    value = node.meta["val"]
    return tuple(int(size) for size in value.shape), value.dtype


def _stage(stage: StageProgram) -> dict[str, Any]:
    parts = {kind: [_part(part) for part in stage.of(kind)] for kind in PartKind}
    backward = parts[PartKind.BACKWARD_INPUT]
    messages = {name: [_value(value) for value in getattr(stage, name)] for name in MESSAGES}
    return {
        "stage": stage.stage,
        "forward": parts[PartKind.FORWARD][0],
        "backward": backward[0] if backward else None,
        "weights": parts[PartKind.BACKWARD_WEIGHT],
        **messages,
    }


def _value(value: Value) -> list[Any]:
    return describe_spec(ValueSpec(value.name, value.shape, value.dtype, value.stride))


def _part(part: StagePart) -> dict[str, Any]:
    signature = part.program.signature
    return {
        "program": emit(part.program).to_json(),
        "inputs": [[role.kind.value, role.name] for role in signature.inputs],
        "outputs": [[role.kind.value, role.name] for role in signature.outputs],
        "drops": list(part.drops),
    }


MESSAGES = ("receives", "sends", "receives_back", "sends_back")
