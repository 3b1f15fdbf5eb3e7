"""Where the tokens are: which dimensions of a value run over the rows and positions of a batch of sequences.

    [B, S, D] -> view -> [B S, D] -> x W -> [B S, D'] -> view -> [B, S, H, d] -> transpose -> [B, H, S, d] -> attention -> ...
     pair(0,1)            flat              flat                  pair(0,1)               pair(0,2)          as the query

Names start at inputs of shape [B, S, ...] and are carried through ops that keep them; where an op does not, the name is lost, and
nothing follows from that.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.fx as fx

from ..compiler.program import Program, RoleKind, tensor_inputs

aten = torch.ops.aten

FLAT = -1
"""In place of the second dimension: rows and positions are one dimension."""


class Axes(NamedTuple):
    """The dimension of rows, and that of positions (``FLAT``: the first one holds both)."""

    row: int
    position: int

    @property
    def leading(self) -> int:
        """How many leading dimensions the tokens are: 1 or 2; 0 where they do not come first."""
        return {(0, 1): 2, (0, FLAT): 1}.get((self.row, self.position), 0)

    @property
    def dims(self) -> tuple[int, ...]:
        """All of them."""
        return (self.row,) if self.position == FLAT else (self.row, self.position)


@dataclass(frozen=True)
class Grid:
    """B rows of S positions, S > 1."""

    rows: int
    length: int

    @property
    def tokens(self) -> int:
        """B S."""
        return self.rows * self.length


RESHAPES = frozenset((aten.view.default, aten._unsafe_view.default, aten.reshape.default))
COPIES = frozenset((aten.clone.default, aten._to_copy.default, aten.contiguous.default, aten.detach.default, aten.alias.default))
DIM_OF = {
    aten._softmax.default: 1,
    aten._log_softmax.default: 1,
    aten.slice.Tensor: 1,
    aten.split.Tensor: 2,
    aten.split_with_sizes.default: 2,
    aten.select.int: 1,
    aten.unsqueeze.default: 1,
    aten.squeeze.dim: 1,
    aten.cat.default: 1,
}
"""Ops that work along one dimension, and the position of that argument."""

DIMS_OF = {aten.mean.dim: 1, aten.sum.dim_IntList: 1, aten.amax.default: 1, aten.var.correction: 1}
"""Reductions: the position of the dimensions; ``keepdim`` follows or is a keyword."""


def shape_of(node: fx.Node) -> tuple[int, ...]:
    """Of a node with one tensor; () otherwise."""
    value = node.meta.get("val")
    return tuple(int(size) for size in value.shape) if isinstance(value, torch.Tensor) else ()


def is_pointwise(node: fx.Node) -> bool:
    """Whether every element of the result depends on the elements at its place alone, and no random numbers are drawn."""
    tags = getattr(node.target, "tags", ())
    return torch.Tag.pointwise in tags and torch.Tag.nondeterministic_seeded not in tags


def token_axes(program: Program, grid: Grid) -> dict[fx.Node, Axes]:
    """Node -> where its tokens are, for every value (elements of several results by their ``getitem``) for which that is known."""
    found: dict[fx.Node, Axes] = {}
    for node, role in zip(program.placeholders, program.signature.inputs, strict=True):
        if role.kind is RoleKind.INPUT and shape_of(node)[:2] == (grid.rows, grid.length):
            found[node] = Axes(0, 1)
    for node in program.nodes:
        if node.op == "call_function":
            axes = _axes(node, found, grid)
            if axes is not None:
                found[node] = axes
    return found


def argument(node: fx.Node, place: int, name: str, default: Any) -> Any:
    """An argument by position or by keyword."""
    return node.args[place] if len(node.args) > place else node.kwargs.get(name, default)


def dims_along(node: fx.Node) -> tuple[int, ...]:
    """The dimensions of its input along which an op works, none negative; () for ops that name none."""
    source = next(iter(tensor_inputs(node)))
    rank = len(shape_of(source)) + (node.target is aten.unsqueeze.default)
    if node.target in DIM_OF:
        dims: Sequence[int] = (int(argument(node, DIM_OF[node.target], "dim", 0)),)
    elif node.target in DIMS_OF:
        given = argument(node, DIMS_OF[node.target], "dim", None)
        dims = given or range(rank)
    elif node.target is aten.native_layer_norm.default:
        dims = range(-len(node.args[1]), 0)  # type: ignore[arg-type]
    else:
        return ()
    return tuple(dim % rank for dim in dims)


def _axes(node: fx.Node, found: Mapping[fx.Node, Axes], grid: Grid) -> Axes | None:
    if node.target is operator.getitem:
        return _element(node, found)
    inputs = tensor_inputs(node)
    known = [found.get(source) for source in inputs]
    if not any(known):
        return None
    first = known[0]
    if node.target is aten.embedding.default:
        return known[1]
    if is_pointwise(node):
        return _aligned(node, inputs, known)
    if first is None:
        return found.get(inputs[1]) if node.target is aten.addmm.default and _only(known, 1) else None
    if node.target is aten.mm.default:
        return first if _only(known, 0) and first.leading == 1 else None
    if node.target in RESHAPES:
        return reshaped(shape_of(inputs[0]), shape_of(node), first, grid)
    if node.target in COPIES or (node.target is aten.expand.default and len(shape_of(node)) == len(shape_of(inputs[0]))):
        return first
    if node.target in (aten.transpose.int, aten.permute.default):
        return _permuted(node, first)
    if node.target is aten.cat.default and len(set(known)) > 1:
        return None
    if node.target in DIM_OF or node.target in DIMS_OF or node.target is aten.native_layer_norm.default:
        return _along(node, first)
    return first if str(node.target).startswith("aten._scaled_dot_product") else None


def _only(known: Sequence[Axes | None], place: int) -> bool:
    return all((axes is not None) == (index == place) for index, axes in enumerate(known))


def _element(node: fx.Node, found: Mapping[fx.Node, Axes]) -> Axes | None:
    call, index = node.args[0], node.args[1]
    assert isinstance(call, fx.Node)
    axes = found.get(call)
    if axes is None or (str(call.target).startswith("aten._scaled_dot_product") and index != 0):
        return None
    return axes


def _aligned(node: fx.Node, inputs: Sequence[fx.Node], known: Sequence[Axes | None]) -> Axes | None:
    """Broadcasting lines dimensions up from the right."""
    rank, shape = len(shape_of(node)), shape_of(node)
    moved = set()
    for source, axes in zip(inputs, known, strict=True):
        if axes is not None:
            shift = rank - len(shape_of(source))
            at = Axes(axes.row + shift, axes.position if axes.position == FLAT else axes.position + shift)
            if any(shape[new] != shape_of(source)[old] for new, old in zip(at.dims, axes.dims, strict=True)):
                return None
            moved.add(at)
    return moved.pop() if len(moved) == 1 else None


def reshaped(old: Sequence[int], new: Sequence[int], axes: Axes, grid: Grid) -> Axes | None:
    """Where the tokens are in the same memory seen in another shape."""
    if axes.leading and new and new[0] == grid.tokens:
        return Axes(0, FLAT)
    if axes.leading == 1:
        return Axes(0, 1) if tuple(new[:2]) == (grid.rows, grid.length) else None
    if axes.position == FLAT:
        return None
    places = [_same_place(old, new, dim) for dim in axes.dims]
    return None if None in places or places[0] == places[1] else Axes(*places)  # type: ignore[arg-type]


def _same_place(old: Sequence[int], new: Sequence[int], dim: int) -> int | None:
    """The dimension of ``new`` that runs over the same elements in the same steps."""
    before = math.prod(old[:dim])
    for place, size in enumerate(new):
        if size == old[dim] and math.prod(new[:place]) == before:
            return place
    return None


def _permuted(node: fx.Node, axes: Axes) -> Axes:
    rank = len(shape_of(node))
    order = list(range(rank))
    if node.target is aten.transpose.int:
        one, other = int(node.args[1]) % rank, int(node.args[2]) % rank  # type: ignore[arg-type]
        order[one], order[other] = order[other], order[one]
    else:
        order = [int(dim) % rank for dim in node.args[1]]  # type: ignore[union-attr, arg-type]
    return Axes(order.index(axes.row), axes.position if axes.position == FLAT else order.index(axes.position))


def _along(node: fx.Node, axes: Axes) -> Axes | None:
    """Kept where the op works along other dimensions; what it removes or adds before them moves them."""
    dims = dims_along(node)
    if node.target is aten.unsqueeze.default:
        shift = {dim: dim + (dim >= dims[0]) for dim in axes.dims}
    elif set(dims) & set(axes.dims):
        return None
    elif len(shape_of(node)) < len(shape_of(next(iter(tensor_inputs(node))))) and isinstance(node.meta["val"], torch.Tensor):
        shift = {dim: dim - sum(gone < dim for gone in dims) for dim in axes.dims}
    else:
        shift = {dim: dim for dim in axes.dims}
    return Axes(shift[axes.row], axes.position if axes.position == FLAT else shift[axes.position])
