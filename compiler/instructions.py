"""From the nodes of a graph, one by one, to instructions: names become slots, rank-dependent integers expressions."""

from __future__ import annotations

import operator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.fx as fx

from ..runtime.errors import ProgramError
from ..runtime.instruction import CallForm, Instruction
from ..runtime.mesh import Mesh
from ..runtime.ops import COLLECTIVES, NAMESPACES, WAIT, op_name
from ..runtime.program import Collective
from ..runtime.shards import coordinate, local_offset, local_size, padding
from ..runtime.templates import ARITHMETIC, encode_constant
from .program import note

_INTEGER_OPERATORS: dict[Any, str] = {function: name for name, function in ARITHMETIC.items()}


@dataclass
class Emitter:
    """Turns nodes into instructions. values: node -> template of its value (a list of templates for several outputs)."""

    mesh: Mesh
    values: dict[fx.Node, Any] = field(default_factory=dict)
    instructions: list[Instruction] = field(default_factory=list)
    collectives: list[Collective] = field(default_factory=list)
    locations: list[str] = field(default_factory=lambda: [""])
    slots: int = 0
    _forms: dict[str, CallForm] = field(default_factory=dict)
    _location_ids: dict[str, int] = field(default_factory=lambda: {"": 0})
    _waited: dict[int, Any] = field(default_factory=dict)
    _pending: set[int] = field(default_factory=set)

    def add(self, node: fx.Node) -> None:
        """One node: an instruction, an integer expression, or another name for a value."""
        target = node.target
        if target is operator.getitem:
            self.values[node] = self.values[node.args[0]][node.args[1]]  # type: ignore[index]
        elif isinstance(target, torch._ops.OpOverload):
            self._call(node, op_name(target))
        else:
            self.values[node] = self._integer(node, target)

    def _call(self, node: fx.Node, op: str) -> None:
        namespace = op.partition(".")[0]
        if namespace not in NAMESPACES:
            raise refusal(
                node,
                f"a program holds ops of {', '.join(NAMESPACES)} only, and {namespace} is somebody else's; ask the library for an "
                "implementation in plain torch ops (transformers: experts_implementation='batched_mm' or 'eager' in the config)",
            )
        args = [self._encode(arg, node) for arg in node.args]
        if op == WAIT:
            pending = args[0]["slot"]
            if pending in self._waited or not self.is_pending(pending):
                self.values[node] = self._waited.get(pending, args[0])
                return
        if op in COLLECTIVES:
            self._collective(node, op, args)
        kwargs = {name: self._encode(arg, node) for name, arg in node.kwargs.items()}
        outputs, spread = self._outputs(node)
        form, reads = CallForm.of(op, args, kwargs, len(outputs) if spread else 0, note(node).phase.value)
        form = self._forms.setdefault(repr(form), form)
        self.instructions.append(Instruction(form, reads, outputs, (), self._location(node)))
        if op == WAIT:
            self._waited[args[0]["slot"]] = self.values[node]

    def is_pending(self, slot: int) -> bool:
        """Whether a slot holds the result of a collective that must be waited for."""
        return slot in self._pending

    def _outputs(self, node: fx.Node) -> tuple[tuple[int, ...], bool]:
        value = node.meta["val"]
        if not isinstance(value, (tuple, list)):
            self.values[node] = {"slot": self._new_slot()}
            return (self.slots - 1,), False
        read: set[Any] = {user.args[1] if user.target is operator.getitem else None for user in node.users}
        slots = [self._new_slot() if None in read or {i, i - len(value)} & read else -1 for i in range(len(value))]
        self.values[node] = [{"slot": slot} if slot >= 0 else None for slot in slots]
        return tuple(slots), True

    def _new_slot(self) -> int:
        self.slots += 1
        return self.slots - 1

    def _collective(self, node: fx.Node, op: str, args: list[Any]) -> None:
        """Check a collective against the mesh and record it."""
        shape = COLLECTIVES[op]
        if node.kwargs or len(args) <= shape.axis:
            raise refusal(node, "the arguments of a collective must all be positional")
        axis = args[shape.axis]
        if axis not in self.mesh.names:
            raise refusal(node, f"group {axis!r} is no axis of mesh {self.mesh}")
        if shape.size is not None and args[shape.size] != self.mesh.axis_size(axis):
            raise refusal(node, f"axis {axis!r} has {self.mesh.axis_size(axis)} ranks, found a group size of {args[shape.size]}")
        value = node.args[0].meta["val"]  # type: ignore[union-attr]
        dtype = str(value.dtype).removeprefix("torch.")
        self.collectives.append(Collective(len(self.instructions), op, axis, tuple(map(int, value.shape)), dtype))
        self._pending.add(self.slots)

    def _integer(self, node: fx.Node, target: Any) -> Any:
        """The expression of a rank-dependent integer."""
        args = [self._encode(arg, node) for arg in node.args]
        if target is coordinate:
            return {"coordinate": args[0]}
        if target in (local_size, local_offset):
            tag = "size" if target is local_size else "offset"
            total, parts, index = args
            axis = index.get("coordinate") if isinstance(index, dict) else None
            whole = axis is not None and self.mesh.axis_size(axis) == parts
            return {tag: [total, axis] if whole else [total, parts, index]}
        if target is padding:
            have, want = args
            return {"sub": [want, have]}
        if target in _INTEGER_OPERATORS and len(args) == 2:
            return {_INTEGER_OPERATORS[target]: args}
        raise refusal(node, f"{target} cannot be part of a program")

    def _encode(self, arg: Any, node: fx.Node) -> Any:
        if isinstance(arg, fx.Node):
            return self.values[arg]
        if isinstance(arg, (list, tuple)):
            return [self._encode(item, node) for item in arg]
        try:
            return encode_constant(arg)
        except TypeError as error:
            raise refusal(node, str(error)) from error

    def _location(self, node: fx.Node) -> int:
        source = note(node).source
        known = self._location_ids.get(source)
        if known is None:
            known = self._location_ids[source] = len(self.locations)
            self.locations.append(source)
        return known


def refusal(node: fx.Node, message: str) -> ProgramError:
    """An error that names the node and the user's line."""
    return ProgramError(f"{node.name} ({node.target}): {message}, from {note(node).source or 'an unknown line'}")
