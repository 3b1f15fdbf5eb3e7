"""The type of a value in a program that runs on many ranks: a global shape, and how the mesh axes cut or sum it.

A dimension is read as a row of factors from left to right. Some factors are local, some are mesh axes:

    [B, H, S]  cut over tp along H, seen after  view(B*H, S):      dim 0 = B x tp x H/tp      Cut(axis=tp, outer=B)

``outer`` is the product of everything left of the axis, in global units. ``outer = 1`` is the usual shard; anything else is a
strided shard. A dimension that its axes do not divide evenly can only be cut at its left edge, by the chunk rule of
``runtime.shards``, in units of ``granule`` elements.
"""

# ruff: noqa: FBT001, FBT002 (zero is a fact about a value, not an option)

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from ....runtime.mesh import Mesh
from ...layout import Layout, Partial, Replicate, Shard

Integer = Any
"""An int that all ranks share, or an integer array over the mesh (one axis per mesh axis, broadcastable): one value per rank."""


class Cut(NamedTuple):
    """A mesh axis (by position) inside a dimension. outer: product of the factors to its left, in global units."""

    axis: int
    outer: int


class Dim(NamedTuple):
    """One dimension: global size, cuts from left to right, unit of uneven chunks."""

    size: int
    cuts: tuple[Cut, ...] = ()
    granule: int = 1


class Type:
    """Global shape with its cuts, and per mesh axis the pending reduction ("" where there is none). Immutable.

    zero: every element is 0, so the value may also stand for a partial sum. scaled: axes over which the value is some y divided
    by the number of ranks, so that it may also stand for a partial sum whose total is y.
    """

    __slots__ = ("dims", "partial", "scaled", "zero")

    def __init__(
        self,
        dims: tuple[Dim, ...],
        partial: tuple[str, ...],
        zero: bool = False,
        scaled: tuple[int, ...] = (),
    ) -> None:
        self.dims = dims
        self.partial = partial
        self.zero = zero
        self.scaled = scaled

    def with_dims(self, dims: tuple[Dim, ...]) -> Type:
        """The same elements seen with other dimensions."""
        return Type(dims, self.partial, self.zero, self.scaled)

    def plain(self) -> Type:
        """The same placement without what is known of the elements."""
        return Type(self.dims, self.partial)

    def with_partial(self, partial: tuple[str, ...]) -> Type:
        """The same dimensions with other pending reductions."""
        return Type(self.dims, partial, self.zero)

    @property
    def shape(self) -> tuple[int, ...]:
        """Global sizes."""
        return tuple(dim.size for dim in self.dims)

    @property
    def rank(self) -> int:
        """Number of dimensions."""
        return len(self.dims)

    @property
    def is_partial(self) -> bool:
        """Whether some axis still has to reduce it."""
        return any(self.partial)

    @property
    def is_whole(self) -> bool:
        """Whether every rank holds all of the final value."""
        return not any(self.partial) and not any(dim.cuts for dim in self.dims)

    def cut_axes(self) -> dict[int, int]:
        """mesh axis -> the dimension that it cuts."""
        return {cut.axis: i for i, dim in enumerate(self.dims) for cut in dim.cuts}


