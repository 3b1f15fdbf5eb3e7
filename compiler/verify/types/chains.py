"""Type rules of chains: one step is typed by the rules of its ops, and its state must lie after it as it lay before.

    c: t,  x[t]: u   |-   body: (t, v)        then   chain: (t, [count] + v)          by induction over the steps

Nothing is believed of the body but its calls: which of its dimensions count rows is found out by typing them.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.fx as fx
from torch._subclasses import FakeTensorMode

from ....runtime.fixedpoint.op import chain_op
from ....runtime.fixedpoint.resume import resume_op
from ...chains.bodies import BodyGraph, body_graph, read_body
from ...program import tensor_leaves
from .arguments import all_whole, arguments
from .pointwise import check_disjoint
from .problem import IllTyped, Op, Untypable
from .value import Dim, Type

CHAIN, RESUME = chain_op().overloadpacket, resume_op().overloadpacket


def chain(
    op: Op, init: Sequence[Type], shared: Sequence[Type], streams: Sequence[Type], count: int, body: str, *_: Any
) -> tuple[Type, ...]:
    """See the module."""
    following, emits = _stepped(op, list(init), list(shared), [_slice(stream) for stream in streams], body)
    for before, after in zip(init, following, strict=True):
        if before.dims != after.dims or after.is_partial:
            raise IllTyped(
                f"the state of a chain lies as {op.axes.describe(before)} and, a step later, as {op.axes.describe(after)}"
            )
    return (*following, *[_stacked(op, emit, count) for emit in emits])


def resume(
    op: Op, init: Sequence[Type], shared: Sequence[Type], streams: Sequence[Type], count: int, body: str, *_: Any
) -> tuple[Type, ...]:
    """A chain; what is known of it, behind its streams, must lie as what it gives out."""
    own = read_body(body).streams
    found = chain(op, init, shared, streams[:own], count, body)
    for given, made in zip(streams[own:], found[len(init) :], strict=True):
        if given.dims != made.dims or given.partial != made.partial:
            raise IllTyped(f"a chain that gives out {op.axes.describe(made)} is resumed from {op.axes.describe(given)}", 2)
    return found


def _slice(stream: Type) -> Type:
    if stream.dims[0].cuts:
        raise IllTyped("the steps of a chain are cut; each rank needs all of them, in order", 2)
    return stream.plain().with_dims(stream.dims[1:])


def _stacked(op: Op, emit: Type, count: int) -> Type:
    dims = (Dim(count), *emit.dims)
    check_disjoint(op, dims, emit.partial)
    return Type(dims, emit.partial)


def _stepped(op: Op, init: list[Type], shared: list[Type], slices: list[Type], text: str) -> tuple[list[Type], list[Type]]:
    """The types of the next carries and of the emits of one step."""
    given = [*init, *shared, *slices]
    if any(one.is_partial for one in given):
        raise Untypable("a chain of a value that is still to be summed")
    body = _graph(op.node, text)
    types: dict[fx.Node, Any] = dict(zip(body.placeholders, [one.plain() for one in given], strict=True))
    for node in body.calls:
        types[node] = _typed(op, node, types)
    return [types[n] for n in body.following], [types[n] for n in body.emits]


def _graph(node: fx.Node, text: str) -> BodyGraph:
    """The step with the values of rank 0."""
    mode = FakeTensorMode()
    with mode:
        init, shared, streams = [[n.meta["val"] for n in cast(list[fx.Node], group)] for group in node.args[:3]]
        streams = streams[: read_body(text).streams]
        forms = [*[(v.shape, v.dtype) for v in (*init, *shared)], *[(v.shape[1:], v.dtype) for v in streams]]
        examples = [torch.empty(shape, dtype=dtype) for shape, dtype in forms]
    return body_graph(read_body(text), examples, mode)


def _typed(op: Op, node: fx.Node, types: dict[fx.Node, Any]) -> Any:
    """One call of a step. Untypable where the call on whole values would be another one: a body is the same text on every rank."""
    from .table import facts_of  # the table names the rules of this file

    if node.target is operator.getitem:
        return types[node.args[0]][node.args[1]]  # type: ignore[index]
    args, facts = arguments(node, types), facts_of(node.target)
    if all_whole(args):
        leaves = [op.axes.whole(leaf.shape) for leaf in tensor_leaves(node.meta["val"])]
        return tuple(leaves) if isinstance(node.meta["val"], (tuple, list)) else leaves[0]
    if facts.rule is None:
        raise Untypable(f"no type rule for {node.target} on pieces, in a step of a chain")
    inner = Op(op.axes, node, ())
    found = facts.rule(inner, *args)
    along = args[1] if node.target is torch.ops.aten.slice.Tensor else None
    is_beside = along is not None and not args[0].dims[along].cuts  # its start and end are read as they are
    changed = [i for i, value in inner.new_args.items() if not is_beside and not _is_open(args[i], value)]
    if inner.becomes >= 0 or inner.target or inner.moves_in or inner.moves_out or inner.times or inner.undo_scale or changed:
        raise Untypable(f"{node.target}, in a step of a chain, says its own sizes, which differ on pieces")
    return found


def _is_open(written: Any, whole: Any) -> bool:
    """Whether sizes as they are written in a body, -1 for what is left open, are also those on whole values."""
    if isinstance(written, list) and isinstance(whole, list):
        return len(written) == len(whole) and all(a in (-1, b) for a, b in zip(written, whole, strict=True))
    return bool(written == whole)
