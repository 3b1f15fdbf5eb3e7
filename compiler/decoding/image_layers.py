"""The layers of a convolutional network, read off its graph: which rows of which layer each of them reads (``regions``).

convolution    rows i - above .. i - above + height - 1, less those whose weights are zero        pad    row i - above
slice          row i + start, or the same row where columns or channels are cut        pointwise, cat, split    the same row
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
import torch.fx as fx
from torch import Tensor

from ..program import Program, RoleKind, note
from .regions import Layer, Read, Regions
from .units import LAYOUT, ROWS, UnsliceableError, is_pointwise, one_row

aten = torch.ops.aten
SAME = frozenset((aten.clone.default, aten.alias.default, aten.detach.default))
NEVER = 1 << 30


def find_regions(program: Program, tensors: Mapping[str, Tensor], positions: int) -> Regions:
    """Follow a captured network ``[rows, positions] -> [rows, positions, ...]`` whose positions are pixels of an image, row by row.

    tensors: its parameters and buffers by name. Raises UnsliceableError where it is none, or reads pixels of rows below.
    """
    finder = _Finder(positions)
    for node, role in zip(program.placeholders, program.signature.inputs, strict=True):
        if role.kind is RoleKind.INPUT:
            finder.flat = node
        else:
            finder.constants[node] = program.constants[role.name] if role.kind is RoleKind.CONSTANT else tensors[role.name]
    return finder.run(program)


class _Finder:
    def __init__(self, positions: int) -> None:
        self.positions = positions
        self.flat: fx.Node | None = None
        self.pixels: fx.Node | None = None
        self.constants: dict[fx.Node, Any] = {}
        self.layers: dict[fx.Node, Layer] = {}
        self.ids: dict[fx.Node, tuple[fx.Node, Tensor]] = {}  # behind the layers: which element of which layer
        self.parts: dict[fx.Node, list[tuple[int, int]]] = {}  # a split along the channels: (start, length) of each

    def run(self, program: Program) -> Regions:
        for node in program.nodes:
            if node.op == "call_function":
                self._visit(node)
        (result,) = [r for r in program.results[:1] if r is not None]
        if result not in self.ids:
            raise UnsliceableError("the result does not end an image")
        assert self.pixels is not None
        last, ids = self.ids[result]
        elements = one_row(ids, result)
        width = self.layers[self.pixels].shape[2]
        regions = Regions(
            self._used(last), self.pixels, last, elements.reshape(self.positions, -1), tuple(elements.shape[1:]), width
        )
        at_place = regions.elements % self.positions == torch.arange(self.positions)[:, None]
        if self.layers[last].shape[1:] != self.layers[self.pixels].shape[1:] or not bool(at_place.all()):
            raise UnsliceableError("the parameters of a pixel do not lie at its place")
        if any(regions.reached(row)[last] < row for row in range(self.layers[self.pixels].shape[1])):
            raise UnsliceableError("a row reads pixels of rows below it")
        return regions

    def _used(self, last: fx.Node) -> dict[fx.Node, Layer]:
        wanted, pending = set(), [last]
        while pending:
            node = pending.pop()
            if node not in wanted:
                wanted.add(node)
                pending += [read.source for read in self.layers[node].reads]
        return {node: layer for node, layer in self.layers.items() if node in wanted}

    def _visit(self, node: fx.Node) -> None:
        inputs = node.all_input_nodes
        if all(n in self.constants for n in inputs):
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: self.constants[n])
            self.constants[node] = cast(Any, node.target)(*args, **kwargs)
            return
        rule = _RULES.get(node.target)
        images = [n for n in inputs if n not in self.constants]
        if self.flat in inputs:
            self._enter(node)
        elif node.target is operator.getitem and node.args[0] in self.parts:
            source, index = cast(Any, node.args)
            self._channels(node, source.args[0], *self.parts[source][index])
        elif all(n in self.layers for n in images) and rule is not None and rule(self, node):
            return
        elif all(n in self.layers for n in images) and _is_by_pixel(node.target):
            self._pointwise(node)
        elif node.target in LAYOUT and len(images) == 1:
            self._leave(node, images[0])
        else:
            raise UnsliceableError(f"{node.target} is not followed row by row ({note(node).source})")

    def _enter(self, node: fx.Node) -> None:
        """[rows, positions] -> [rows, 1, H, W]."""
        shape = tuple(node.meta["val"].shape)
        if node.target not in LAYOUT or len(shape) != 4 or shape[:2] != (ROWS, 1) or shape[2] * shape[3] != self.positions:
            raise UnsliceableError(f"{node.target} reads positions that are no pixels of one image ({note(node).source})")
        if self.pixels is not None:
            raise UnsliceableError(f"the positions are taken for an image twice ({note(node).source})")
        self.pixels = node
        self._add(node, (), lambda: torch.empty(0))

    def _leave(self, node: fx.Node, source: fx.Node) -> None:
        """A change of layout behind the last image."""
        if source in self.layers:
            shape = self.layers[source].shape
            ids = torch.arange(shape[0] * shape[1] * shape[2]).reshape(1, *shape).expand(ROWS, -1, -1, -1)
            self.ids[source] = (source, ids)
        if source not in self.ids:
            raise UnsliceableError(f"{node.target} is not followed row by row ({note(node).source})")
        image, ids = self.ids[source]
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: ids if n is source else self.constants[n])
        self.ids[node] = (image, cast(Any, node.target)(*args, **kwargs))

    def _add(self, node: fx.Node, reads: tuple[Read, ...], compute: Callable[..., Tensor]) -> bool:
        shape = tuple(node.meta["val"].shape)
        if len(shape) != 4 or shape[0] != ROWS:
            raise UnsliceableError(f"{node.target} makes {list(shape)}, which is no image ({note(node).source})")
        self.layers[node] = Layer(reads, compute, shape[1:])
        return True

    def _pointwise(self, node: fx.Node) -> None:
        images = list(dict.fromkeys(n for n in node.all_input_nodes if n not in self.constants))
        height = node.meta["val"].shape[2]
        for other in (n for n in node.all_input_nodes if n in self.constants):
            value = self.constants[other]
            if (value.dim() > 1 and value.shape[-2] != 1) or (value.dim() == 4 and value.shape[0] != 1):
                raise UnsliceableError(f"{node.target} has a constant that differs from row to row ({note(node).source})")
        if any(self.layers[n].shape[1] != height for n in images):
            raise UnsliceableError(f"{node.target} spreads an image over rows ({note(node).source})")

        def compute(*values: Tensor) -> Tensor:
            known = dict(zip(images, values, strict=True))
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: known[n] if n in known else self.constants[n])
            return cast(Tensor, cast(Any, node.target)(*args, **kwargs))

        self._add(node, tuple(Read(n, 0, 0) for n in images), compute)

    def _channels(self, node: fx.Node, source: fx.Node, start: int, length: int) -> bool:
        return self._add(node, (Read(source, 0, 0),), lambda x: x.narrow(1, start, length))

    def convolution(self, node: fx.Node) -> bool:
        """Rows of the kernel that are zero are left out."""
        source, weight, bias, stride, padding, dilation, transposed, _, groups = cast(Any, node.args)
        if transposed or list(stride) != [1, 1] or any(n is not None and n not in self.constants for n in (weight, bias)):
            return False
        kernel = self.constants[weight].detach()
        shift = None if bias is None else self.constants[bias].detach()
        used = (kernel != 0).flatten(0, 1).any(0).any(1).nonzero().flatten().tolist() or [0]
        first, last, apart, above = used[0], used[-1], dilation[0], padding[0]
        kernel = kernel[:, :, first : last + 1].contiguous()

        def compute(x: Tensor) -> Tensor:
            return torch.conv2d(x, kernel, shift, 1, (0, padding[1]), dilation, groups)

        return self._add(node, (Read(source, first * apart - above, last * apart - above),), compute)

    def pad(self, node: fx.Node) -> bool:
        """Rows and columns of zeros, or fewer of them."""
        source, widths, *value = cast(Any, node.args)
        left, right, above = [*list(widths), 0, 0][:3]
        if any(value) or len(widths) > 4:
            return False
        return self._add(
            node,
            (Read(source, -above, -above),),
            lambda x: torch.nn.functional.pad(x, (left, right)),
        )

    def slice(self, node: fx.Node) -> bool:
        """A range of rows, columns or channels."""
        source, dim, start, stop, step = cast(Any, (*node.args, *(None, 0, 0, NEVER, 1)[len(node.args) :]))
        if dim not in (1, 2, 3) or step != 1:
            return False
        size = self.layers[source].shape[dim - 1]
        start, stop = (max(0, min(size, n + size if n < 0 else n)) for n in (start or 0, NEVER if stop is None else stop))
        if dim == 2:
            return self._add(node, (Read(source, start, start),), lambda x: x)
        return self._add(node, (Read(source, 0, 0),), lambda x: x.narrow(dim, start, stop - start))

    def split(self, node: fx.Node) -> bool:
        """Channels in parts."""
        source, _, *dim = cast(Any, node.args)
        if (dim or [0]) != [1]:
            return False
        lengths = [part.shape[1] for part in node.meta["val"]]
        self.parts[node] = [(sum(lengths[:k]), length) for k, length in enumerate(lengths)]
        return source in self.layers

    def cat(self, node: fx.Node) -> bool:
        """Channels side by side."""
        sources, *dim = cast(Any, node.args)
        if (dim or [0]) != [1] or any(n not in self.layers for n in sources):
            return False
        return self._add(node, tuple(Read(n, 0, 0) for n in sources), lambda *parts: torch.cat(parts, 1))


def _is_by_pixel(target: Any) -> bool:
    return target in SAME or (isinstance(target, torch._ops.OpOverload) and is_pointwise(target))


_RULES: Mapping[Any, Callable[[_Finder, fx.Node], bool]] = {
    aten.convolution.default: _Finder.convolution,
    aten.constant_pad_nd.default: _Finder.pad,
    aten.slice.Tensor: _Finder.slice,
    aten.split.Tensor: _Finder.split,
    aten.split_with_sizes.default: _Finder.split,
    aten.cat.default: _Finder.cat,
}
