"""The door for pipelines: ``hocket.parallelize(model, mesh="pp=2")``, then ``loss = model.train_step(x, y)``.

A batch is cut into micro-batches along the first dimension of its tensors. One micro-batch's whole step is captured, its backward
split, the graph cut into stages, every rewrite proven; a schedule says what each rank does when. ``train_step`` leaves the
gradients of the batch in ``.grad``, as ``loss.backward()`` does, and returns the loss, so the optimizer and the rest of the
loop stay as they are.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Sequence
from typing import Any, NoReturn

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

from ...runtime.engines.base import Engine
from ...runtime.mesh import Mesh
from ...runtime.schedule.stage import Port
from ..capture import Specialisations
from ..errors import InputError
from ..plan.tactics import RewriteTactic, Tactic
from ..program import Literal, RoleKind
from ..report.pipeline import explain_pipeline
from ..verify.report import Verdict
from .engines import engine_opener
from .pipeline_compile import CompiledPipeline, PipelineParallel, compile_pipeline
from .pipeline_runners import LocalRunner, LoopbackRunner, Runner
from .threads import single_threaded
from .watch import state_of

log = logging.getLogger("hocket")

AXIS = "pp"

CallArgs = tuple[tuple[Any, ...], dict[str, Any]]
"""Positional and keyword arguments."""


def pipeline_tactic(mesh: Mesh, tactics: Sequence[Tactic | RewriteTactic] | str) -> PipelineParallel | None:
    """The tactic that asks for a pipeline: the one given, or the default one where the mesh has an axis ``pp``; None for neither.

    InputError for two, for an axis that the mesh lacks, and where other axes or tactics are asked for beside it.
    """
    asked = [] if isinstance(tactics, str) else [tactic for tactic in tactics if isinstance(tactic, PipelineParallel)]
    if not asked and AXIS not in mesh.names:
        return None
    if len(asked) > 1:
        raise InputError(f"expected one PipelineParallel, found {len(asked)}")
    chosen = asked[0] if asked else PipelineParallel()
    if chosen.axis not in mesh.names:
        raise InputError(f"PipelineParallel is for the axis {chosen.axis!r}, which mesh {mesh} does not have")
    if len(mesh.axes) > 1:
        others = ", ".join(name for name in mesh.names if name != chosen.axis)
        raise InputError(f"a pipeline over {chosen.axis!r} runs on a mesh of that axis alone; found {others} beside it in {mesh}")
    if not isinstance(tactics, str) and len(tactics) > 1:
        raise InputError("PipelineParallel takes no other tactic beside it; its own options say how the backward is split")
    return chosen


class PipelineSession:
    """One model as a pipeline: what a parallel module asks of a session, and ``train_step``."""

    def __init__(self, model: nn.Module, mesh: Mesh, tactic: PipelineParallel, engine: str | Engine, level: str | None) -> None:
        if engine not in ("sim", "local"):
            raise InputError(f'a pipeline runs on engine "local" (ranks are processes) or "sim"; found {engine!r}')
        self._open = engine_opener(engine, mesh) if engine == "local" else None
        self._engine: Any = None
        self.model = model
        self.mesh = mesh
        self.tactic = tactic
        self.level = level
        self._closed = False
        self._made: Specialisations[tuple[CompiledPipeline, Runner]] = Specialisations(8)
        self._latest: tuple[CompiledPipeline, Runner] | None = None

    def train_step(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """Forward, loss and backward of a batch; gradients are added to ``.grad``. Returns the loss, without gradient."""
        compiled, runner, batches = self._ready(module, args, kwargs, train=True)
        outputs = runner.step(self._given(compiled, batches))
        named = dict(self.model.named_parameters())
        with torch.no_grad():
            for name, gradient in runner.gradients().items():
                if named[name].grad is None:
                    named[name].grad = gradient.clone()
                else:
                    named[name].grad += gradient  # type: ignore[operator]
        losses = [output["loss"] for output in outputs]
        return torch.stack(losses).sum()

    def call(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The model's result for a batch, computed micro-batch by micro-batch; without gradients."""
        if torch.is_grad_enabled() and any(p.requires_grad for p in self.model.parameters()):
            raise InputError(
                "a pipeline computes loss and gradients together: train with train_step(...), or call the module under "
                "torch.no_grad()"
            )
        compiled, runner, batches = self._ready(module, args, kwargs, train=False)
        outputs = runner.step(self._given(compiled, batches))
        signature = compiled.captured.signature
        each = []
        for output in outputs:
            leaves = [
                leaf.value if isinstance(leaf, Literal) else output[signature.outputs[leaf].name] for leaf in signature.out_leaves
            ]
            assert signature.out_spec is not None, "a captured program has the tree of its outputs"
            each.append(pytree.tree_unflatten(leaves, signature.out_spec))
        return each[0] if len(each) == 1 else pytree.tree_map(_joined, *each)

    def prepare(self, args: tuple[Any, ...], kwargs: dict[str, Any], *, mode: bool) -> None:
        """Compile the training step for this form of call."""
        with _mode(self.model, training=mode):
            self._ready(self.model, args, kwargs, train=True)

    def _ready(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], *, train: bool
    ) -> tuple[CompiledPipeline, Runner, list[CallArgs]]:
        if self._closed:
            raise InputError("this parallel module was closed; make a new one with hocket.parallelize")
        if train and any(isinstance(leaf, Tensor) and leaf.requires_grad for leaf in pytree.tree_leaves((args, kwargs))):
            raise InputError("a pipeline gives gradients of parameters, not of inputs: pass inputs that need none (x.detach())")
        batches = cut_batch((args, kwargs), self.tactic.microbatches, self.mesh.size)
        first = batches[0]
        with _mode(self.model, training=module.training):
            make = self._maker(len(batches))
            self._latest = self._made.get(self.model, *first, training=train, make=make)
        return (*self._latest, batches)

    def _maker(self, count: int) -> Any:
        @single_threaded
        def make(train: bool, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[CompiledPipeline, Runner]:  # noqa: FBT001
            compiled = compile_pipeline(
                self.model, (args, kwargs), self.tactic, self.mesh.size, count, train=train, level=self.level
            )
            return compiled, self._runner(compiled)

        return make

    def _runner(self, compiled: CompiledPipeline) -> Runner:
        tensors = {Port(kind, name): tensor for (kind, name), tensor in state_of(self.model).items()}
        if self._open is None:
            return LoopbackRunner(compiled, {port: tensor.detach() for port, tensor in tensors.items()})
        if self._engine is None:
            self._engine = self._open()
        return LocalRunner(compiled, tensors, self._engine, self.tactic.axis)

    def _given(self, compiled: CompiledPipeline, batches: list[CallArgs]) -> list[dict[str, Tensor]]:
        """Per micro-batch, values of the INPUT and SEED ports by name."""
        signature = compiled.captured.signature
        found = []
        for batch in batches:
            leaves = pytree.tree_leaves(batch)
            values = {
                signature.inputs[place].name: leaves[i].detach()
                for i, place in enumerate(signature.in_leaves)
                if not isinstance(place, Literal)
            }
            for name in signature.inputs_of(RoleKind.SEED):
                values[name] = torch.randint(2**62, ())
            found.append(values)
        return found

    @property
    def latest(self) -> NoReturn:
        """A pipeline has no plan of placements."""
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
            self._made.clear()
            if self._latest is not None:
                self._latest[1].close()
            if self._engine is not None:
                self._engine.close()


def cut_batch(call: CallArgs, wanted: int | str, ranks: int) -> list[CallArgs]:
    """The call cut into micro-batches along the first dimension of its first tensor and of all others of that size.

    wanted: how many, "auto" for twice the ranks or the largest divisor below that. InputError where that does not divide the batch.
    """
    leaves, spec = pytree.tree_flatten(call)
    sizes = [leaf.shape[0] for leaf in leaves if isinstance(leaf, Tensor) and leaf.dim()]
    if not sizes:
        raise InputError("a pipeline cuts a batch along the first dimension of its tensors; found no tensor with a dimension")
    rows = sizes[0]
    count = next(n for n in range(min(2 * ranks, rows), 0, -1) if rows % n == 0) if wanted == "auto" else int(wanted)
    if rows % count:
        divisors = [n for n in range(1, rows + 1) if rows % n == 0]
        near = min(divisors, key=lambda n: (abs(n - count), n))
        raise InputError(
            f"a batch of {rows} rows does not divide into {count} micro-batches: use a batch of {count * -(-rows // count)} rows, "
            f"or microbatches={near}"
        )
    step = rows // count

    def part(leaf: Any, k: int) -> Any:
        batched = isinstance(leaf, Tensor) and leaf.dim() and leaf.shape[0] == rows
        return leaf.narrow(0, k * step, step) if batched else leaf

    return [pytree.tree_unflatten([part(leaf, k) for leaf in leaves], spec) for k in range(count)]


def _joined(*pieces: Any) -> Any:
    """One output of all micro-batches: rows joined; scalars and what is no tensor must agree, means of losses are averaged."""
    if not isinstance(pieces[0], Tensor):
        return pieces[0]
    return torch.cat(pieces) if pieces[0].dim() else torch.stack(pieces).mean()


@contextlib.contextmanager
def _mode(model: nn.Module, *, training: bool) -> Iterator[None]:
    before = model.training
    model.__dict__["training"] = training
    try:
        yield
    finally:
        model.__dict__["training"] = before
