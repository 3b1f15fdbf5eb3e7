"""A graph under construction whose tensors are one rank's pieces.

Every rank runs the same graph. What differs between ranks is a handful of integers, the lengths and offsets of pieces, and they are
nodes of the graph as well (``coordinate``, ``local_offset``, ``local_size``, ``padded_size``, ``padding``); they are made only
where a plain integer will not do: lengths that the ranks divide evenly stay constants. ``meta["val"]`` is the piece of rank 0.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.fx as fx
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from ..compiler.layout import Layout, Shard, coordinate, local_offset, local_shape, local_size, padded_size, padding
from ..compiler.program import NOTE, Note
from ..runtime.mesh import Mesh

aten = torch.ops.aten

Size = int | fx.Node
"""A length: a constant, or a node that gives this rank's."""


def on_rank_0(size: Size) -> int:
    """The length on rank 0, which holds the longest chunk of everything."""
    return size.meta["val"] if isinstance(size, fx.Node) else size


class LocalGraph:
    """Appends nodes to an ``fx.Graph``; every node gets its piece of rank 0 and a copy of ``self.template`` as its note."""

    def __init__(self, mesh: Mesh) -> None:
        self.mesh = mesh
        self.graph = fx.Graph()
        self.template = Note()
        self._integers: dict[tuple[Any, ...], fx.Node] = {}
        self._sizes: dict[tuple[tuple[int, ...], Layout], tuple[Size, ...]] = {}
        self._shapes: dict[tuple[tuple[int, ...], Layout], tuple[int, ...]] = {}
        self._own_mode: FakeTensorMode | None = None

    # integers ---------------------------------------------------------------------------------------------------------------

    def integer(self, function: Callable[..., int], *args: int | str | fx.Node) -> fx.Node:
        """A rank-dependent integer; the same one is made once."""
        key = (function, *args)
        if key not in self._integers:
            self._integers[key] = self._integer(function, *args)
        return self._integers[key]

    def _integer(self, function: Callable[..., int], *args: int | str | fx.Node) -> fx.Node:
        value = 0 if function is coordinate else function(*(on_rank_0(a) if isinstance(a, fx.Node) else a for a in args))
        node = self.graph.call_function(function, args)
        node.meta["val"] = value
        node.meta[NOTE] = dataclasses.replace(self.template, layouts=(None,))
        return node

    def length(self, total: Size, axis: int) -> Size:
        """Length of this rank's chunk of ``total`` along a mesh axis."""
        name, parts = self.mesh.axes[axis]
        if isinstance(total, int) and total % parts == 0:
            return total // parts
        return self.integer(local_size, total, parts, self.integer(coordinate, name))

    def offset(self, total: Size, axis: int) -> Size:
        """Where this rank's chunk of ``total`` starts.

        Made anew at every use: were it shared, two dimensions that happen to be of one length would lower to another graph than two
        that are not, and a proof at small sizes would say nothing about the large ones.
        """
        name, parts = self.mesh.axes[axis]
        return self._integer(local_offset, total, parts, self.integer(coordinate, name))

    def longest(self, total: Size, parts: int) -> Size:
        """Length of the longest chunk, ``ceil(total / parts)``."""
        return -(-total // parts) if isinstance(total, int) else self.integer(local_size, total, parts, 0)

    def padded(self, total: Size, parts: int) -> Size:
        """``total`` with every chunk as long as the longest."""
        return padded_size(total, parts) if isinstance(total, int) else self.integer(padded_size, total, parts)

    def missing(self, have: Size, want: Size) -> Size:
        """Elements to add to ``have``; the constant 0 where they are the same length on every rank."""
        if have is want:
            return 0
        if isinstance(have, int) and isinstance(want, int):
            return padding(have, want)
        return self.integer(padding, have, want)

    def sizes(self, shape: Sequence[int], layout: Layout) -> tuple[Size, ...]:
        """The shape of this rank's piece of a value of global ``shape``."""
        key = (tuple(shape), layout)
        if key not in self._sizes:
            found: list[Size] = list(shape)
            for axis, placement in enumerate(layout):
                if isinstance(placement, Shard):
                    found[placement.dim] = self.length(found[placement.dim], axis)
            self._sizes[key] = tuple(found)
        return self._sizes[key]

    # tensors ----------------------------------------------------------------------------------------------------------------

    def fake(self, like: torch.Tensor, shape: Sequence[int], strides: Sequence[int]) -> torch.Tensor:
        """A fake tensor with the dtype, device and fake mode of another. Built directly: dispatching one costs ten times more."""
        if isinstance(like, FakeTensor):
            mode, device = like.fake_mode, like.fake_device
        else:
            self._own_mode = mode = self._own_mode or FakeTensorMode()
            device = like.device
        return FakeTensor(mode, torch.empty_strided(tuple(shape), tuple(strides), dtype=like.dtype, device="meta"), device)

    def piece_of(self, value: torch.Tensor, layout: Layout) -> torch.Tensor:
        """Rank 0's piece of a global fake value: the same order of dimensions in memory, no gaps, expanded dimensions kept."""
        key = (tuple(value.shape), layout)
        shape = self._shapes.get(key)
        if shape is None:
            shape = self._shapes[key] = local_shape(value.shape, layout, self.mesh)
        if key[0] == shape:
            return value
        return self.fake(value, shape, _packed_strides(value.stride(), shape))

    def call(self, target: Any, args: tuple[Any, ...], val: Any, name: str = "") -> fx.Node:
        """Append a call."""
        node = self.graph.create_node("call_function", target, args, {}, name or None)
        node.meta["val"] = val
        node.meta[NOTE] = self.template
        return node

    def reshape(self, node: fx.Node, sizes: Sequence[Size]) -> fx.Node:
        """The same elements in row-major order under another shape."""
        shape = [on_rank_0(size) for size in sizes]
        return self.call(aten.reshape.default, (node, list(sizes)), self._packed(node, shape))

    def permute(self, node: fx.Node, order: Sequence[int]) -> fx.Node:
        """Dimensions in another order; nothing is emitted for the same order."""
        if list(order) == sorted(order):
            return node
        val = node.meta["val"]
        shape, strides = [val.shape[d] for d in order], [val.stride()[d] for d in order]
        return self.call(aten.permute.default, (node, list(order)), self.fake(val, shape, strides))

    def contiguous(self, node: fx.Node) -> fx.Node:
        """Row-major memory, as collectives want; free when it already is."""
        return self.call(aten.contiguous.default, (node,), self._packed(node, node.meta["val"].shape))

    def pad(self, node: fx.Node, amounts: dict[int, Size]) -> fx.Node:
        """Zeros at the end of some dimensions; nothing is emitted where no rank needs any."""
        needed = {dim: amount for dim, amount in amounts.items() if not (isinstance(amount, int) and amount == 0)}
        if not needed:
            return node
        shape = list(node.meta["val"].shape)
        spec: list[Size] = []  # last dimension first, (before, after)
        for dim in reversed(range(min(needed), len(shape))):
            spec += [0, needed.get(dim, 0)]
            shape[dim] += on_rank_0(needed.get(dim, 0))
        return self.call(aten.constant_pad_nd.default, (node, spec), self._packed(node, shape))

    def trim(self, node: fx.Node, dim: int, have: Size, want: Size) -> fx.Node:
        """The first ``want`` of ``have`` elements of a dimension; nothing is emitted where that is all of them on every rank."""
        if have is want or (isinstance(have, int) and have == want):
            return node
        val = node.meta["val"]
        shape = [*val.shape[:dim], on_rank_0(want), *val.shape[dim + 1 :]]
        return self.call(aten.slice.Tensor, (node, dim, 0, want), self.fake(val, shape, val.stride()))

    def narrow(self, node: fx.Node, dim: int, offset: Size, length: Size, name: str) -> fx.Node:
        """``length`` elements of a dimension from ``offset`` on."""
        val = node.meta["val"]
        shape = [*val.shape[:dim], on_rank_0(length), *val.shape[dim + 1 :]]
        return self.call(aten.narrow.default, (node, dim, offset, length), self.fake(val, shape, val.stride()), name)

    def packed(self, node: fx.Node, shape: Sequence[int]) -> torch.Tensor:
        """A row-major fake tensor of another shape with the dtype of a node's value."""
        return self._packed(node, shape)

    def _packed(self, node: fx.Node, shape: Sequence[int]) -> torch.Tensor:
        return self.fake(node.meta["val"], shape, _row_major(shape))


def _row_major(shape: Sequence[int]) -> list[int]:
    return _packed_strides(range(len(shape), 0, -1), shape)


def _packed_strides(strides: Sequence[int], shape: Sequence[int]) -> list[int]:
    """Strides without gaps for a new shape, dimensions in the memory order that the old strides give; stride 0 stays 0."""
    found = [0] * len(shape)
    step = 1
    for dim in sorted(range(len(shape)), key=lambda d: (strides[d], -d)):
        if strides[dim]:
            found[dim] = step
            step *= max(shape[dim], 1)
    return found
