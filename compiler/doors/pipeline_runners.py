"""Who runs the stages of a pipeline: all of them in this process, taking turns (engine ``sim``)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import torch

from ...runtime.schedule.loopback import LoopbackPipeline
from ...runtime.schedule.stage import Port
from ..plan.pipeline.stage_code import states_of
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
