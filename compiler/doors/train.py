"""``hocket.train_step``: forward, loss, backward and optimizer as one program, so that the optimizer's work is shared too."""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn
from torch.optim import Optimizer

from ...runtime.mesh import Mesh
from ..capture import Specialisations, capture_step, initial_state
from ..capture.clip import check_clip_norm
from ..errors import InputError
from ..plan.tactics import capturing
from ..program import Program
from ..retrace import Retrace
from .hall import Compiled, compile_program
from .loaded import Loaded
from .parallelize import open_session, pipelined_order
from .pipeline.train import PipelineTrainStep
from .resident_state import ResidentState
from .session import Session
from .threads import single_threaded
from .watch import state_of

log = logging.getLogger("hocket")


class TrainStep:
    """One call is one step: ``loss = step(x, y)``. Parameters, buffers and optimizer state are updated in place.

    ``optimizer.state_dict()`` and ``model.state_dict()`` stay true, and a learning-rate scheduler works: it changes
    ``optimizer.param_groups`` as ever. Other hyper-parameters are baked in when the step is compiled.
    """

    def __init__(
        self,
        session: Session,
        optimizer: Optimizer,
        loss: Callable[[Any], Tensor] | None,
        clip_norm: float | None = None,
        capacity: int = 8,
    ) -> None:
        self.session = session
        self.optimizer = optimizer
        self._loss = loss
        self._clip_norm = clip_norm
        self._steps: Specialisations[Loaded] = Specialisations(capacity)
        model = session.state.captured
        self._state = ResidentState(model, optimizer, initial_state(model, optimizer))
        self.latest: Loaded | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        """Run one step on this batch and return the loss, a scalar tensor without gradient."""
        loaded = self.prepare(args, kwargs)
        self._state.refresh()
        seed = int(torch.randint(2**62, ())) if loaded.needs_seed else 0
        engine = self.session.engine
        leaves = pytree.tree_leaves((args, kwargs))
        ticket, results = engine.forward(loaded.handle, loaded.inputs(leaves, seed))
        loaded.write_back(results, leaves)
        engine.release(ticket)
        self.optimizer._opt_called = True  # type: ignore[attr-defined]  # what schedulers look at before they warn of a wrong order
        (loss,) = loaded.outputs(results)
        return loss

    def prepare(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Loaded:
        """Compile for this form of call, if it is new."""
        self.session.check_open()
        self.latest = self._steps.get(self.session.state.captured, args, kwargs, training=True, make=self._compile)
        return self.latest

    @single_threaded
    def _compile(self, _: bool, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Loaded:  # noqa: FBT001 (a callback)
        start = time.perf_counter()
        model = self.session.state.captured

        def step(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Program:
            with capturing(self.session.options.tactics):
                return capture_step(model, self.optimizer, args, kwargs, loss=self._loss, clip_norm=self._clip_norm)

        program = step(args, kwargs)
        captured = time.perf_counter() - start
        retrace = Retrace(model, args, kwargs, step=step)
        compiled = compile_program(program, self.session.options, retrace=retrace).timed(capture=captured)
        tensors = {**state_of(model), **{("state", name): tensor for name, tensor in self._state.tensors.items()}}
        return Loaded(self.session.engine, compiled, tensors)

    @property
    def compiled(self) -> Compiled:
        """The specialisation used last; InputError before the first step."""
        if self.latest is None:
            raise InputError("nothing is compiled yet: make a step first, or pass example_args to hocket.train_step")
        return self.latest.compiled

    def explain(self, topic: str = "") -> str:
        """What was captured, planned, rewritten and proven, as text; ``topic`` narrows it to names that contain it."""
        from ..report.text import explain

        text, fusion = explain(self.compiled, topic), self.latest.fusion if self.latest else None
        return f"{text}{fusion}\n" if fusion is not None and not topic else text

    def close(self) -> None:
        """End the ranks. Closing twice is harmless."""
        self.session.close()

    def __enter__(self) -> TrainStep:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def train_step(
    model: nn.Module,
    mesh: str | int | Mesh,
    optimizer: Optimizer,
    example_args: tuple[Any, ...] = (),
    example_kwargs: Mapping[str, Any] | None = None,
    *,
    loss: Callable[[Any], Tensor] | None = None,
    clip_norm: float | None = None,
    **options: Any,
) -> TrainStep | PipelineTrainStep:
    """A whole training step on the ranks of a mesh: ``step = train_step(model, "dp=2", optimizer); loss = step(x, y)``.

    loss: from the model's result to a scalar tensor; None where the model returns the loss itself, ``.loss`` or ``["loss"]``.
    optimizer: any torch.optim optimizer that treats every parameter by itself (SGD, Adam, AdamW and their like). clip_norm: the
    largest norm that all gradients together may have, beyond which they are scaled down to it. With an axis ``pp`` the stages of a
    pipeline update their own parameters; the options of ``PipelineParallel`` apply. The other arguments, and what is raised, are
    those of ``hocket.parallelize``; UnsupportedError for an optimizer that couples parameters.
    """
    check_clip_norm(clip_norm)
    step: TrainStep | PipelineTrainStep
    pipelined = pipelined_order(model, mesh, options)
    if pipelined is not None:
        tactic = pipelined.tactic if loss is None else dataclasses.replace(pipelined.tactic, loss=loss)
        order = dataclasses.replace(pipelined, tactic=tactic)
        step = PipelineTrainStep(order, optimizer, options.get("engine", "local"), clip_norm)
    else:
        session = open_session(model, mesh, **options)
        try:
            step = TrainStep(session, optimizer, loss, clip_norm)
        except BaseException:
            session.close()
            raise
    try:
        if example_args or example_kwargs:
            step.prepare(tuple(example_args), dict(example_kwargs or {}))
    except BaseException:
        step.close()
        raise
    return step
