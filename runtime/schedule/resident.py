"""A pipeline on a local rank: its stages built from a request, run step after step on tensors that the controller placed.

The request is JSON: the schedule's text, and for every stage its parts (instruction lists with named ports), its messages, and
where the tensors lie in shared memory: weights and buffers (read in place), inputs, outputs, and one accumulator for each gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from ..communicator import Communicator, SingleCommunicator
from ..errors import RunError
from ..executors.flat import FlatExecutor, Monitor
from ..load import load
from ..program import RankProgram
from .instruction import Schedule
from .links import CommunicatorLink
from .run import PipelineRank
from .stage import Part, Port, Run, StageCode, StageState, ValueSpec
from .text import parse_schedule

Place = tuple[int, int, Sequence[int], Sequence[int], str]
"""Segment, byte offset, shape, stride, dtype."""

View = Callable[[Place], torch.Tensor]

MESSAGES = ("receives", "sends", "receives_back", "sends_back")


class ResidentPipeline:
    """The stages of one rank. view: the tensor at a place of shared memory."""

    def __init__(self, request: dict[str, Any], communicator: Communicator, view: View, monitor: Monitor | None = None) -> None:
        self._held = {Port(kind, name): view(place) for kind, name, place in request["held"]}
        self._given = [{name: view(place) for name, place in row} for row in request["given"]]
        schedule: Schedule = parse_schedule(request["schedule"])
        mine = schedule.stages_of(communicator.rank)
        self._states = {stage: self._state(request["stages"][stage], monitor) for stage in mine}
        self._outputs = [(m, name, view(place)) for m, stage, name, place in request["outputs"] if stage in mine]
        for stage, name, place in request["gradients"]:
            if stage in mine:
                self._states[stage].gradients[name] = view(place)  # it adds up where the controller reads it
        link = CommunicatorLink(communicator, request["axis"])
        self._rank = PipelineRank(schedule, communicator.rank, self._states, link)

    def _state(self, description: dict[str, Any], monitor: Monitor | None) -> StageState:
        code = stage_code(description, monitor)
        parts = [code.forward, code.backward, *code.weights]
        ports = {port for part in parts if part is not None for port in part.inputs}
        ports |= {Port("buffer", port.name) for port in code.forward.outputs if port.kind == "update"}
        return StageState(code, {port: value for port, value in self._held.items() if port in ports})

    def step(self) -> None:
        """One step; results and gradients are then in their places."""
        try:
            outputs = self._rank.step(self._given)
        except RunError as error:
            raise RunError(_in_stage(error)) from None
        for m, name, target in self._outputs:
            target.copy_(outputs[m][name])
        for state in self._states.values():
            for port, value in state.held.items():
                if value is not self._held[port]:  # a stage replaces what it updates
                    state.held[port] = self._held[port].copy_(value)


def _in_stage(error: RunError) -> str:
    """What happened in a stage's program, with the line; the number of the rank is added by who reports it."""
    cause = error.__cause__
    if not error.instruction or cause is None:
        return str(error)
    return f"{error.instruction} from {error.source or 'an unknown line'}: {type(cause).__name__}: {cause}"


def stage_code(description: dict[str, Any], monitor: Monitor | None = None) -> StageCode:
    """The stage that a request describes."""

    def only(name: str) -> Part | None:
        return _part(description[name], monitor) if description.get(name) else None

    forward = only("forward")
    assert forward is not None, "every stage has a forward"
    receives, sends, receives_back, sends_back = (tuple(_spec(*entry) for entry in description[key]) for key in MESSAGES)
    weights = tuple(_part(part, monitor) for part in description["weights"])
    return StageCode(
        stage=description["stage"],
        forward=forward,
        backward=only("backward"),
        weights=weights,
        receives=receives,
        sends=sends,
        receives_back=receives_back,
        sends_back=sends_back,
    )


def describe_spec(spec: ValueSpec) -> list[Any]:
    """A value as JSON."""
    return [spec.name, list(spec.shape), str(spec.dtype).removeprefix("torch."), list(spec.stride)]


def _spec(name: str, shape: Sequence[int], dtype: str, stride: Sequence[int]) -> ValueSpec:
    return ValueSpec(name, tuple(shape), getattr(torch, dtype), tuple(stride))


def _part(description: dict[str, Any], monitor: Monitor | None) -> Part:
    program = RankProgram.from_json(description["program"])
    inputs = tuple(Port(kind, name) for kind, name in description["inputs"])
    outputs = tuple(Port(kind, name) for kind, name in description["outputs"])
    return Part(runner(program, SingleCommunicator(), monitor), inputs, outputs, tuple(description["drops"]))


def runner(program: RankProgram, communicator: Communicator, monitor: Monitor | None = None) -> Run:
    """A program of one segment behind one call; its results in the order of its output ports."""
    executor = FlatExecutor(load(program, communicator.rank), communicator, monitor)
    segment = program.segments[0].name
    order = program.segment_outputs(segment)

    def run(arguments: Sequence[torch.Tensor]) -> Sequence[torch.Tensor | None]:
        results = executor.run(executor.open(arguments), segment)
        found: list[torch.Tensor | None] = [None] * len(program.outputs)
        for port, result in zip(order, results, strict=True):
            found[port] = result
        return found

    return run
