"""Inputs to evaluate programs on: random ring elements for floats, valid random integers, true values for constants.

The range of an integer input is read off its uses: the rows of an embedding, the size of a gathered dimension, the classes of a
loss. One that is used as no index gets 0 and 1 (masks). The first entry along the last dimension of a mask is on, so that no row is
masked altogether.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
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

_PASSING_NAMES = """
view _unsafe_view reshape permute transpose t unsqueeze squeeze expand slice select clone alias detach _to_copy cat
stack constant_pad_nd where masked_fill copy slice_scatter select_scatter flip roll split split_with_sizes unbind
repeat contiguous
"""
_PASSES_ON = {getattr(aten, name) for name in _PASSING_NAMES.split()}


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


def changed_constants(original: Program, transformed: Program, algebra: Algebra) -> dict[Role, Value]:
    """Constants that both programs name alike and that have another value in the transformed one: its own value of them."""
    found = {}
    for role in transformed.signature.inputs:
        if role.kind is RoleKind.CONSTANT and role.name in original.constants:
            before, after = original.constants[role.name], transformed.constants.get(role.name)
            if after is not None and after is not before and not _identical(before, after):
                found[role] = _constant(transformed.constants, role, algebra)
    return found


def _identical(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and torch.equal(a, b)


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
        uses = list(_uses(_Trail(node), set()))
        if not uses:
            continue
        ignored = {use.ignored for use in uses}
        result[node] = Range(min(use.limit for use in uses), ignored.pop() if len(ignored) == 1 else None)
    return result


@dataclass(frozen=True)
class _Trail:
    """A node whose values are those of the input plus ``offset``, where they are not ``ignored``."""

    node: fx.Node
    offset: int = 0
    ignored: int | None = None


def _uses(trail: _Trail, seen: set[_Trail]) -> Iterator[Range]:
    """Ranges demanded by the uses of a node as an index."""
    if trail in seen:
        return
    seen.add(trail)
    node = trail.node
    for user in node.users:
        if user.op != "call_function":
            continue
        packet = getattr(user.target, "overloadpacket", user.target)
        limit = _index_limit(packet, user, node)
        if limit is not None:
            yield Range(limit - trail.offset, _ignored(packet, user, trail))
        elif packet in (aten.add, aten.sub) and len(user.args) == 2 and isinstance(user.args[1], int):
            shift = user.args[1] if packet is aten.add else -user.args[1]
            yield from _uses(replace(trail, node=user, offset=trail.offset + shift), seen)
        elif not isinstance(user.target, torch._ops.OpOverload) or _passes_on(
            packet, user, node
        ):  # getitem of a split passes on too
            left_out = _left_out(packet, user, node)
            yield from _uses(replace(trail, node=user, ignored=trail.ignored if left_out is None else left_out), seen)


def _left_out(packet: Any, user: fx.Node, node: fx.Node) -> int | None:
    """c in ``where(node != c, node, safe)``, the form of a loss that ignores a target."""
    if packet is not aten.where or user.args[1] is not node:
        return None
    condition = user.args[0]
    if isinstance(condition, fx.Node) and condition.target is aten.ne.Scalar and condition.args[0] is node:
        return int(condition.args[1])  # type: ignore[arg-type]
    return None


def _passes_on(packet: Any, user: fx.Node, node: fx.Node) -> bool:
    """Whether the result of ``user`` holds the values of ``node``."""
    return packet in _PASSES_ON and not (packet in (aten.where, aten.masked_fill) and _is_condition(user, node))


def _is_condition(user: fx.Node, node: fx.Node) -> bool:
    place = 0 if user.target.overloadpacket is aten.where else 1  # type: ignore[union-attr]
    return user.args[place] is node


def _ignored(packet: Any, user: fx.Node, trail: _Trail) -> int | None:
    if packet in (aten.nll_loss_forward, aten.nll_loss_backward):
        return int(user.args[4 if packet is aten.nll_loss_forward else 5])  # type: ignore[arg-type]
    return trail.ignored


def _index_limit(packet: Any, user: fx.Node, node: fx.Node) -> int | None:
    """Size of the dimension that ``node`` indexes in ``user``, None where it is no index."""
    args = user.args
    if packet is aten.embedding and args[1] is node:
        return _size(args[0], 0)
    if packet is aten.nll_loss_forward and args[1] is node:
        return _size(args[0], 1 if args[0].meta["val"].dim() > 1 else 0)  # type: ignore[union-attr]
    if packet is aten.nll_loss_backward and args[2] is node:
        return _size(args[1], 1 if args[1].meta["val"].dim() > 1 else 0)  # type: ignore[union-attr]
    if packet in (aten.gather, aten.index_select, aten.scatter, aten.scatter_add, aten.index_add) and args[2] is node:
        return _size(args[0], args[1])
    if packet in (aten.index, aten.index_put) and node in args[1]:  # type: ignore[operator]
        return _size(args[0], list(args[1]).index(node))  # type: ignore[arg-type]
    return None


def _size(source: Any, dim: Any) -> int:
    shape = source.meta["val"].shape
    return int(shape[dim]) if math.prod(shape) else 1
