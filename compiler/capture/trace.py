"""One run of the user's function under make_fx: the raw graph of forward and backward, and what each input and output is.

The function runs once, on fake tensors, so nothing is computed. Inputs that only become known on the way (the tangents need the
outputs, the seed needs a first random op) are added as placeholders when they come up; ``flatten`` puts them in their place.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.fx as fx
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.fx._lazy_graph_module import _use_lazy_graph_module
from torch.fx.experimental.proxy_tensor import get_proxy_mode, make_fx, track_tensor_tree
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import TreeSpec

from ..chains.loops import loop_operators
from ..errors import CaptureError
from ..program import NOTE, Literal, Note, Role, RoleKind
from ..rules.decompose import exact_decompositions
from .counter_random import CounterRandom
from .hidden import attributes_of, holds_tensors, moved, refusing_draws
from .leaves import check_output, flatten_outputs
from .lift import holding
from .recorder import Recorder
from .sources import SourceFinder


@dataclass
class Raw:
    """What a trace gives: placeholders of ``graph`` are named by ``inputs`` in graph order, its flat outputs by ``outputs``.

    moved: attributes of submodules that the function has changed, with their new values; dropped: name and class of outputs that
    are objects with tensors inside.
    """

    graph: fx.GraphModule
    inputs: dict[str, Role]
    outputs: list[Role]
    out_spec: TreeSpec | None
    out_leaves: list[int | Literal]
    moved: dict[tuple[str, str], Any] = field(default_factory=dict)
    dropped: list[tuple[str, str]] = field(default_factory=list)


@dataclass(frozen=True)
class Aim:
    """What is wanted of a trace.

    train: with the backward. loss_of: picks the scalar to differentiate from the result; without it every differentiable output
    has a tangent. regions: trace repeated blocks once.
    """

    train: bool
    loss_of: Callable[[Any], torch.Tensor] | None = None
    regions: bool = True


@dataclass
class Request:
    """What to trace.

    call: the user's function of ``leaves`` (the INPUT tensors, in order; it rebuilds the tree). module: whose parameters and
    buffers (real tensors, by id in ``replacements``) are lifted. roles, fakes: of all starting inputs, in order. tangents: tensors
    whose form the tangent of that name takes, where it is not the output's own. blocks: prepares repeated blocks, once the module
    holds its fakes.
    """

    call: Callable[..., Any]
    module: nn.Module | None
    roles: list[Role]
    fakes: list[torch.Tensor]
    replacements: dict[int, torch.Tensor]
    mode: FakeTensorMode
    aim: Aim
    finder: SourceFinder = field(default_factory=lambda: SourceFinder({}))
    tangents: dict[str, torch.Tensor] = field(default_factory=dict)
    blocks: Callable[[], None] = lambda: None


class Tracer:
    """Runs one request. Use once."""

    def __init__(self, request: Request) -> None:
        self.request = request
        self.added: dict[str, Role] = {}
        self.outputs: list[Role] = []
        self.updates: list[Role] = []
        self.out_spec: TreeSpec | None = None
        self.out_leaves: list[int | Literal] = []
        self.moved: dict[tuple[str, str], Any] = {}
        self.dropped: list[tuple[str, str]] = []
        self.random = CounterRandom(lambda: self.new_input(Role(RoleKind.SEED, "seed"), torch.empty, [], dtype=torch.int64))

    def run(self) -> Raw:
        """Trace. Whatever the user's function raises comes out as it is."""
        request = self.request
        request.finder.entry.add(self._step.__func__.__code__)  # type: ignore[attr-defined]
        with contextlib.ExitStack() as stack:
            for context in (_quiet_backends(), request.mode, self.random.generator_state(), _use_lazy_graph_module(True)):  # noqa: FBT003
                stack.enter_context(context)
            stack.enter_context(torch.autograd.set_multithreading_enabled(False))
            stack.enter_context(loop_operators())
            traced = make_fx(
                lambda *flat: self._step(*flat), decomposition_table=exact_decompositions(), _allow_non_fake_inputs=True
            )
            module = traced(*request.fakes)
        inputs = dict(self.added)
        starting = iter(request.roles)
        for node in module.graph.nodes:
            if node.op == "placeholder":
                if node.name not in inputs:
                    inputs[node.name] = next(starting)
                node.meta[NOTE] = Note(role=inputs[node.name])
        return Raw(module, inputs, self.outputs + self.updates, self.out_spec, self.out_leaves, self.moved, self.dropped)

    def new_input(self, role: Role, make: Callable[..., torch.Tensor], *args: Any, **kwargs: Any) -> torch.Tensor:
        """A further input in the middle of the trace: ``make(*args, **kwargs)`` gives its fake tensor."""
        mode = get_proxy_mode()
        assert mode is not None
        with _disable_current_modes(), self.request.mode:
            fake = make(*args, **kwargs)
        proxy = mode.tracer.create_proxy("placeholder", f"added_{len(self.added)}", (), {})
        track_tensor_tree(fake, proxy, constant=None, tracer=mode.tracer)
        self.added[proxy.node.name] = role
        return fake

    def _step(self, *flat: torch.Tensor) -> list[Any]:
        request = self.request
        proxy_mode = get_proxy_mode()
        assert proxy_mode is not None
        recorder = Recorder(proxy_mode.tracer.graph, request.finder, self.random)
        inputs = [t for t, role in zip(flat, request.roles, strict=True) if role.kind is RoleKind.INPUT]
        with holding(request.module, request.replacements), recorder, torch.set_grad_enabled(request.aim.train):
            before = attributes_of(request.module)
            request.blocks()
            with refusing_draws():
                result = request.call(*inputs)
            self.moved = moved(before, attributes_of(request.module))
            loss = request.aim.loss_of(result) if request.aim.loss_of else None
            values = self._name_outputs(result, loss)
            updates = self._reassigned_buffers(flat)
            gradients = self._differentiate(values, flat, loss) if request.aim.train else []
        return values + gradients + updates

    def _name_outputs(self, result: Any, loss: torch.Tensor | None) -> list[Any]:
        named, self.out_spec = flatten_outputs(result if loss is None else loss)
        if loss is not None:
            named = [("loss", loss)]
        values: list[Any] = []
        for name, value in named:
            if not isinstance(value, torch.Tensor):
                opaque = holds_tensors(value)
                self.out_leaves.append(Literal(None if opaque else value))
                self.dropped += [(name, type(value).__name__)] if opaque else []
                continue
            check_output(name, value, str(self.request.finder.kinds.get("", "the function")))
            self.out_leaves.append(len(values))
            self.outputs.append(Role(RoleKind.OUTPUT, name))
            values.append(value)
        if not values:
            raise CaptureError("the function returns no tensor; return what should be computed")
        return values

    def _differentiate(self, values: list[torch.Tensor], flat: tuple[torch.Tensor, ...], loss: torch.Tensor | None) -> list[Any]:
        wanted = [(t, role) for t, role in zip(flat, self.request.roles, strict=True) if t.requires_grad]
        names = [role.name for role in self.outputs]
        self.outputs += [Role(RoleKind.GRADIENT, role.name) for _, role in wanted]
        sources = [(v, n) for v, n in zip(values, names, strict=True) if v.requires_grad] if loss is None else [(loss, "loss")]
        if not sources or not wanted:
            return [None] * len(wanted)
        tangents = None
        if loss is None:
            tangents = [self._new_tangent(name, value) for value, name in sources]
        gradients = torch.autograd.grad([v for v, _ in sources], [t for t, _ in wanted], tangents, allow_unused=True)
        return list(gradients)

    def _new_tangent(self, name: str, output: torch.Tensor) -> torch.Tensor:
        role, form = Role(RoleKind.TANGENT, name), self.request.tangents.get(name)
        if form is None:
            return self.new_input(role, torch.empty_like, output.detach())
        return self.new_input(role, torch.empty_strided, form.shape, form.stride(), dtype=form.dtype, device=form.device)

    def _reassigned_buffers(self, flat: tuple[torch.Tensor, ...]) -> list[torch.Tensor]:
        """New values of buffers that the forward pass replaced (``self.count = self.count + 1``) instead of changing in place."""
        module = self.request.module
        if module is None:
            return []
        now = dict(module.named_buffers())
        updates = []
        for before, role in zip(flat, self.request.roles, strict=True):
            value = now.get(role.name) if role.kind is RoleKind.BUFFER else None
            if value is None or value is before:
                continue
            if value.shape != before.shape or value.dtype != before.dtype:
                raise CaptureError(
                    f"buffer {role.name} becomes {value.dtype} of shape {tuple(value.shape)} instead of {before.dtype} of shape "
                    f"{tuple(before.shape)} in the forward pass; a program's state keeps its shape and dtype"
                )
            self.updates.append(Role(RoleKind.UPDATE, role.name))
            updates.append(value.detach())
        return updates


@contextlib.contextmanager
def _quiet_backends() -> Iterator[None]:
    """Without the backends that hide a model in one opaque op: fused recurrent nets, the encoder's fast path, cuDNN's norms."""
    fast, onednn, cudnn = torch.backends.mha.get_fastpath_enabled(), torch._C._get_mkldnn_enabled(), torch._C._get_cudnn_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    torch._C._set_mkldnn_enabled(False)  # noqa: FBT003
    torch._C._set_cudnn_enabled(False)  # noqa: FBT003
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        torch._C._set_mkldnn_enabled(onednn)
        torch._C._set_cudnn_enabled(cudnn)
