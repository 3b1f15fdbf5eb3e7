"""``hocket.train_step`` on a pipeline: every stage updates its own parameters, with the optimizer's state it holds for them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from ....runtime.engines.base import Engine
from ...capture import initial_state
from ...errors import InputError
from ...verify.report import Verdict
from ..resident_state import ResidentState, settings_of
from .compile import CompiledPipeline
from .options import PipelineOrder
from .session import PipelineSession, loss_in


class PipelineTrainStep:
    """One call is one step: ``loss = step(x, y)``. Parameters, buffers and optimizer state are updated in place, on the stages.

    The gradients of all micro-batches are added up first, those of parameters that several stages read are added to one another,
    then every stage runs the optimizer for its own parameters. ``optimizer.state_dict()`` and ``model.state_dict()`` stay true and
    may be loaded into; a learning-rate scheduler works. Other hyper-parameters are constants of the stages, and a step that finds
    one changed is refused.
    """

    def __init__(self, order: PipelineOrder, optimizer: Optimizer, engine: str | Engine, clip_norm: float | None) -> None:
        self.optimizer = optimizer
        self._state = ResidentState(order.model, optimizer, initial_state(order.model, optimizer))
        self._settings = settings_of(optimizer)
        full = dataclasses.replace(order, optimizer=optimizer, clip_norm=clip_norm)
        self.session = PipelineSession(full, engine, self._state.tensors)

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        """Run one step on this batch and return the loss, a scalar tensor without gradient."""
        if settings_of(self.optimizer) != self._settings:
            raise InputError(
                "a hyper-parameter of the optimizer, or its parameters, have changed since hocket.train_step was called, and "
                "the stages hold all but lr as constants: make a new train_step"
            )
        self._state.refresh()
        _, outputs = self.session.run(self.session.model, args, kwargs, train=True)
        self._state.leave_out(self.session.elsewhere)
        self.optimizer._opt_called = True  # type: ignore[attr-defined]  # what schedulers look at before they warn of a wrong order
        return loss_in(outputs)

    def prepare(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> CompiledPipeline:
        """Compile for this form of call, if it is new."""
        self.session.prepare(args, dict(kwargs), mode=self.session.model.training)
        self._state.leave_out(self.session.elsewhere)
        return self.compiled

    @property
    def compiled(self) -> CompiledPipeline:
        """The form of call used last; InputError before the first step."""
        return self.session.compiled

    def explain(self, topic: str = "") -> str:
        """Stages, messages, schedule and decisions as text; ``topic`` narrows it to names that contain it."""
        return self.session.explain(topic)

    def verify(self, level: str = "full") -> Verdict:
        """Prove the stages in use again, at ``level``."""
        return self.session.verify(level)

    def close(self) -> None:
        """End the ranks. Closing twice is harmless."""
        self.session.close()

    def __enter__(self) -> PipelineTrainStep:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
