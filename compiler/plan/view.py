"""A program as the planner sees it: sites that make and use values.

A site is an op, an input or a result; a value is one tensor output of a site, with all its uses. ``getitem`` nodes are seen
through. Where a result must lie exactly like an input (an updated buffer, the gradient of a parameter), the input's own site uses
the value, so that one choice settles both.
"""

from __future__ import annotations

import operator
from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.fx as fx

from ..cost.ops import MATMULS, is_view, packet
from ..program import Program, Role, RoleKind, note, producer, tensor_inputs, tensor_leaves

STORED = (RoleKind.PARAM, RoleKind.BUFFER, RoleKind.STATE)
"""Inputs that live on the ranks from step to step."""


@dataclass(frozen=True)
class TensorType:
    """Global sizes and element type of a value."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def itemsize(self) -> int:
        """Bytes per element."""
        return self.dtype.itemsize


@dataclass
class Value:
    """One tensor. maker: (site, output index); uses: (site, slot); from_input: whether the user's data of this step is in it."""

    maker: tuple[int, int]
    type: TensorType
    from_input: bool
    uses: list[tuple[int, int]] = field(default_factory=list)


@dataclass
class Site:
    """An op (node set, role None), an input (node and role set) or a result (role set, position >= 0).

    uses: values in slot order; makes: value per output, None for what is no tensor; signature: a number, equal for sites with equal
    rules and work.
    """

    name: str
    uses: tuple[int, ...]
    makes: tuple[int | None, ...]
    signature: int
    node: fx.Node | None = None
    role: Role | None = None
    position: int = -1

    @property
    def is_op(self) -> bool:
        """True for a computation."""
        return self.role is None

    @property
    def is_input(self) -> bool:
        """True for a placeholder."""
        return self.role is not None and self.node is not None


@dataclass(frozen=True)
class View:
    """All sites in program order (inputs and ops first, then results) and all values.

    results: for every program output the (site, slot) that uses it, None for an absent output.
    """

    program: Program
    sites: tuple[Site, ...]
    values: tuple[Value, ...]
    results: tuple[tuple[int, int] | None, ...]

    def inputs(self) -> list[Site]:
        """The sites of the placeholders that are tensors."""
        return [site for site in self.sites if site.is_input and site.makes[0] is not None]

    def source_of(self, site: Site) -> str:
        """The user's line behind a site."""
        return note(site.node).source if site.node is not None else ""


def view_program(program: Program, *, gradients_like_parameters: bool) -> View:
    """Read the graph once. Every op and every placeholder becomes a site; every result too unless an input's site uses it."""
    builder = _Builder()
    for role, node in zip(program.signature.inputs, program.placeholders, strict=True):
        builder.add_input(node, role)
    for node in program.nodes:
        if node.op == "call_function" and node.target is not operator.getitem:
            builder.add_op(node)
    for position, (role, result) in enumerate(zip(program.signature.outputs, program.results, strict=True)):
        builder.add_result(position, role, result, gradients_like_parameters=gradients_like_parameters)
    return View(program, tuple(builder.sites), tuple(builder.values), tuple(builder.results))


