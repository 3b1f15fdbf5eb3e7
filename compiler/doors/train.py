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
from .checks import check_examples
from .hall import Compiled, compile_program
from .loaded import Leftovers, Loaded
from .parallelize import open_session, pipelined_order
from .pipeline.train import PipelineTrainStep
from .resident_state import ResidentState, settings_of
from .session import Session
from .threads import single_threaded
from .watch import StateWatch, state_of

log = logging.getLogger("hocket")


class TrainStep:
    """One call is one step: ``loss = step(x, y)``. Parameters, buffers and optimizer state are updated in place.

    ``optimizer.state_dict()`` and ``model.state_dict()`` stay true, and a learning-rate scheduler works: it changes
    ``optimizer.param_groups`` as ever. Other hyper-parameters are constants of the program: a step that finds one changed is
    compiled anew, and says so (``OneCycleLR`` and ``CyclicLR`` change one in every step unless ``cycle_momentum=False``).
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
        self._leftovers = Leftovers()
        self._adopt()
        self._watch: StateWatch | None = None
        self.latest: Loaded | None = None

    def _adopt(self) -> None:
        """Take the optimizer as it is now."""
        model = self.session.state.captured
        self._state = ResidentState(model, self.optimizer, initial_state(model, self.optimizer))
        self._settings, self._members = settings_of(self.optimizer)

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
        """Compile for this form of call, if it is new, and anew where the model or the optimizer's settings have changed."""
        self.session.check_open()
        self._notice_changes()
        self.latest = self._steps.get(self.session.state.captured, args, kwargs, training=True, make=self._compile)
        return self.latest

    def _notice_changes(self) -> None:
        settings, members = settings_of(self.optimizer)
        if members != self._members:
            raise InputError(
                "the parameters of the optimizer are not those that it had when hocket.train_step was called; make a new one "
                "after add_param_group"
            )
        moved = self._watch.changed() if self._watch is not None else ""
        for key in settings:
            if settings[key] != self._settings[key]:
                moved = "{1} of the optimizer's group {0}".format(*key)
        if moved:
            log.warning("hocket: %s was changed since the last step: compiling again", moved)
            self._steps.clear()
            self._adopt()

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
        self._leftovers.unload(self.session.engine)
        loaded = Loaded(self.session.engine, compiled, tensors)
        self._leftovers.expect(loaded)
        self._watch = StateWatch(model)
        return loaded

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
    example_args: tuple[Any, ...] | Tensor = (),
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
    example_args, example_kwargs = check_examples(example_args, example_kwargs)
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
            step.prepare(example_args, example_kwargs)
    except BaseException:
        step.close()
        raise
    return step
