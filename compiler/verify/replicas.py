"""A module wrapped in ``DistributedDataParallel``, as one graph per rank: local forward and backward, and the reducer's averaging.

The averaging is torch's own Python reducer, the one it uses under compiled autograd: a hook on every parameter that divides the
gradient by the number of ranks and sums it. It is the same average that the C++ reducer makes of whole buckets. Buckets, overlap
and ``no_sync`` are not looked at, nor is the broadcast of buffers before the forward.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ...runtime.mesh import Mesh
from ..capture.leaves import flatten_outputs
from ..errors import InputError
from ..layout import Layout, local_shape, parse_placement, replicated
from ..program import Program, Role, RoleKind
from .foreign import Layouts, Ports, program_of
from .tracing import trace_function

AXIS = "dp"


def is_replicated_module(target: object) -> bool:
    """Whether a module is wrapped in DistributedDataParallel."""
    return isinstance(target, DistributedDataParallel)


def replicas_program(
    wrapped: DistributedDataParallel, reference: Program, arguments: tuple[Any, Any], layouts: Layouts | None = None
) -> Program:
    """The lowered program that the wrapped module runs on all ranks of its process group, with the roles of ``reference``.

    arguments: (args, kwargs) with global values. layouts: of inputs that every rank sees a piece of, and of outputs: the mean loss
    of each rank's own rows is ``P(avg)``, rows of an output are ``S(0)``. Raises InputError for other parameters than the
    reference's, or a communication hook.
    """
    if getattr(wrapped, "_comm_hooks", None):
        raise InputError("the wrapped module has a communication hook, whose effect on gradients is its own; verify without it")
    mesh = Mesh(((AXIS, wrapped.process_group.size()),))
    table = {str(role): _layout(role, layouts or {}, mesh) for role in (*reference.signature.inputs, *reference.signature.outputs)}
    roles = [role for role in reference.signature.inputs if role.kind is not RoleKind.CONSTANT]
    _check_names(wrapped.module, roles)
    values = [reference.input_node(role.kind, role.name).meta["val"] for role in roles]
    graphs = []
    for rank in range(mesh.size):
        pieces = [_piece(value, table[str(role)], mesh, rank) for role, value in zip(roles, values, strict=True)]
        step = _Step(wrapped, roles, reference.signature.outputs, arguments)
        graphs.append(trace_function(step, pieces, fake=False))
    return program_of(graphs, Ports(tuple(roles), reference.signature.outputs, tuple(values)), mesh, table)


def _layout(role: Role, layouts: Layouts, mesh: Mesh) -> Layout:
    text = layouts.get(str(role), layouts.get(role.name, replicated(mesh)))
    return (parse_placement(text),) if isinstance(text, str) else tuple(text)


def _piece(value: torch.Tensor, layout: Layout, mesh: Mesh, rank: int) -> torch.Tensor:
    return torch.ones(local_shape(tuple(value.shape), layout, mesh, rank), dtype=value.dtype)


def _check_names(module: nn.Module, roles: Sequence[Role]) -> None:
    wanted = {role.name for role in roles if role.kind in (RoleKind.PARAM, RoleKind.BUFFER)}
    found = {name for name, _ in (*module.named_parameters(), *module.named_buffers())}
    if wanted != found:
        raise InputError(f"the two modules have other parameters and buffers: {', '.join(sorted(wanted ^ found))}")


class _Step:
    """One rank's forward and backward on traced tensors."""

    def __init__(
        self, wrapped: DistributedDataParallel, roles: Sequence[Role], outputs: Sequence[Role], arguments: tuple[Any, Any]
    ) -> None:
        self.wrapped, self.roles, self.outputs, self.arguments = wrapped, roles, outputs, arguments

    def __call__(self, *flat: torch.Tensor) -> list[Any]:
        given = dict(zip(self.roles, flat, strict=True))
        parameters = {r.name: t.detach().requires_grad_() for r, t in given.items() if r.kind is RoleKind.PARAM}
        buffers = {r.name: t.clone() for r, t in given.items() if r.kind is RoleKind.BUFFER}
        inputs = {r.name: self._leaf(r, t) for r, t in given.items() if r.kind is RoleKind.INPUT}
        self._hook(list(parameters.values()))
        feed = iter(inputs.values())
        args, kwargs = pytree.tree_map(lambda leaf: next(feed) if isinstance(leaf, torch.Tensor) else leaf, self.arguments)
        with _holding(self.wrapped.module, parameters, buffers):
            result = self.wrapped.module(*args, **kwargs)
        made = {name: value for name, value in flatten_outputs(result)[0] if isinstance(value, torch.Tensor)}
        tangents = {role.name: t for role, t in given.items() if role.kind is RoleKind.TANGENT}
        if tangents:
            torch.autograd.backward([made[name] for name in tangents], list(tangents.values()))
        leaves: Mapping[str, torch.Tensor] = {**parameters, **inputs}
        return [self._result(role, made, leaves, buffers) for role in self.outputs]

    def _leaf(self, role: Role, tensor: torch.Tensor) -> torch.Tensor:
        wanted = Role(RoleKind.GRADIENT, role.name) in self.outputs
        return tensor.detach().requires_grad_() if wanted else tensor

    def _hook(self, parameters: list[torch.Tensor]) -> None:
        """Torch's Python reducer on these parameters."""
        reducer = SimpleNamespace(
            require_backward_grad_sync=True,
            process_group=self.wrapped.process_group,
            _comm_hooks=[],
            _accum_grad_hooks=[],
            _module_parameters=parameters,
        )
        DistributedDataParallel._register_accum_grad_hook(reducer)  # type: ignore[arg-type]

    def _result(
        self,
        role: Role,
        made: Mapping[str, torch.Tensor],
        leaves: Mapping[str, torch.Tensor],
        buffers: Mapping[str, torch.Tensor],
    ) -> torch.Tensor | None:
        if role.kind is RoleKind.GRADIENT:
            return leaves[role.name].grad
        if role.kind is RoleKind.UPDATE:
            return buffers[role.name]
        if role.name not in made:
            raise InputError(f"the wrapped module returns no {role.name}, which the original returns")
        return made[role.name].detach()


@contextmanager
def _holding(module: nn.Module, parameters: Mapping[str, torch.Tensor], buffers: Mapping[str, torch.Tensor]) -> Iterator[None]:
    """The module with these parameters and buffers in place of its own."""
    before: list[tuple[dict[str, Any], str, Any]] = []
    for name, value in (*parameters.items(), *buffers.items()):
        path, _, last = name.rpartition(".")
        owner = module.get_submodule(path)
        table: Any = owner._parameters if name in parameters else owner._buffers
        before.append((table, last, table[last]))
        table[last] = value
    try:
        yield
    finally:
        for table, last, value in before:
            table[last] = value