class _Builder:
    def __init__(self) -> None:
        self.sites: list[Site] = []
        self.values: list[Value] = []
        self.results: list[tuple[int, int] | None] = []
        self._value_of: dict[tuple[fx.Node, int], int] = {}
        self._inputs: dict[tuple[RoleKind, str], int] = {}
        self._types: dict[TensorType, TensorType] = {}
        self._signatures: dict[Hashable, int] = {}

    def add_input(self, node: fx.Node, role: Role) -> None:
        self._inputs[(role.kind, role.name)] = len(self.sites)
        fresh = role.kind in (RoleKind.INPUT, RoleKind.TANGENT)
        self._add_site(Site(node.name, (), (), 0, node, role), ("input", role.kind), from_input=fresh)

    def add_op(self, node: fx.Node) -> None:
        arguments = tensor_inputs(node)
        uses = tuple(self._value_of[producer(argument)] for argument in arguments)
        signature = (node.target, self._described(node.args), self._described(node.kwargs))
        fresh = any(self.values[v].from_input for v in uses)
        self._add_site(Site(node.name, uses, (), 0, node), signature, from_input=fresh)

    def add_result(self, position: int, role: Role, node: fx.Node | None, *, gradients_like_parameters: bool) -> None:
        value = self._value_of.get(producer(node)) if node is not None else None
        if value is None:
            self.results.append(None)
            return
        twin = self._twin(role, gradients_like_parameters=gradients_like_parameters)
        if twin is None or self.sites[twin].makes[0] is None:
            site = Site(str(role), (value,), (), 0, role=role, position=position)
            self.results.append((len(self.sites), 0))
            self._add_site(site, ("result", role.kind, self.values[value].type), from_input=False)
            return
        slot = len(self.sites[twin].uses)
        self.sites[twin].uses += (value,)
        self.values[value].uses.append((twin, slot))
        self.results.append((twin, slot))

    def _twin(self, role: Role, *, gradients_like_parameters: bool) -> int | None:
        """The input that must lie as this result does."""
        if role.kind is RoleKind.UPDATE:
            kinds: tuple[RoleKind, ...] = (*STORED, RoleKind.INPUT)
        elif role.kind is RoleKind.GRADIENT and gradients_like_parameters:
            kinds = (RoleKind.PARAM,)
        else:
            return None
        return next((self._inputs[(kind, role.name)] for kind in kinds if (kind, role.name) in self._inputs), None)

    def _add_site(self, site: Site, signature: Hashable, *, from_input: bool) -> None:
        index = len(self.sites)
        for slot, value in enumerate(site.uses):
            self.values[value].uses.append((index, slot))
        if site.node is not None:
            makes: list[int | None] = []
            for output, leaf in enumerate(tensor_leaves(site.node.meta["val"])):
                makes.append(len(self.values) if isinstance(leaf, torch.Tensor) else None)
                if isinstance(leaf, torch.Tensor):
                    self._value_of[(site.node, output)] = len(self.values)
                    self.values.append(Value((index, output), self._type(leaf), from_input))
            site.makes = tuple(makes)
            signature = (signature, tuple(None if v is None else self.values[v].type for v in makes))
        site.signature = self._signatures.setdefault(signature, len(self._signatures))
        self.sites.append(site)

    def _type(self, tensor: torch.Tensor) -> TensorType:
        fresh = TensorType(tuple(int(size) for size in tensor.shape), tensor.dtype)
        return self._types.setdefault(fresh, fresh)

    def _described(self, value: Any) -> Hashable:
        """Arguments with tensors replaced by their types: what rules and work depend on."""
        if isinstance(value, fx.Node):
            found = value.meta.get("val")
            if isinstance(found, torch.Tensor):
                return self.values[self._value_of[producer(value)]].type
            return str(found)
        if isinstance(value, (tuple, list)):
            return tuple(self._described(item) for item in value)
        if isinstance(value, dict):
            return tuple((key, self._described(item)) for key, item in value.items())
        # 1, 1.0 and True are equal and hash alike, but are different arguments
        return (type(value).__name__, value if value.__hash__ else repr(value))


def weight_uses(view: View, site: Site) -> list[tuple[int, int]]:
    """The (op site, slot) of every dense product that a parameter feeds, through views and casts."""
    found: list[tuple[int, int]] = []
    pending = [site.makes[0]]
    seen: set[int] = set()
    while pending:
        value = pending.pop()
        if value is None or value in seen:
            continue
        seen.add(value)
        for index, slot in view.values[value].uses:
            user = view.sites[index]
            if user.node is None or not user.is_op:
                continue
            if packet(user.node.target) in MATMULS:
                found.append((index, slot))
            elif is_view(user.node.target) or user.node.target is torch.ops.aten._to_copy.default:
                pending.extend(user.makes)
    return found
