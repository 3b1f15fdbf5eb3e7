"""Inputs to evaluate programs on: random ring elements for floats, valid random integers, true values for constants.

The range of an integer input is read off its uses: the rows of an embedding, the size of a gathered dimension, the classes of a loss.
One that is used as no index gets 0 and 1 (masks). The first entry along the last dimension of a mask is on, so that no row is
masked altogether.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.fx as fx

from ...errors import InputError
from ...program import Program, Role, RoleKind
from .algebra import Algebra
from .value import RingTensor, Value

aten = torch.ops.aten


@dataclass(frozen=True)
class Range:
    """Values 0 .. limit-1 of an integer input. ignored: a value outside the range that its only uses leave out of a loss."""

    limit: int
    ignored: int | None = None


_MASK = Range(2)

_PASSES_ON = {
    packet
    for name in (
        "view _unsafe_view reshape permute transpose t unsqueeze squeeze expand slice select clone alias detach _to_copy cat stack "
        "constant_pad_nd where masked_fill copy slice_scatter select_scatter flip roll split split_with_sizes unbind repeat contiguous"
    ).split()
    for packet in (getattr(aten, name),)
}


def draw_inputs(original: Program, transformed: Program, algebra: Algebra, seed: int) -> dict[Role, Value]:
    """A value for every input role of both programs; the same roles get the same values.

    Raises InputError for a non-constant input of the transformed program that the original does not have.
    """
    generator = torch.Generator().manual_seed(seed)
    ranges = index_ranges(original)
    drawn: dict[Role, Value] = {}
    for node, role in zip(original.placeholders, original.signature.inputs, strict=True):
        if role.kind is RoleKind.CONSTANT:
            drawn[role] = _constant(original.constants, role, algebra)
        else:
            drawn[role] = _draw(node.meta["val"], ranges.get(node), algebra, generator)
    for role in transformed.signature.inputs:
        if role not in drawn:
            if role.kind is not RoleKind.CONSTANT:
                raise InputError(f"the transformed program has an input {role} that the original does not have")
            drawn[role] = _constant(transformed.constants, role, algebra)
    return drawn


def _constant(constants: Mapping[str, torch.Tensor], role: Role, algebra: Algebra) -> Value:
    if role.name not in constants:
        raise InputError(f"the program gives no value for its input {role}")
    value = constants[role.name]
    return algebra.lift(value) if value.is_floating_point() else value


def _draw(val: Any, found: Range | None, algebra: Algebra, generator: torch.Generator) -> Value:
    if not isinstance(val, torch.Tensor):
        return val
    shape = [int(n) for n in val.shape]
    if val.is_floating_point():
        return RingTensor(algebra.ring.random(shape, generator), dtype=val.dtype)
    if found is None and not shape and val.dtype == torch.int64:  # a seed or a counter
        return torch.randint(0, 1 << 31, (), generator=generator)
    limits = found or _MASK
    drawn = torch.randint(0, max(limits.limit, 1), shape, generator=generator)
    if limits == _MASK and shape and shape[-1]:
        drawn[..., 0] = 1
    if limits.ignored is not None and drawn.numel() > 3:
        left_out = torch.rand(shape, generator=generator) < 0.125
        left_out.view(-1)[: max(2, drawn.numel() // 2)] = False
        drawn[left_out] = limits.ignored
    return drawn.to(val.dtype)


def index_ranges(program: Program) -> dict[fx.Node, Range]:
    """For every integer placeholder that is used as an index: the values it may take."""
    result: dict[fx.Node, Range] = {}
    for node in program.placeholders:
        val = node.meta.get("val")
        if not isinstance(val, torch.Tensor) or val.is_floating_point() or val.dtype == torch.bool:
            continue
        uses = list(_uses(node, 0, set()))
        if not uses:
            continue
        ignored = {use.ignored for use in uses}
        result[node] = Range(min(use.limit for use in uses), ignored.pop() if len(ignored) == 1 else None)
    return result


def _uses(node: fx.Node, offset: int, seen: set[tuple[fx.Node, int]]) -> Iterator[Range]:
    """Ranges demanded by the uses of ``node``, whose values are those of the input plus ``offset``."""
    if (node, offset) in seen:
        return
    seen.add((node, offset))
    for user in node.users:
        if user.op != "call_function":
            continue
        packet = getattr(user.target, "overloadpacket", user.target)
        limit = _index_limit(packet, user, node)
        if limit is not None:
            yield Range(limit - offset, _ignored(packet, user))
        elif packet in (aten.add, aten.sub) and len(user.args) == 2 and isinstance(user.args[1], int):
            yield from _uses(user, offset + user.args[1] * (1 if packet is aten.add else -1), seen)
        elif packet in _PASSES_ON and not (packet in (aten.where, aten.masked_fill) and _is_condition(user, node)):
            yield from _uses(user, offset, seen)
        elif not isinstance(user.target, torch._ops.OpOverload):  # getitem of a split
            yield from _uses(user, offset, seen)


def _is_condition(user: fx.Node, node: fx.Node) -> bool:
    place = 0 if user.target.overloadpacket is aten.where else 1  # type: ignore[union-attr]
    return user.args[place] is node


def _ignored(packet: Any, user: fx.Node) -> int | None:
    return int(user.args[4]) if packet is aten.nll_loss_forward else None  # type: ignore[arg-type]


def _index_limit(packet: Any, user: fx.Node, node: fx.Node) -> int | None:
    """Size of the dimension that ``node`` indexes in ``user``, None where it is no index."""
    args = user.args
    if packet is aten.embedding and args[1] is node:
        return _size(args[0], 0)
    if packet is aten.nll_loss_forward and args[1] is node:
        return _size(args[0], 1 if args[0].meta["val"].dim() > 1 else 0)  # type: ignore[union-attr]
    if packet in (aten.gather, aten.index_select, aten.scatter, aten.scatter_add, aten.index_add) and args[2] is node:
        return _size(args[0], args[1])
    if packet in (aten.index, aten.index_put) and node in args[1]:  # type: ignore[operator]
        return _size(args[0], list(args[1]).index(node))  # type: ignore[arg-type]
    return None


def _size(source: Any, dim: Any) -> int:
    shape = source.meta["val"].shape
    return int(shape[dim]) if math.prod(shape) else 1
