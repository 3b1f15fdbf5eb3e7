"""Which calls work on each token by itself, and how they are written for packed tokens.

[B, S, ...] or [B S, ...]      ->      [T, ...]                 packed(x) = x.reshape(B S, ...)[order]
back:  0 of [B S, ...] with row order[t] = packed(x)[t]          what was not computed is zero
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.fx as fx

from ..compiler.program import Program, note, producer, tensor_inputs
from .backward_split_choice import is_heavy
from .token_axes import COPIES, DIM_OF, DIMS_OF, RESHAPES, Axes, Grid, dims_along, is_pointwise, shape_of

if TYPE_CHECKING:
    from .packed_tokens import Writer

aten = torch.ops.aten

_PRODUCTS = frozenset((aten.mm.default, aten.addmm.default))


def packable(program: Program, axes: Mapping[fx.Node, Axes]) -> set[fx.Node]:
    """The calls to run on packed rows: per-token work that hangs together with a dense product."""
    found = {node for node in program.nodes if node.op == "call_function" and _is_per_token(node, axes)}
    found -= {node for node in found if node.target is operator.getitem and node.args[0] not in found}
    return _with_products(found)


def _is_per_token(node: fx.Node, axes: Mapping[fx.Node, Axes]) -> bool:
    if node not in axes or not axes[node].leading:
        return False
    if node.target is operator.getitem:
        return True
    if any(source in axes and not axes[source].leading for source in tensor_inputs(node)):
        return False
    if node.target in (aten.squeeze.dim, aten.unsqueeze.default, aten.select.int):
        return min(dims_along(node)) >= axes[node].leading
    known = node.target in RESHAPES or node.target in COPIES or node.target in DIM_OF or node.target in DIMS_OF
    dense = node.target in _PRODUCTS or node.target in (aten.embedding.default, aten.native_layer_norm.default)
    return known or dense or is_pointwise(node)


def _with_products(found: set[fx.Node]) -> set[fx.Node]:
    """Of what hangs together, the parts with a dense product."""
    kept: set[fx.Node] = set()
    seen: set[fx.Node] = set()
    for start in found:
        if start in seen:
            continue
        group, pending = set[fx.Node](), [start]
        while pending:
            node = pending.pop()
            if node in found and node not in group:
                group.add(node)
                pending += [*node.all_input_nodes, *node.users]
        seen |= group
        if any(is_heavy(node) for node in group):
            kept |= group
    return kept


@dataclass
class PackedRows:
    """Writes calls on packed rows. order: node of the chosen tokens; made: old node -> new one with all rows."""

    writer: Writer
    grid: Grid
    order: fx.Node
    axes: Mapping[fx.Node, Axes]
    made: dict[fx.Node, fx.Node]
    packed: dict[fx.Node, fx.Node] = field(default_factory=dict)
    spread: dict[tuple[fx.Node, int, int], fx.Node] = field(default_factory=dict)

    @property
    def count(self) -> int:
        """Packed rows."""
        return shape_of(self.order)[0]

    def whole(self, node: fx.Node) -> fx.Node:
        """A value with all its rows, zero where none was computed."""
        if node not in self.made:
            self.made[node] = self._unpacked(node)
        return self.made[node]

    def call(self, node: fx.Node) -> None:
        """The call on packed rows."""
        self.packed[node] = self._written(node)

    def _written(self, node: fx.Node) -> fx.Node:
        if node.target is operator.getitem:
            return self.writer.element(self.packed[producer(node)[0]], cast(int, node.args[1]))
        lead = self.axes[node].leading
        if node.target in RESHAPES:
            source = self._rows(tensor_inputs(node)[0])
            shape = [self.count, *shape_of(node)[lead:]]
            return source if list(shape_of(source)) == shape else self._call(node, aten.reshape.default, source, shape)
        if is_pointwise(node):
            rank = len(shape_of(node))
            return self._like(node, {source: self._operand(source, rank, lead) for source in tensor_inputs(node)})
        sources = {source: self._rows(source) if source in self.axes else self.made[source] for source in tensor_inputs(node)}
        return self._like(node, sources, self._moved_dims(node))

    def _moved_dims(self, node: fx.Node) -> dict[int, Any]:
        """Position of an argument -> the dimensions it names, which one leading dimension fewer moves."""
        first, target = tensor_inputs(node)[0], cast(Any, node.target)
        place = DIM_OF.get(target, DIMS_OF.get(target, -1))
        if place < 0 or first not in self.axes:
            return {}
        gone = self.axes[first].leading - 1
        dims = [dim - gone for dim in dims_along(node)]
        return {place: dims if node.target in DIMS_OF else dims[0]}

    def _like(self, node: fx.Node, sources: Mapping[fx.Node, fx.Node], changed: Mapping[int, Any] | None = None) -> fx.Node:
        """The same call with other sources. changed: arguments by position."""
        assert isinstance(node.target, torch._ops.OpOverload)
        names = [argument_.name for argument_ in node.target._schema.arguments]
        args, kwargs = list(node.args), dict(node.kwargs)
        for place, value in (changed or {}).items():
            if place < len(args):
                args[place] = value
            else:
                kwargs[names[place]] = value

        def replaced(one: fx.Node) -> fx.Node:
            return sources[one] if one in sources else self.made[one]

        new_args, new_kwargs = fx.node.map_arg((tuple(args), kwargs), replaced)
        return self._call(node, node.target, *new_args, **new_kwargs)

    def _operand(self, source: fx.Node, rank: int, lead: int) -> fx.Node:
        """What a pointwise call of that rank reads: rows of what differs from token to token, all else as it is."""
        if source in self.axes:
            return self._rows(source)
        missing = rank - len(shape_of(source))
        shape = (1,) * missing + shape_of(source)
        if set(shape[:lead]) <= {1}:
            whole = self.made[source]
            return whole if missing >= lead else self._call(source, aten.reshape.default, whole, [1, *shape[lead:]])
        if (source, rank, lead) not in self.spread:
            full = [self.grid.rows, self.grid.length] if lead == 2 else [self.grid.tokens]
            wide = self._call(source, aten.expand.default, self.made[source], [*full, *shape[lead:]])
            self.spread[source, rank, lead] = self._chosen(source, wide, shape[lead:])
        return self.spread[source, rank, lead]

    def _rows(self, source: fx.Node) -> fx.Node:
        """The packed rows of a value."""
        if source not in self.packed:
            self.packed[source] = self._chosen(source, self.made[source], shape_of(source)[self.axes[source].leading :])
        return self.packed[source]

    def _chosen(self, like: fx.Node, value: fx.Node, rest: tuple[int, ...]) -> fx.Node:
        flat = self._call(like, aten.reshape.default, value, [self.grid.tokens, *rest])
        return self._call(like, aten.index_select.default, flat, 0, self.order)

    def _unpacked(self, node: fx.Node) -> fx.Node:
        value, shape = self.packed[node], shape_of(node)
        rest, dtype = list(shape[self.axes[node].leading :]), node.meta["val"].dtype
        empty = self._call(node, aten.new_zeros.default, value, [self.grid.tokens, *rest], dtype=dtype)
        filled = self._call(node, aten.index_copy.default, empty, 0, self.order, value)
        return filled if list(shape) == [self.grid.tokens, *rest] else self._call(node, aten.view.default, filled, list(shape))

    def _call(self, like: fx.Node, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        return self.writer.call(target, *args, like=note(like), **kwargs)
