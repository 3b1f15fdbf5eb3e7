"""A pipeline on a local rank: its stages built from a request, run step after step on tensors that the controller placed.

The request is JSON: the schedule's text, and for every stage its parts (instruction lists with named ports), its messages, and
where the tensors lie in shared memory: weights and buffers (read in place), inputs, outputs, and one accumulator for each gradient.
Where several ranks run a stage together, every tensor has a place for each of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from ..communicator import Communicator, SingleCommunicator
from ..errors import RunError
from ..executors.flat import FlatExecutor, Monitor
from ..inner import InnerCommunicator, rank_within
from ..load import load
from ..mesh import Mesh
from ..program import RankProgram
from .instruction import Schedule
from .links import CommunicatorLink, Link
from .run import PipelineRank
from .sharing import Sharing, Tie
from .stage import HELD, Part, Port, Run, StageCode, StageState, ValueSpec
from .text import parse_schedule

Place = tuple[int, int, Sequence[int], Sequence[int], str]
"""Segment, byte offset, shape, stride, dtype."""

View = Callable[[Any], torch.Tensor]
"""The tensor at a ``Place``, or at whatever else a request names places by."""

MESSAGES = ("receives", "sends", "receives_back", "sends_back")


class ResidentPipeline:
    """The stages of one rank. view: the tensor at a place of shared memory; link: of its messages, default: the communicator's."""

    def __init__(
        self,
        request: dict[str, Any],
        communicator: Communicator,
        view: View,
        monitor: Monitor | None = None,
        link: Link | None = None,
    ) -> None:
        inner = None if request["inner"] is None else Mesh(tuple((name, size) for name, size in request["inner"]))
        axis: str = request["axis"]
        rank = communicator.mesh.coordinate(communicator.rank)[axis]
        mine = rank_within(communicator.mesh, inner, communicator.rank)
        self._communicator = SingleCommunicator() if inner is None else InnerCommunicator(communicator, inner)
        self._monitor = monitor
        self._held = {Port(kind, name): view(places[mine]) for kind, name, places, _ in request["held"]}
        self._writes = {Port(kind, name) for kind, name, _, writers in request["held"] if writers[mine]}
        self._given = [{name: view(places[mine]) for name, places in row} for row in request["given"]]
        schedule: Schedule = parse_schedule(request["schedule"])
        here = schedule.stages_of(rank)
        self._joined: int = request["joined"]
        self._states = {stage: self._state(request["stages"][stage], request["code_of"]) for stage in here}
        self._outputs = [
            (m, name, view(places[mine]))
            for m, stage, name, places, writers in request["outputs"]
            if stage in here and writers[mine]
        ]
        self._gradients = [
            (self._states[stage], name, view(places[mine]))
            for stage, name, places, writers in request["gradients"]
            if stage in here and writers[mine]
        ]
        for state, name, place in self._gradients:
            if not _makes(state.code.optimizer, "gradient", name):
                state.gradients[name] = place  # it adds up where the controller reads it
        sharing = _sharing(request["sharing"])
        ways = link or CommunicatorLink(communicator, axis)
        self._rank = PipelineRank(schedule, rank, self._states, ways, eager_weights=inner is None, sharing=sharing)
        self._fresh: list[tuple[Port, torch.Tensor]] = []

    def _state(self, descriptions: Sequence[dict[str, Any]], code_of: Sequence[int]) -> StageState:
        codes = [stage_code(description, self._communicator, self._monitor) for description in descriptions]
        parts = [part for code in codes for part in code.parts]
        ports = {port for part in parts for port in part.inputs}
        updated = {port.name for part in parts for port in part.outputs if port.kind == "update"}
        held = {port: value for port, value in self._held.items() if port in ports or (port.name in updated and port.kind in HELD)}
        variants = {m: codes[number] for m, number in enumerate(code_of) if number}
        return StageState(codes[0], held, variants=variants, joined=self._joined)

    def step(self) -> None:
        """One step; results and gradients are then in their places, new values of what is bound wait for ``commit``."""
        try:
            outputs = self._rank.step(self._given)
        except RunError as error:
            raise RunError(_in_stage(error)) from None
        for m, name, target in self._outputs:
            target.copy_(outputs[m][name])
        for state, name, place in self._gradients:
            finished = state.finished.get(name)
            if finished is not None:
                place.copy_(finished)
        self._fresh = []
        for state in self._states.values():
            state.finished = {}
            for port, value in state.held.items():
                if value is not self._held[port]:  # a stage replaces what it updates
                    state.held[port] = self._held[port]
                    if port in self._writes:
                        self._fresh.append((port, value))

    def updated(self, stage: int, name: str) -> torch.Tensor:
        """The new value that a stage of this rank has for what it holds, before ``commit``."""
        held = self._states[stage].held
        ports = [Port(kind, name) for kind in ("buffer", "param", "state") if Port(kind, name) in held]
        return next((value for port, value in self._fresh if port in ports), self._held[ports[0]])

    def learn(self, name: str, value: torch.Tensor) -> None:
        """Take over at ``commit`` what a stage of another rank has made of something that this rank reads."""
        known = {port for port, _ in self._fresh}
        mine = [Port(kind, name) for kind in ("buffer", "param", "state")]
        self._fresh += [(port, value) for port in mine if port in self._held and port not in known]

    def commit(self) -> None:
        """Write the new values of the latest step, once nobody reads the old ones any more."""
        for port, value in self._fresh:
            self._held[port].copy_(value)
        self._fresh = []


def _makes(part: Part | None, kind: str, name: str) -> bool:
    return part is not None and Port(kind, name) in part.outputs


def _sharing(description: dict[str, Any]) -> Sharing:
    ties = tuple(Tie(name, tuple(givers)) for name, givers in description["ties"])
    return Sharing(ties, {int(stage): tuple(_spec(*entry) for entry in specs) for stage, specs in description["scalars"].items()})


def _in_stage(error: RunError) -> str:
    """What happened in a stage's program, with the line; the number of the rank is added by who reports it."""
    cause = error.__cause__
    if not error.instruction or cause is None:
        return str(error)
    return f"{error.instruction} from {error.source or 'an unknown line'}: {type(cause).__name__}: {cause}"


def stage_code(description: dict[str, Any], communicator: Communicator | None = None, monitor: Monitor | None = None) -> StageCode:
    """The stage that a request describes. communicator: of the ranks that run it together (default: a rank alone)."""
    network = communicator or SingleCommunicator()

    def only(name: str) -> Part | None:
        return _part(description[name], network, monitor) if description.get(name) else None

    forward = only("forward")
    assert forward is not None, "every stage has a forward"
    receives, sends, receives_back, sends_back = (tuple(_spec(*entry) for entry in description[key]) for key in MESSAGES)
    return StageCode(
        stage=description["stage"],
        forward=forward,
        backward=only("backward"),
        weights=tuple(_part(part, network, monitor) for part in description["weights"]),
        share=only("share"),
        optimizer=only("optimizer"),
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


def _part(description: dict[str, Any], communicator: Communicator, monitor: Monitor | None) -> Part:
    program = RankProgram.from_json(description["program"])
    inputs = tuple(Port(kind, name) for kind, name in description["inputs"])
    outputs = tuple(Port(kind, name) for kind, name in description["outputs"])
    return Part(runner(program, communicator, monitor), inputs, outputs, tuple(description["drops"]))


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
