"""Who runs the stages of a pipeline: this process, all in turns (engine ``sim``), or a process for every rank (``local``)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import torch

from ....runtime.engines.local import LocalEngine
from ....runtime.engines.pipeline import LocalPipeline, Slot
from ....runtime.pieces import assemble
from ....runtime.schedule.group import StageGroup
from ....runtime.schedule.loopback import LoopbackPipeline
from ....runtime.schedule.run import Stage
from ....runtime.schedule.stage import HELD, Port, StageState
from ...plan.pipeline.stage_code import held_by, stage_codes
from ...program import RoleKind
from .compile import CompiledPipeline
from .groups import groups_of
from .request import emitted, final_gradients, held_layouts, request_of, sharing_of, updated_ports

Tensors = Mapping[Port, torch.Tensor]
Outputs = list[dict[str, torch.Tensor]]


class Runner(Protocol):
    """Runs one compiled pipeline, step after step."""

    def step(self, given: Sequence[Mapping[str, torch.Tensor]]) -> Outputs:
        """One step. given: per micro-batch, inputs by name. Returns the outputs of each micro-batch by name. What the step changes
        is written into the tensors that were bound; gradients wait to be taken."""
        ...

    def gradients(self) -> dict[str, torch.Tensor]:
        """The summed gradients of the latest step by parameter; valid until the next one."""
        ...

    def close(self) -> None:
        """Free everything."""
        ...


class LoopbackRunner:
    """All ranks in this process, taking turns wherever one waits: exact and deterministic, for any number of stages."""

    def __init__(self, compiled: CompiledPipeline, tensors: Tensors) -> None:
        self._inner = compiled.order.inner
        programs = emitted(compiled)
        self._wanted = final_gradients(compiled, programs)
        constants = {Port("constant", name): value for name, value in compiled.captured.constants.items()}
        self._states: list[Stage] = []
        if self._inner is not None:
            self._states += groups_of(compiled, programs, {**tensors, **constants})
        else:
            self._states += _states(compiled, tensors)
        self._bound = [[dict(member.held) for member in _members(state)] for state in self._states]
        self._pipeline = LoopbackPipeline(compiled.schedule, self._states, sharing=sharing_of(compiled))

    def step(self, given: Sequence[Mapping[str, torch.Tensor]]) -> Outputs:
        """See ``Runner``."""
        outputs = self._pipeline.step(given)
        with torch.no_grad():
            for state, bound in zip(self._states, self._bound, strict=True):
                for member, before in zip(_members(state), bound, strict=True):
                    for port, value in member.held.items():
                        if value is not before[port]:  # a stage replaces what it updates
                            before[port].copy_(value)
                            member.held[port] = before[port]
        return outputs

    def gradients(self) -> dict[str, torch.Tensor]:
        """See ``Runner``. What several stages contribute to is added, the last stage's share first."""
        found: dict[str, torch.Tensor] = {}
        for (stage, name), slot in sorted(self._wanted.items(), key=lambda entry: -entry[0][0]):
            share = self._share(stage, name, slot)
            found[name] = share if name not in found else found[name] + share
        return found

    def _share(self, stage: int, name: str, slot: Slot) -> torch.Tensor:
        members = _members(self._states[stage])
        pieces = [member.finished.get(name, member.gradients.get(name)) for member in members]
        there = [piece for piece in pieces if piece is not None]
        return there[0] if self._inner is None else assemble(there, slot.layout, self._inner)

    def close(self) -> None:
        """See ``Runner``."""
        self._states = []


def _states(compiled: CompiledPipeline, tensors: Tensors) -> list[StageState]:
    joined = compiled.order.tactic.joined
    codes = [stage_codes(form.pipeline, products=joined > 1) for form in compiled.forms]
    which = [compiled.form_of(m) for m in range(len(compiled.rows))]
    return [
        StageState(
            codes[0][s],
            held_by(stage, tensors),
            variants={m: codes[form][s] for m, form in enumerate(which) if form},
            joined=joined,
        )
        for s, stage in enumerate(compiled.pipeline.stages)
    ]


def _members(state: Stage) -> Sequence[StageState]:
    return state.members if isinstance(state, StageGroup) else [state]


class LocalRunner:
    """Every rank a process of this machine; gradients are added up in memory that this process reads."""

    def __init__(self, compiled: CompiledPipeline, tensors: Tensors, engine: LocalEngine) -> None:
        programs = emitted(compiled)
        constants = {Port("constant", name): value.clone() for name, value in compiled.captured.constants.items()}
        everything = {**tensors, **constants}
        updated = updated_ports(compiled)
        ports = [*held_layouts(compiled, programs), *(p for p in tensors if p.name in updated and p.kind in HELD)]
        bound = {port: everything[port] for port in dict.fromkeys(ports)}
        self._updated = [tensor for port, tensor in bound.items() if port.name in updated and port.kind != RoleKind.CONSTANT]
        self._pipeline = LocalPipeline(engine, request_of(compiled, programs), bound)

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
        """See ``Runner``: the programs leave the ranks, and their memory is free."""
        self._pipeline.close()
