"""Where a model's parameters live while ranks compute with them.

WholeState       one copy on this machine, read in place by every rank (engines local and sim)
PiecewiseState   this process is one rank and keeps its pieces, as DTensor parameters (engine attach)
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor

from ...runtime.mesh import Mesh
from ..errors import InputError
from ..layout import Layout, global_slices
from ..program import RoleKind
from .hall import Compiled
from .watch import StateWatch, copy_attributes, state_of

Named = Mapping[tuple[str, str], Tensor]
"""(kind, qualified name) -> tensor."""


class ModelState(Protocol):
    """What a session needs of the parameters and buffers of its model."""

    captured: nn.Module
    """The module to trace; its tensors are plain and have their global shapes."""

    def bindings(self, compiled: Compiled) -> Named:
        """What the engine reads, for a program that was just compiled."""
        ...

    def leaf(self, name: str) -> Tensor:
        """The tensor of that name as autograd and the user's optimizer know it."""
        ...

    def gradient(self, name: str, value: Tensor) -> Tensor:
        """The engine's gradient for that name, in the form of its leaf."""
        ...

    def watch(self) -> None:
        """The engine has the tensors now: remember what they are."""
        ...

    def changed(self) -> str:
        """Name of a tensor, submodule or attribute that the user has replaced since ``watch``, "" if none."""
        ...


class WholeState:
    """See the module."""

    def __init__(self, model: nn.Module) -> None:
        self.captured = model
        self._watch: StateWatch | None = None
        self._tensors: Named = {}

    def bindings(self, compiled: Compiled) -> Named:  # noqa: ARG002 (the same for every program)
        """The model's own tensors; the engine may move their memory."""
        self._tensors = state_of(self.captured)
        return self._tensors

    def leaf(self, name: str) -> Tensor:
        """The parameter itself."""
        return self._tensors["param", name]

    def gradient(self, name: str, value: Tensor) -> Tensor:  # noqa: ARG002 (nothing to convert)
        """The gradient itself."""
        return value

    def changed(self) -> str:
        """See ``ModelState``."""
        return self._watch.changed() if self._watch is not None else ""

    def watch(self) -> None:
        """See ``ModelState``."""
        self._watch = StateWatch(self.captured)


class PiecewiseState:
    """See the module. The values of rank 0 count, as in DistributedDataParallel.

    The model's parameters are replaced by DTensors once the first plan is known; ``captured`` is a copy with uninitialised tensors
    of the global shapes, whose memory is never touched.
    """

    def __init__(self, model: nn.Module, mesh: Mesh, rank: int, device: torch.device) -> None:
        self._model = model
        self._mesh = mesh
        self._rank = rank
        self._device_mesh: DeviceMesh = init_device_mesh(device.type, mesh.shape, mesh_dim_names=mesh.names)
        hollow = {id(p): nn.Parameter(torch.empty_like(p), requires_grad=p.requires_grad) for p in model.parameters()}
        self.captured = copy.deepcopy(model, dict(hollow))
        self._watch: StateWatch | None = None
        self._placed = False

    def bindings(self, compiled: Compiled) -> Named:
        """This rank's pieces; distributes the model at the first call."""
        if not self._placed:
            self._distribute(compiled)
            self._placed = True
        return {key: tensor.to_local() if isinstance(tensor, DTensor) else tensor for key, tensor in self._detached().items()}

    def _detached(self) -> Named:
        with torch.no_grad():
            return {key: tensor.detach() for key, tensor in state_of(self._model).items()}

    def _distribute(self, compiled: Compiled) -> None:
        program = compiled.program
        layouts: dict[str, Layout] = {}
        for node, role in zip(program.placeholders, program.signature.inputs, strict=True):
            layout = compiled.plan.nodes[node.name].outputs[0]
            if role.kind is RoleKind.PARAM and layout is not None:
                layouts[role.name] = layout
        made: dict[int, nn.Parameter] = {}
        for path, owner in self._model.named_modules():
            for name, parameter in list(owner._parameters.items()):
                if parameter is not None:
                    if id(parameter) not in made:
                        full = f"{path}.{name}" if path else name
                        made[id(parameter)] = self._cut(parameter, layouts[full])
                    owner._parameters[name] = made[id(parameter)]
        for buffer in self._model.buffers():
            dist.broadcast(buffer.data, 0)

    def _cut(self, parameter: nn.Parameter, layout: Layout) -> nn.Parameter:
        value = parameter.detach().contiguous()
        dist.broadcast(value, 0)
        for dim, (offset, length) in enumerate(global_slices(value.shape, layout, self._mesh, self._rank)):
            value = value.narrow(dim, offset, length)
        return nn.Parameter(self._as_dtensor(value.clone(), layout, parameter), requires_grad=parameter.requires_grad)

    def _as_dtensor(self, piece: Tensor, layout: Layout, whole: Any) -> DTensor:
        return DTensor.from_local(piece, self._device_mesh, layout, run_check=False, shape=whole.shape, stride=whole.stride())

    def leaf(self, name: str) -> Tensor:
        """The DTensor parameter."""
        return self._model.get_parameter(name)

    def gradient(self, name: str, value: Tensor) -> Tensor:
        """A DTensor that lies like its parameter."""
        parameter = self.leaf(name)
        if not isinstance(parameter, DTensor):
            raise InputError(f"parameter {name} was replaced by a plain tensor; load checkpoints with torch.distributed.checkpoint")
        return self._as_dtensor(value, tuple(parameter.placements), parameter)

    def changed(self) -> str:
        """See ``ModelState``. InputError where a submodule was replaced: its parameters are not distributed."""
        if self._watch is None:
            return ""
        replaced = self._watch.changed_submodule()
        if replaced:
            raise InputError(
                f"submodule {replaced} was replaced after the model was distributed; change the model before its first call"
            )
        if self._watch.changed_attribute():
            copy_attributes(self._model, self.captured)
        return self._watch.changed()

    def watch(self) -> None:
        """See ``ModelState``."""
        self._watch = StateWatch(self._model)
