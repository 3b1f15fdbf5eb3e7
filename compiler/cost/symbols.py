"""Local sizes of values, as numbers or as expressions of a program's named sizes.

A dimension is known by name where capture's notes say so, or where it is the product of named sizes in exactly one way and no
stored tensor has a dimension of that size (a width that happens to equal the batch must not be called batch). Everything else
stays a number.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Hashable, Mapping, Sequence
from typing import TYPE_CHECKING

import sympy

from ...runtime.mesh import Mesh
from ..layout import Layout, Replicate, Shard, local_shape
from ..program import RoleKind, note
from ..redistribute import Step, StepKind
from .cluster import Cluster
from .cost import Quantity
from .ops import LocalTensor
from .transfer import Transfer

if TYPE_CHECKING:
    from ..plan.view import View

_STORED = (RoleKind.PARAM, RoleKind.BUFFER, RoleKind.STATE, RoleKind.CONSTANT)


def symbols(sizes: Mapping[str, int]) -> dict[str, sympy.Symbol]:
    """One positive integer symbol per named size; use them to substitute numbers."""
    return {name: sympy.Symbol(name, integer=True, positive=True) for name in sizes}


def named_products(sizes: Mapping[str, int]) -> dict[int, sympy.Expr | None]:
    """size -> the product of named sizes (each at most once) that equals it; None where several do. Sizes of 1 have no name."""
    known = symbols(sizes)
    names = [name for name, size in sizes.items() if size > 1]
    found: dict[int, sympy.Expr | None] = {}
    for count in range(1, min(len(names), 4) + 1):
        for chosen in itertools.combinations(names, count):
            size = math.prod(sizes[name] for name in chosen)
            found[size] = None if size in found else sympy.Mul(*(known[name] for name in chosen))
    return found


class NumericSizes:
    """Sizes as ints."""

    def __init__(self, view: View, mesh: Mesh) -> None:
        self._view, self._mesh = view, mesh
        self._known: dict[object, LocalTensor] = {}

    def local(self, value: int, layout: Layout) -> LocalTensor:
        """The largest piece of a value in a layout (that of rank 0)."""
        tensor = self._view.values[value].type
        key = (tensor, layout)
        if key not in self._known:
            self._known[key] = LocalTensor(local_shape(tensor.shape, layout, self._mesh), tensor.itemsize)
        return self._known[key]

    def identity(self, _values: Sequence[int | None]) -> Hashable:
        """Sites with equal signature and equal identity have equal work."""
        return None


class SymbolicSizes:
    """Sizes as expressions of the program's named sizes."""

    def __init__(self, view: View, mesh: Mesh) -> None:
        self._view, self._mesh = view, mesh
        stored = {
            size
            for site in view.inputs()
            if site.role is not None and site.role.kind in _STORED and site.makes[0] is not None
            for size in view.values[site.makes[0]].type.shape
        }
        self._products = {size: e for size, e in named_products(view.program.sizes).items() if e is not None and size not in stored}
        self._shapes: dict[int, tuple[sympy.Expr, ...]] = {}

    def shape(self, value: int) -> tuple[sympy.Expr, ...]:
        """Global sizes of a value."""
        if value not in self._shapes:
            self._shapes[value] = self._shape(value)
        return self._shapes[value]

    def _shape(self, value: int) -> tuple[sympy.Expr, ...]:
        found = self._view.values[value]
        maker, output = found.maker
        node = self._view.sites[maker].node
        noted = note(node).shapes if node is not None else None
        shape = noted[output] if noted is not None else None
        if shape is not None:
            return tuple(sympy.sympify(size) for size in shape)
        if not found.from_input:
            return tuple(map(sympy.Integer, found.type.shape))
        return tuple(self._products.get(size, sympy.Integer(size)) for size in found.type.shape)

    def local(self, value: int, layout: Layout) -> LocalTensor:
        """The largest piece of a value in a layout."""
        tensor = self._view.values[value].type
        return LocalTensor(self._cut(self.shape(value), tensor.shape, layout), tensor.itemsize)

    def _cut(self, shape: Sequence[sympy.Expr], numbers: Sequence[int], layout: Layout) -> tuple[sympy.Expr, ...]:
        local, exact = list(shape), list(numbers)
        for placement, parts in zip(layout, self._mesh.shape, strict=True):
            if isinstance(placement, Shard):
                dim = placement.dim
                whole = exact[dim] % parts == 0
                local[dim] = local[dim] / parts if whole else sympy.ceiling(local[dim] / parts)
                exact[dim] = -(-exact[dim] // parts)
        return tuple(local)

    def transfer(self, value: int, transfer: Transfer, cluster: Cluster) -> tuple[Quantity, Quantity, Quantity, Quantity]:
        """(seconds, flops, bytes moved, bytes on the wire) of a redistribution."""
        tensor, seconds, wire = self._view.values[value].type, sympy.Integer(0), sympy.Integer(0)
        moved: Quantity = sympy.Integer(0)
        for step, numeric_moved in zip(transfer.steps, transfer.step_bytes_moved, strict=True):
            step_wire = self._wire(step, value)
            # a copy's bytes scale with the tensor as the example's do
            ratio = sympy.Rational(int(numeric_moved), max(1, math.prod(tensor.shape)))
            copied = ratio * sympy.Mul(*self.shape(value))
            seconds += cluster.op_overhead + copied / cluster.memory_bandwidth
            if step.kind is not StepKind.SLICE:
                axis, ranks = self._mesh.axes[step.axis]
                seconds += cluster.line(step.kind, axis).seconds(step_wire, ranks)
            wire += step_wire
            moved += copied
        return seconds, 0, moved, wire

    def _wire(self, step: Step, value: int) -> sympy.Expr:
        """``redistribute.wire_bytes`` with expressions for sizes."""
        if step.kind is StepKind.SLICE:
            return sympy.Integer(0)
        tensor, parts = self._view.values[value].type, self._mesh.shape[step.axis]
        without: Layout = tuple(Replicate() if axis == step.axis else p for axis, p in enumerate(step.before))
        numbers = local_shape(tensor.shape, without, self._mesh)
        shape = list(self._cut(self.shape(value), tensor.shape, without))
        if step.kind is StepKind.ALL_REDUCE:
            return sympy.Rational(2 * (parts - 1) * tensor.itemsize, parts) * sympy.Mul(*shape)
        for placement in (step.source, step.target):
            if isinstance(placement, Shard) and numbers[placement.dim] % parts:
                shape[placement.dim] = sympy.ceiling(shape[placement.dim] / parts) * parts
        piece = sympy.Mul(*shape) / parts
        share = sympy.Rational(parts - 1, parts) if step.kind is StepKind.ALL_TO_ALL else sympy.Integer(parts - 1)
        return share * piece * tensor.itemsize

    def identity(self, values: Sequence[int | None]) -> Hashable:
        """Sites with equal signature and equal identity have equal work."""
        return tuple(None if v is None else self.shape(v) for v in values)
