"""One model on one engine: specialisations by the form of the call, the ranks' view of the parameters, and every call."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

from ...runtime.engines.base import Engine
from ..capture import Specialisations, capture
from ..errors import InputError
from ..layout import format_layout
from ..plan.tactics import capturing
from ..program import Program, RoleKind
from ..retrace import Retrace
from .autograd import Call, RanksFunction
from .hall import Compiled, Options, compile_program, prove_again, run_exactly
from .loaded import Leftovers, Loaded
from .state import ModelState
from .threads import single_threaded
from .watch import in_mode

if TYPE_CHECKING:
    from ..verify.report import Verdict

log = logging.getLogger("hocket")


class Session:
    """See the module. Made by the doors; users meet it through the parallel module."""

    def __init__(
        self,
        state: ModelState,
        open_engine: Callable[[], Engine],
        options: Options,
        *,
        capacity: int = 8,
        owns_engine: bool = True,
    ) -> None:
        """owns_engine: whether ``close`` ends the ranks too; not those of an engine that the user has opened."""
        self.state = state
        self._owns_engine = owns_engine
        self._open_engine = open_engine
        self._engine: Engine | None = None
        self.options = options
        self._closed = False
        self._latest: Loaded | None = None
        self._specialisations: Specialisations[Loaded] = Specialisations(capacity)
        self._leftovers = Leftovers()

    @property
    def engine(self) -> Engine:
        """The engine, opened when first needed: local ranks start up while the model is being compiled."""
        if self._engine is None:
            self.check_open()
            self._engine = self._open_engine()
        return self._engine

    @property
    def latest(self) -> Loaded:
        """The specialisation used last; InputError before the first call."""
        if self._latest is None:
            raise InputError("nothing is compiled yet: call the module once, or pass example_args to hocket.parallelize")
        return self._latest

    def call(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What ``module(*args, **kwargs)`` returns, computed on the ranks and differentiable in this process."""
        loaded = self.prepare(args, kwargs, mode=module.training)
        leaves = pytree.tree_leaves((args, kwargs))
        seed = int(torch.randint(2**62, ())) if loaded.needs_seed else 0
        call = Call(self.engine, loaded, leaves, seed, self.state)
        if loaded.takes_gradients:
            outputs = RanksFunction.apply(call, *loaded.differentiable_tensors(leaves, self.state.leaf))  # type: ignore[no-untyped-call]
        else:
            outputs = loaded.outputs(call.forward())
            self.engine.release(call.ticket)
        return loaded.rebuild(outputs)

    def train_step(self, _module: nn.Module, _args: tuple[Any, ...], _kwargs: dict[str, Any]) -> Tensor:
        """Only a pipeline has a training step of its own."""
        raise InputError(
            f'train_step(...) is for pipelines (mesh="pp=2"); on mesh {self.options.mesh} call the model and loss.backward(), or '
            "use hocket.train_step to have the optimizer on the ranks too"
        )

    def prepare(self, args: tuple[Any, ...], kwargs: dict[str, Any], *, mode: bool) -> Loaded:
        """The specialisation for this form of call, compiled now if it is new. mode: the module's train/eval mode."""
        self.check_open()
        moved = self.state.changed()
        if moved:
            log.warning("hocket: %s was changed since the last call: compiling again", moved)
            self._specialisations.clear()
        model = self.state.captured
        with in_mode(model, training=mode):
            train = torch.is_grad_enabled() and _needs_gradient(model, args, kwargs)
            self._latest = self._specialisations.get(model, args, kwargs, training=train, make=self._compile)
        return self._latest

    def check_open(self) -> None:
        """InputError once closed."""
        if self._closed:
            raise InputError("this parallel module was closed; make a new one with hocket.parallelize")

    @single_threaded
    def _compile(self, train: bool, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Loaded:  # noqa: FBT001 (a callback)
        start = time.perf_counter()

        def captured(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Program:
            with capturing(self.options.tactics):  # and not the passes and proofs, which would run in it at half the speed
                return capture(self.state.captured, args, kwargs, train=train)

        program = captured(args, kwargs)
        seconds = time.perf_counter() - start
        retrace = Retrace(self.state.captured, args, kwargs, step=captured)
        compiled = compile_program(program, self.options, retrace=retrace, fixed=self._settled()).timed(capture=seconds)
        self._leftovers.unload(self.engine)
        loaded = Loaded(self.engine, compiled, self.state.bindings(compiled))
        self._leftovers.expect(loaded)
        self.state.watch()
        return loaded

    def _settled(self) -> Mapping[str, Any]:
        """Parameter layouts of the first specialisation, where the engine keeps pieces rather than whole tensors."""
        if self.options.gradients == "any" or self._latest is None:
            return {}
        plan, program = self._latest.compiled.plan, self._latest.compiled.program
        return {
            role.name: format_layout(plan.nodes[node.name].outputs[0])
            for node, role in zip(program.placeholders, program.signature.inputs, strict=True)
            if role.kind is RoleKind.PARAM
        }

    def close(self) -> None:
        """End the ranks, unless the user has opened them. Closing twice is harmless."""
        if not self._closed:
            self._closed = True
            self._specialisations.clear()
            if self._engine is not None and self._owns_engine:
                self._engine.close()

    @property
    def compiled(self) -> Compiled:
        """The latest specialisation."""
        return self.latest.compiled

    def explain(self, topic: str = "") -> str:
        """See ``ParallelModule.explain``."""
        from ..report.text import explain

        text = explain(self.compiled, topic)
        return f"{text}{self.latest.fusion}\n" if self.latest.fusion is not None and not topic else text

    def verify(self, level: str, *, canary: bool = False) -> Verdict:
        """See ``ParallelModule.verify``."""
        compiled = self.compiled
        verdict = prove_again(compiled, self.options, level)
        return verdict.also(run_exactly(compiled, self.options, self.engine)) if canary else verdict


def _needs_gradient(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    inputs = (leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor))
    return any(t.requires_grad for t in model.parameters()) or any(t.requires_grad for t in inputs)
