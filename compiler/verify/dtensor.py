"""A module whose parameters are DTensors, as one ATen graph per rank with functional collectives; all ranks in this process.

The module is traced once for every rank by torch's own dispatcher, with the mesh set to that rank's coordinate. Local pieces are
inputs of the graph; parameters, gradients and outputs leave in the layout that DTensor itself says they have. Nothing is sent, so
the process group may be torch's fake one.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.fx as fx
import torch.utils._pytree as pytree
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta
from torch.fx.experimental.proxy_tensor import make_fx

from ...runtime.mesh import Mesh
from ..capture.failures import without_torchs_log
from ..capture.leaves import flatten_outputs
from ..errors import HocketError, InputError
from ..layout import Layout, format_layout, local_shape, parse_placement, replicated
from ..program import Program, Role, RoleKind
from .foreign import Layouts, Ports, program_of


def is_dtensor_module(target: object) -> bool:
    """Whether a module has a DTensor among its parameters and buffers."""
    return isinstance(target, nn.Module) and any(isinstance(t, DTensor) for t in (*target.parameters(), *target.buffers()))


def dtensor_program(module: nn.Module, reference: Program, arguments: tuple[Any, Any], layouts: Layouts | None = None) -> Program:
    """The lowered program that a DTensor module runs, with the roles of ``reference``.

    arguments: (args, kwargs) with global values. layouts: of inputs (and plain outputs) that every rank sees only a piece of; a
    plain tensor is replicated otherwise. Raises InputError where the module does not have the reference's parameters and inputs.
    """
    device_mesh = _mesh_of(module)
    mesh = _as_mesh(device_mesh)
    tracer = _Tracer(module, reference, arguments, device_mesh, mesh, dict(layouts or {}))
    graphs = [tracer.trace(rank) for rank in range(mesh.size)]
    groups = {str(device_mesh.get_group(dim).group_name): name for dim, name in enumerate(mesh.names)}
    inputs = tuple(role for role in reference.signature.inputs if role in tracer.pieces)
    values = tuple(
        node.meta["val"]
        for role, node in zip(reference.signature.inputs, reference.placeholders, strict=True)
        if role in tracer.pieces
    )
    found = {str(role): layout for role, layout in (*tracer.pieces.items(), *tracer.results.items())}
    ports = Ports(inputs, tuple(tracer.results), values)
    return program_of(graphs, ports, mesh, found, groups)


def _mesh_of(module: nn.Module) -> DeviceMesh:
    meshes = {t.device_mesh for t in (*module.parameters(), *module.buffers()) if isinstance(t, DTensor)}
    if len(meshes) != 1:
        raise InputError(f"expected all DTensors of the module on one device mesh, found {len(meshes)}")
    return meshes.pop()


def _as_mesh(device_mesh: DeviceMesh) -> Mesh:
    names = device_mesh.mesh_dim_names or tuple(f"axis{dim}" for dim in range(device_mesh.ndim))
    ranks = device_mesh.mesh.flatten().tolist()
    if ranks != list(range(len(ranks))):
        raise InputError(f"expected a device mesh over ranks 0 to {len(ranks) - 1} in order, found {ranks}")
    return Mesh(tuple(zip(names, map(int, device_mesh.mesh.shape), strict=True)))


@dataclass
class _Tracer:
    """pieces: layout per input role; results: layout per output role, as the last trace found them."""

    module: nn.Module
    reference: Program
    arguments: tuple[Any, Any]
    device_mesh: DeviceMesh
    mesh: Mesh
    layouts: dict[str, Any]
    pieces: dict[Role, Layout] = field(default_factory=dict)
    results: dict[Role, Layout] = field(default_factory=dict)

    def trace(self, rank: int) -> fx.GraphModule:
        """One rank's graph. Inputs and outputs are in the order of ``pieces`` and ``results``."""
        roles = [role for role in self.reference.signature.inputs if role.kind is not RoleKind.CONSTANT]
        state = {**dict(self.module.named_parameters()), **dict(self.module.named_buffers())}
        self._check_names(state, roles)
        self.pieces = {role: self._layout_in(role, state) for role in roles if role.kind is not RoleKind.TANGENT}
        tangents = [role for role in roles if role.kind is RoleKind.TANGENT]
        with _as_rank(self.device_mesh, self.mesh, rank), without_torchs_log():
            locals_ = [self._piece(role, rank) for role in self.pieces]
            shapes = [self._tangent(role, rank) for role in tangents]
            try:
                return make_fx(lambda *flat: self._step(flat, state, tangents), _allow_non_fake_inputs=True)(*locals_, *shapes)
            except HocketError:
                raise
            except Exception as error:
                raise InputError(f"the DTensor module cannot be traced for rank {rank}: {type(error).__name__}: {error}") from error

    def _check_names(self, state: Mapping[str, Any], roles: Sequence[Role]) -> None:
        wanted = {role.name for role in roles if role.kind in (RoleKind.PARAM, RoleKind.BUFFER)}
        if wanted != set(state):
            raise InputError(f"the two modules have other parameters and buffers: {', '.join(sorted(wanted ^ set(state)))}")

    def _layout_in(self, role: Role, state: Mapping[str, Any]) -> Layout:
        tensor = state.get(role.name) if role.kind in (RoleKind.PARAM, RoleKind.BUFFER) else None
        if isinstance(tensor, DTensor):
            return tuple(tensor.placements)
        return self._given(role)

    def _given(self, role: Role) -> Layout:
        text = self.layouts.get(str(role), self.layouts.get(role.name, replicated(self.mesh)))
        layout = tuple(map(parse_placement, text.split(","))) if isinstance(text, str) else tuple(text)
        if len(layout) != len(self.mesh.axes):
            raise InputError(f"layout {format_layout(layout)} of {role} needs one placement for each axis of mesh {self.mesh}")
        return layout

    def _value(self, role: Role) -> torch.Tensor:
        value = self.reference.input_node(role.kind, role.name).meta["val"]
        assert isinstance(value, torch.Tensor)
        return value

    def _piece(self, role: Role, rank: int) -> torch.Tensor:
        value = self._value(role)
        shape = local_shape(tuple(value.shape), self.pieces[role], self.mesh, rank)
        if not (value.is_floating_point() or value.is_complex()):
            return torch.zeros(shape, dtype=value.dtype)
        return torch.ones(shape, dtype=value.dtype).requires_grad_(self._differentiated(role))

    def _differentiated(self, role: Role) -> bool:
        return Role(RoleKind.GRADIENT, role.name) in self.reference.signature.outputs

    def _tangent(self, role: Role, rank: int) -> torch.Tensor:
        value = self._value(role)
        return torch.ones(local_shape(tuple(value.shape), self._given(role), self.mesh, rank), dtype=value.dtype)

    def _step(self, flat: Sequence[torch.Tensor], state: Mapping[str, Any], tangents: Sequence[Role]) -> list[Any]:
        given = dict(zip((*self.pieces, *tangents), flat, strict=True))
        leaves: dict[Role, Any] = {}
        for role in self.pieces:
            tensor = given[role].detach().requires_grad_(self._differentiated(role))
            original = state.get(role.name) if role.kind in (RoleKind.PARAM, RoleKind.BUFFER) else None
            leaves[role] = self._distributed(tensor, role, original) if isinstance(original, DTensor) else tensor
        named = {role.name: value for role, value in leaves.items() if role.kind in (RoleKind.PARAM, RoleKind.BUFFER)}
        result = torch.func.functional_call(self.module, named, *self._call(leaves))
        outputs, _ = flatten_outputs(result)
        values = [(Role(RoleKind.OUTPUT, name), value) for name, value in outputs if isinstance(value, torch.Tensor)]
        self.results = {}
        flat_results = [self._leave(role, value) for role, value in values]
        return flat_results + self._gradients(dict(values), leaves, given, tangents)

    def _distributed(self, local: torch.Tensor, role: Role, original: DTensor) -> torch.Tensor:
        value = self._value(role)
        meta = TensorMeta(torch.Size(value.shape), value.stride(), value.dtype)
        spec = DTensorSpec(original.device_mesh, tuple(original.placements), tensor_meta=meta)
        return DTensor(local.detach(), spec, requires_grad=local.requires_grad)

    def _call(self, leaves: Mapping[Role, Any]) -> tuple[Any, Any]:
        """The user's arguments with the traced tensors in them."""
        tensors = iter([value for role, value in leaves.items() if role.kind is RoleKind.INPUT])
        args, kwargs = pytree.tree_map(lambda leaf: next(tensors) if isinstance(leaf, torch.Tensor) else leaf, self.arguments)
        return args, kwargs

    def _gradients(
        self, outputs: Mapping[Role, Any], leaves: Mapping[Role, Any], given: Mapping[Role, Any], tangents: Sequence[Role]
    ) -> list[Any]:
        wanted = [role for role in leaves if self._differentiated(role)]
        if not wanted:
            return []
        sources, seeds = [], []
        for tangent in tangents:
            value = outputs.get(Role(RoleKind.OUTPUT, tangent.name))
            if value is None:
                raise InputError(f"the DTensor module returns no {tangent.name}, which the original returns")
            sources.append(value)
            seed: Any = given[tangent]
            layout = self._given(tangent)
            if isinstance(value, DTensor):
                seed = DTensor.from_local(seed, self.device_mesh, layout, run_check=False, shape=value.shape, stride=value.stride())
            seeds.append(seed)
            self.pieces[tangent] = layout
        found = torch.autograd.grad(sources, [leaves[role] for role in wanted], seeds, allow_unused=True)
        return [
            self._leave(Role(RoleKind.GRADIENT, role.name), g, self.pieces[role]) for role, g in zip(wanted, found, strict=True)
        ]

    def _leave(self, role: Role, value: Any, plain: Layout | None = None) -> Any:
        """The local piece of a result, whose layout is recorded."""
        if isinstance(value, DTensor):
            self.results[role] = tuple(value.placements)
            local: Any = value._local_tensor
            return local.wait() if hasattr(local, "wait") else local
        self.results[role] = plain if plain is not None else self._given(role)
        return value


@contextlib.contextmanager
def _as_rank(device_mesh: DeviceMesh, mesh: Mesh, rank: int) -> Iterator[None]:
    """The device mesh as another rank sees it. Sharding decisions that torch has cached for the rank before are forgotten."""
    before = device_mesh._coordinate_on_dim
    where = mesh.coordinate(rank)
    _forget()
    device_mesh._coordinate_on_dim = tuple(where[name] for name in mesh.names)
    try:
        yield
    finally:
        device_mesh._coordinate_on_dim = before
        _forget()


def _forget() -> None:
    propagate: Any = DTensor._op_dispatcher.sharding_propagator.propagate_op_sharding
    clear = getattr(propagate, "cache_clear", None)
    if clear is not None:
        clear()