class Axes:
    """The mesh, prepared for type checking. Sizes per axis; rank indices as broadcastable arrays."""

    def __init__(self, mesh: Mesh) -> None:
        self.mesh = mesh
        self.names = mesh.names
        self.parts = mesh.shape
        self.none = ("",) * len(self.parts)
        count = len(self.parts)
        self.index = [np.arange(n).reshape([n if i == k else 1 for i in range(count)]) for k, n in enumerate(self.parts)]
        self._lengths: dict[Dim, Integer] = {}
        self._declared: dict[tuple[int, tuple[int, ...]], tuple[Layout, Type | None]] = {}

    def position(self, name: str) -> int | None:
        """Position of an axis, None when the mesh has none of that name."""
        return self.names.index(name) if name in self.names else None

    def whole(self, shape: Sequence[int]) -> Type:
        """The type of a value that every rank holds."""
        return Type(tuple(Dim(int(n)) for n in shape), self.none)

    def product(self, cuts: Sequence[Cut]) -> int:
        """Number of pieces that the cuts make."""
        return math.prod([self.parts[cut.axis] for cut in cuts])

    def is_even(self, dim: Dim) -> bool:
        """Whether all pieces of a dimension have the same length."""
        return not dim.cuts or (dim.granule == 1 and dim.size % self.product(dim.cuts) == 0)

    def prefix(self, size: int, axes: Sequence[int], granule: int = 1) -> Dim:
        """A dimension cut at its left edge by some axes, the first one outermost (as DTensor nests them).

        Axes of size 1 cut nothing.
        """
        cuts, outer = [], 1
        for axis in axes:
            if self.parts[axis] > 1:
                cuts.append(Cut(axis, outer))
                outer *= self.parts[axis]
        return Dim(size, tuple(cuts), 1 if size % max(outer, 1) == 0 else granule)

    def length(self, dim: Dim) -> Integer:
        """Local length of a dimension: an int when even, else one per rank."""
        if not dim.cuts:
            return dim.size
        found = self._lengths.get(dim)
        if found is None:
            found = self._lengths[dim] = self._length(dim)
        return found

    def _length(self, dim: Dim) -> Integer:
        pieces = self.product(dim.cuts)
        if dim.granule == 1 and dim.size % pieces == 0:
            return dim.size // pieces
        have: Integer = dim.size // dim.granule
        for cut in dim.cuts:
            have = chunk_length(have, self.parts[cut.axis], self.index[cut.axis])
        return have * dim.granule

    def local_shape(self, value: Type) -> tuple[Integer, ...]:
        """Local sizes of a value."""
        return tuple([dim.size if not dim.cuts else self.length(dim) for dim in value.dims])

    def first_rank(self, length: Integer) -> int:
        """The value that rank 0 sees."""
        return int(length) if isinstance(length, (int, np.integer)) else int(np.asarray(length).flat[0])

    def from_layout(self, shape: Sequence[int], layout: Layout) -> Type | None:
        """The type that a declared layout means; None for placements that are not DTensor's plain ones."""
        key = (id(layout), tuple(shape))
        found = self._declared.get(key)
        if found is None:
            found = self._declared[key] = (layout, self._from_layout(shape, layout))  # keeps the layout, and so its id, alive
        return found[1]

    def _from_layout(self, shape: Sequence[int], layout: Layout) -> Type | None:
        cuts: dict[int, list[int]] = {}
        partial = list(self.none)
        for axis, placement in enumerate(layout):
            if type(placement) is Shard:
                cuts.setdefault(placement.dim % max(len(shape), 1), []).append(axis)
            elif isinstance(placement, Partial):
                partial[axis] = placement.reduce_op if self.parts[axis] > 1 else ""
            elif not isinstance(placement, Replicate):
                return None
        if any(dim >= len(shape) for dim in cuts):
            return None
        dims = tuple(self.prefix(int(n), cuts[i]) if i in cuts else Dim(int(n)) for i, n in enumerate(shape))
        return Type(dims, tuple(partial))

    def describe(self, value: Type) -> str:
        """``S(0),R`` per mesh axis, with the stride of a strided shard; ``tp=S(1)`` when the mesh has several axes."""
        where = value.cut_axes()
        words = []
        for axis, op in enumerate(value.partial):
            if op:
                words.append(f"P({op})")
            elif axis in where:
                words.append(self._describe_cut(value.dims[where[axis]], where[axis], axis))
            else:
                words.append("R")
        return ",".join(words)

    def _describe_cut(self, dim: Dim, position: int, axis: int) -> str:
        plain = self.prefix(dim.size, sorted(cut.axis for cut in dim.cuts), dim.granule)
        if plain == dim and dim.granule == 1:
            return f"S({position})"
        outer = next(cut.outer for cut in dim.cuts if cut.axis == axis)
        return f"S({position}, outer={outer}" + (f", granule={dim.granule})" if dim.granule > 1 else ")")


def chunk_length(total: Integer, parts: int, index: Integer) -> Integer:
    """``runtime.shards.local_size`` on arrays."""
    chunk = -(-total // parts)
    return np.minimum(chunk, total - np.minimum(index * chunk, total))


def same_integer(left: Integer, right: Integer) -> bool:
    """Whether two integers agree on every rank."""
    if isinstance(left, int) and isinstance(right, int):
        return left == right
    return bool(np.all(np.asarray(left) == np.asarray(right)))
