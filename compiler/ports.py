"""What stands on the inputs and outputs of an emitted program: roles, global shapes, dtypes and layouts."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.fx as fx

from ..runtime.errors import ProgramError
from ..runtime.mesh import Mesh
from ..runtime.program import NO_DTYPE, PortSpec
from .instructions import refusal
from .layout import format_placement, local_shape
from .program import Note, Program, Role, note, producer


@dataclass
class Ports:
    """Descriptions of inputs and outputs.

    logical: the program before lowering, whose values have the global shapes; without it they come from the notes.
    """

    program: Program
    mesh: Mesh
    logical: Program | None

    def inputs(self) -> Iterable[PortSpec]:
        """One port per placeholder."""
        logical = self.logical.placeholders if self.logical else [None] * len(self.program.signature.inputs)
        for role, node, original in zip(self.program.signature.inputs, self.program.placeholders, logical, strict=True):
            yield self._spec(role, node, original)

    def outputs(self) -> Iterable[PortSpec]:
        """One port per result; of dtype NO_DTYPE where the result is None."""
        logical = self.logical.results if self.logical else [None] * len(self.program.signature.outputs)
        for role, node, original in zip(self.program.signature.outputs, self.program.results, logical, strict=True):
            yield PortSpec(role.kind.value, role.name, (), NO_DTYPE, ()) if node is None else self._spec(role, node, original)

    def _spec(self, role: Role, node: fx.Node, original: fx.Node | None) -> PortSpec:
        value = node.meta["val"]
        if not isinstance(value, torch.Tensor):
            raise refusal(node, f"{role} must be a tensor, found {type(value).__name__}")
        if self.program.mesh is None:
            layout: tuple[str, ...] = ("R",) * len(self.mesh.axes)
            shape = tuple(value.shape)
        else:
            source, index = producer(node)
            known = note(source)
            if known.layouts is None or known.layouts[index] is None:
                raise refusal(node, f"{role} has no layout in a program lowered to mesh {self.mesh}")
            layout = tuple(map(format_placement, known.layouts[index] or ()))
            shape = self._global_shape(role, known, index, tuple(value.shape), original)
            local = local_shape(shape, known.layouts[index] or (), self.mesh)
            if local != tuple(value.shape):
                raise refusal(node, f"{role} of global shape {shape} should be {local} on rank 0, found {tuple(value.shape)}")
        return PortSpec(role.kind.value, role.name, tuple(map(int, shape)), str(value.dtype).removeprefix("torch."), layout)

    def _global_shape(
        self, role: Role, known: Note, index: int, local: tuple[int, ...], original: fx.Node | None
    ) -> tuple[int, ...]:
        if original is not None:
            return tuple(int(size) for size in original.meta["val"].shape)
        if known.global_shapes is not None and known.global_shapes[index] is not None:
            return known.global_shapes[index] or ()
        shape = known.shapes[index] if known.shapes is not None else None
        if shape is not None:
            return tuple(int(size.subs({s: self.program.sizes[str(s)] for s in size.free_symbols})) for size in shape)
        if any(format_placement(p).startswith("S") for p in (known.layouts or ())[index] or ()):
            raise ProgramError(f"the global shape of {role} is unknown; pass the program from before lowering as `logical`")
        return local
