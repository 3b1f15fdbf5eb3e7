"""The door for pipelines: ``hocket.parallelize(model, mesh="pp=2")``, then ``loss = model.train_step(x, y)``.

A batch is cut into micro-batches along the first dimension of its tensors. One micro-batch's whole step is captured, planned on the
mesh's other axes, its backward split, the graph cut into stages, every rewrite proven; a schedule says what each rank does when.
``train_step`` leaves the gradients of the batch in ``.grad``, as ``loss.backward()`` does, and returns the loss, so the optimizer
and the rest of the loop stay as they are. With ``hocket.train_step`` the optimizer runs on the stages too.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from collections.abc import Mapping
from typing import Any, NoReturn

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

from ....runtime.engines.base import Engine
from ....runtime.schedule.stage import Port
from ...capture import Specialisations
from ...errors import InputError
from ...program import Literal, RoleKind
from ...report.pipeline import explain_pipeline
from ...verify.report import Verdict
from ..engines import engine_opener
from ..threads import single_threaded
from ..watch import StateWatch, in_mode, state_of
from .attached import AttachedRunner, OwnStages, WorldAgreement, open_attached
from .batch import Batch, CallArgs
from .compile import CompiledPipeline, compile_pipeline
from .options import PipelineOrder
from .runners import LocalRunner, LoopbackRunner, Runner

log = logging.getLogger("hocket")

CAPACITY = 4
"""Forms of call whose programs stay on the ranks."""

Ready = tuple[CompiledPipeline, Runner]


class PipelineSession:
    """One model as a pipeline: what a parallel module asks of a session, and ``train_step``.

    states: optimizer state by name, where the order has an optimizer; capacity: how many forms of call stay loaded; elsewhere:
    parameters that other ranks update, under a launcher.
    """

    def __init__(
        self, order: PipelineOrder, engine: str | Engine, states: Mapping[str, Tensor] | None = None, capacity: int = CAPACITY
    ) -> None:
        if engine not in ("sim", "local", "attach"):
            raise InputError(
                'a pipeline runs on engine "local" (ranks are processes), "attach" (this process is a rank) or "sim"; '
                f"found {engine!r}"
            )
        self._open = engine_opener(engine, order.mesh) if engine == "local" else None
        self._engine: Any = None
        self._own: OwnStages | None = None
        if engine == "attach":
            self._engine = open_attached(order.model, order.mesh)
            self._own = OwnStages(order.model, self._engine)
            order = dataclasses.replace(order, agreement=WorldAgreement(self._own))
        self.order = order
        self.model = order.model
        self._states = dict(states or {})
        self._closed = False
        self._watch: StateWatch | None = None
        self._made: Specialisations[Ready] = Specialisations(capacity, dropped=lambda made: made[1].close())
        self._latest: Ready | None = None
        self.elsewhere: set[str] = set()

    def train_step(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """Forward, loss and backward of a batch; gradients are added to ``.grad``. Returns the loss, without gradient."""
        runner, outputs = self.run(module, args, kwargs, train=True)
        named = dict(self.model.named_parameters())
        with torch.no_grad():
            for name, gradient in runner.gradients().items():
                if named[name].grad is None:
                    named[name].grad = gradient.clone()
                else:
                    named[name].grad += gradient  # type: ignore[operator]
        return loss_in(outputs)

    def run(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], *, train: bool
    ) -> tuple[Runner, list[dict[str, Tensor]]]:
        """One step for a batch: who ran it, and the outputs of every micro-batch."""
        compiled, runner, batch = self._ready(module, args, kwargs, train=train)
        return runner, runner.step([_given(compiled, m, call) for m, call in enumerate(batch.cut(compiled.rows))])

    def call(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The model's result for a batch, computed micro-batch by micro-batch; without gradients."""
        if torch.is_grad_enabled() and any(p.requires_grad for p in self.model.parameters()):
            raise InputError(
                "a pipeline computes loss and gradients together: train with train_step(...), or call the module under "
                "torch.no_grad()"
            )
        _, outputs = self.run(module, args, kwargs, train=False)
        signature = self.compiled.captured.signature
        each = []
        for output in outputs:
            leaves = [
                leaf.value if isinstance(leaf, Literal) else output[signature.outputs[leaf].name] for leaf in signature.out_leaves
            ]
            assert signature.out_spec is not None, "a captured program has the tree of its outputs"
            each.append(pytree.tree_unflatten(leaves, signature.out_spec))
        if len(each) == 1:
            return each[0]
        weights = [rows / sum(self.compiled.rows) for rows in self.compiled.rows]
        return pytree.tree_map(lambda *pieces: _joined(weights, *pieces), *each)

    def prepare(self, args: tuple[Any, ...], kwargs: dict[str, Any], *, mode: bool) -> None:
        """Compile the training step for this form of call."""
        with in_mode(self.model, training=mode):
            self._ready(self.model, args, kwargs, train=True)

    def _ready(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], *, train: bool
    ) -> tuple[CompiledPipeline, Runner, Batch]:
        self.check_open()
        if train and any(isinstance(leaf, Tensor) and leaf.requires_grad for leaf in pytree.tree_leaves((args, kwargs))):
            raise InputError("a pipeline gives gradients of parameters, not of inputs: pass inputs that need none (x.detach())")
        batch = Batch(args, kwargs)
        moved = self._watch.changed() if self._watch is not None else ""
        if moved:
            log.warning("hocket: %s was replaced since the last call: compiling again", moved)
            self._made.clear()
        with in_mode(self.model, training=module.training):
            self._latest = self._made.get(self.model, args, kwargs, training=train, make=self._make)
        return (*self._latest, batch)

    def check_open(self) -> None:
        """InputError once closed."""
        if self._closed:
            raise InputError("this parallel module was closed; make a new one with hocket.parallelize")

    @single_threaded
    def _make(self, train: bool, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Ready:  # noqa: FBT001 (a callback)
        with self._own.whole() if self._own is not None else contextlib.nullcontext():
            compiled = compile_pipeline(self.order, Batch(args, kwargs), train=train)
        self.elsewhere = self._own.settle(compiled) if self._own is not None else set()
        tensors = {Port(kind, name): tensor for (kind, name), tensor in state_of(self.model).items()}
        tensors.update((Port("state", name), tensor) for name, tensor in self._states.items())
        if self._own is not None:
            runner: Runner = AttachedRunner(compiled, tensors, self._own.engine)
        elif self._open is None:
            runner = LoopbackRunner(compiled, {port: tensor.detach() for port, tensor in tensors.items()})
        else:
            if self._engine is None:
                self._engine = self._open()
            runner = LocalRunner(compiled, tensors, self._engine)
        self._watch = StateWatch(self.model)
        return compiled, runner

    @property
    def latest(self) -> NoReturn:
        """A pipeline has no single plan of placements."""
        raise InputError("a pipeline has stages and a schedule instead of a plan of placements: see explain()")

    @property
    def compiled(self) -> CompiledPipeline:
        """The form of call used last; InputError before the first."""
        if self._latest is None:
            raise InputError("nothing is compiled yet: make a step first, or pass example_args to hocket.parallelize")
        return self._latest[0]

    def explain(self, topic: str = "") -> str:
        """Stages, messages, schedule and decisions as text."""
        return explain_pipeline(self.compiled, topic)

    def verify(self, level: str, *, canary: bool = False) -> Verdict:
        """Prove the stages in use again, at ``level``. A canary, one step in exact integers, is for meshes without stages."""
        if canary:
            raise InputError("a pipeline has no canary yet: verify() without it proves its stages")
        return self.compiled.prove_again(level)

    def close(self) -> None:
        """End the ranks. Closing twice is harmless."""
        if not self._closed:
            self._closed = True
            if self._engine is not None:
                self._engine.close()
            self._made.clear()


def loss_in(outputs: list[dict[str, Tensor]]) -> Tensor:
    """The loss of a batch from the weighted losses of its micro-batches."""
    return torch.stack([output["loss"] for output in outputs]).sum()


def _given(compiled: CompiledPipeline, micro_batch: int, call: CallArgs) -> dict[str, Tensor]:
    """Values of the INPUT and SEED ports of a micro-batch by name."""
    signature = compiled.forms[compiled.form_of(micro_batch)].captured.signature
    leaves = pytree.tree_leaves(call)
    values = {
        signature.inputs[place].name: leaves[i].detach()
        for i, place in enumerate(signature.in_leaves)
        if not isinstance(place, Literal)
    }
    for name in signature.inputs_of(RoleKind.SEED):
        values[name] = torch.randint(2**62, ())
    return values


def _joined(weights: list[float], *pieces: Any) -> Any:
    """One output of all micro-batches: rows joined; means of losses weighed by their rows; what is no tensor must agree."""
    if not isinstance(pieces[0], Tensor):
        return pieces[0]
    if pieces[0].dim():
        return torch.cat(pieces)
    if len(set(weights)) == 1 or not pieces[0].is_floating_point():
        return (
            torch.stack(pieces).float().mean().to(pieces[0].dtype)
            if not pieces[0].is_floating_point()
            else torch.stack(pieces).mean()
        )
    return torch.stack([weight * piece for weight, piece in zip(weights, pieces, strict=True)]).sum()
