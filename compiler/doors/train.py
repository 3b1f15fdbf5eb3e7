"""``hocket.train_step``: forward, loss, backward and optimizer as one program, so that the optimizer's work is shared too."""

from __future__ import annotations

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
from ..errors import InputError
from ..plan.tactics import capturing
from ..program import Program
from ..retrace import Retrace
from .hall import Compiled, compile_program
from .loaded import Loaded
from .parallelize import open_session
from .session import Session
from .threads import single_threaded
from .watch import state_of

log = logging.getLogger("hocket")


class TrainStep:
    """One call is one step: ``loss = step(x, y)``. Parameters, buffers and optimizer state are updated in place.

    ``optimizer.state_dict()`` and ``model.state_dict()`` stay true, and a learning-rate scheduler works: it changes
    ``optimizer.param_groups`` as ever. Other hyper-parameters are baked in when the step is compiled.
    """

    def __init__(self, session: Session, optimizer: Optimizer, loss: Callable[[Any], Tensor] | None, capacity: int = 8) -> None:
        self.session = session
        self.optimizer = optimizer
        self._loss = loss
        self._steps: Specialisations[Loaded] = Specialisations(capacity)
        self._state = initial_state(session.state.captured, optimizer)
        self._adopt_state()
        self.latest: Loaded | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        """Run one step on this batch and return the loss, a scalar tensor without gradient."""
        loaded = self.prepare(args, kwargs)
        for index, group in enumerate(self.optimizer.param_groups):
            self._state[f"lr:{index}"].fill_(float(group["lr"]))
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
                return capture_step(model, self.optimizer, args, kwargs, loss=self._loss)

        program = step(args, kwargs)
        captured = time.perf_counter() - start
        retrace = Retrace(model, args, kwargs, step=step)
        compiled = compile_program(program, self.session.options, retrace=retrace).timed(capture=captured)
        tensors = {**state_of(model), **{("state", name): tensor for name, tensor in self._state.items()}}
        return Loaded(self.session.engine, compiled, tensors)

    def _adopt_state(self) -> None:
        """Let the optimizer hold the very tensors that the ranks update, so that its state_dict is true."""
        names = dict(self.session.state.captured.named_parameters())
        for full, tensor in self._state.items():
            key, _, name = full.partition(":")
            if name in names:
                self.optimizer.state[names[name]][key] = tensor

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
    **options: Any,
) -> TrainStep:
    """A whole training step on the ranks of a mesh: ``step = train_step(model, "dp=2", optimizer); loss = step(x, y)``.

    loss: from the model's result to a scalar tensor; None where the model returns the loss itself, ``.loss`` or ``["loss"]``.
    optimizer: any torch.optim optimizer that treats every parameter by itself (SGD, Adam, AdamW and their like). The other
    arguments, and what is raised, are those of ``hocket.parallelize``; UnsupportedError for an optimizer that couples parameters.
    """
    session = open_session(model, mesh, **options)
    try:
        step = TrainStep(session, optimizer, loss)
        if example_args or example_kwargs:
            step.prepare(tuple(example_args), dict(example_kwargs or {}))
    except BaseException:
        session.close()
        raise
    return step
