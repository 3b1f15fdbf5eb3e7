"""Type rules of look-ups, scatters, losses over classes, and attention kernels."""

# ruff: noqa: ARG001, FBT002 (all rules share one signature)

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from .contractions import add_sums
from .pointwise import broadcast, check_disjoint, combine, linear, op_name, refuse_partial
from .problem import IllTyped, Op, Untypable
from .reductions import whole_along
from .value import Dim, Type


def embedding(op: Op, weight: Type, indices: Type, *_: Any) -> Type:
    """[V, D] looked up by [...] -> [..., D]. The rows must be whole: an index names a row of the whole table."""
    refuse_partial(op, [None, indices], "look-up by the values of a sum in")
    whole_along(op, weight, {0})
    dims = (*indices.dims, weight.dims[1])
    _unique(op, dims)
    check_disjoint(op, dims, weight.partial)
    return Type(dims, weight.partial)


def _unique(op: Op, dims: Sequence[Dim]) -> None:
    used = [cut.axis for dim in dims for cut in dim.cuts]
    if len(used) != len(set(used)):
        raise IllTyped(f"{op_name(op)}: one mesh axis would cut two dimensions of the result", 0)


def embedding_backward(op: Op, gradient: Type, indices: Type, rows: Any, *_: Any) -> Type:
    """Sums the rows of the gradient by index: tokens that are cut leave a partial sum."""
    refuse_partial(op, [None, indices], "look-up by the values of a sum in")
    if gradient.dims[:-1] != indices.dims:
        raise IllTyped(f"the gradient is {op.axes.describe(gradient)} but the indices are {op.axes.describe(indices)}", 0, 1)
    if not isinstance(rows, int):
        raise Untypable("the number of rows differs between ranks")
    partial = list(linear(op, gradient).partial)
    add_sums(op, partial, gradient.dims[:-1])
    return Type((Dim(rows), gradient.dims[-1]), tuple(partial))


def index(op: Op, value: Type, indices: Sequence[Type | None], *_: Any) -> Type:
    """x[i, :, j]: indexed dimensions must be whole, the others pass through."""
    chosen = [i for i, item in enumerate(indices) if item is not None]
    given = [item for item in indices if item is not None]
    refuse_partial(op, [None, *given], "look-up by the values of a sum in")
    if any(getattr(node.meta.get("val"), "dtype", None) is torch.bool for node in op.node.all_input_nodes[1:]):
        raise Untypable("indexing with a mask has a size that depends on the data")
    whole_along(op, value, set(chosen))
    looked = broadcast(op, given)
    adjacent = chosen == list(range(chosen[0], chosen[-1] + 1))
    kept = [dim for i, dim in enumerate(value.dims) if i not in chosen]
    at = chosen[0] if adjacent else 0
    dims = (*kept[:at], *looked, *kept[at:])
    _unique(op, dims)
    check_disjoint(op, dims, value.partial)
    return Type(dims, value.partial, value.zero)


def index_put(op: Op, value: Type, indices: Sequence[Type | None], source: Type, accumulate: Any = False, *_: Any) -> Type:
    """x with x[i] (+)= source. Accumulating sources that are cut along the indices leave a partial sum."""
    chosen = [i for i, item in enumerate(indices) if item is not None]
    given = [item for item in indices if item is not None]
    refuse_partial(op, [None, *given], "look-up by the values of a sum in")
    whole_along(op, value, set(chosen))
    looked = broadcast(op, given)
    adjacent = chosen == list(range(chosen[0], chosen[-1] + 1))
    at = chosen[0] if adjacent else 0
    kept = [dim for i, dim in enumerate(value.dims) if i not in chosen]
    wanted = (*kept[:at], *looked, *kept[at:])
    if broadcast(op, [source, Type(wanted, op.axes.none)]) != wanted:
        raise IllTyped(f"index_put writes {op.axes.describe(source)} into {op.axes.describe(value)}", 2)
    written = list(source.partial)
    add_sums(op, written, looked)
    if not accumulate and any(written):
        raise IllTyped("index_put overwrites with a value that is partial or cut along the indices", 2)
    return combine(op, [value, Type(value.dims, tuple(written), source.zero)], (0, 2))


def gather(op: Op, value: Type, dim: int, indices: Type, *_: Any) -> Type:
    """out[.., i, ..] = x[.., index[.., i, ..], ..] along a whole dimension."""
    refuse_partial(op, [None, None, indices], "look-up by the values of a sum in")
    position = dim % max(value.rank, 1)
    _match_others(op, value, indices, position)
    check_disjoint(op, indices.dims, value.partial)
    return Type(indices.dims, linear(op, value).partial)


def _match_others(op: Op, value: Type, indices: Type, position: int) -> None:
    whole_along(op, value, {position})
    for i, (mine, theirs) in enumerate(zip(value.dims, indices.dims, strict=True)):
        if i != position and mine != theirs and (mine.cuts or theirs.cuts):
            raise IllTyped(f"{op_name(op)} pairs {op.axes.describe(value)} with indices that are {op.axes.describe(indices)}", 0)


def scatter(op: Op, value: Type, dim: int, indices: Type, source: Any, *rest: Any) -> Type:
    """x with x[.., index, ..] = source along a whole dimension; sources that are cut along it cannot be typed."""
    refuse_partial(op, [None, None, indices], "look-up by the values of a sum in")
    position = dim % max(value.rank, 1)
    _match_others(op, value, indices, position)
    if indices.dims and indices.dims[position].cuts:
        raise IllTyped(f"{op_name(op)} writes pieces of a dimension into a value that every rank holds", 2)
    if isinstance(source, Type):
        _match_others(op, source, indices, position)
        return Type(value.dims, combine(op, [value.with_dims(()), source.with_dims(())], (0, 3)).partial)
    if source != 0:
        refuse_partial(op, [value], "writing a constant by")
    return Type(value.dims, value.partial, value.zero and source == 0)


def scatter_add(op: Op, value: Type, dim: int, indices: Type, source: Type, *_: Any) -> Type:
    """x + sum of source by index: sources cut along the dimension leave a partial sum."""
    refuse_partial(op, [None, None, indices], "look-up by the values of a sum in")
    position = dim % max(value.rank, 1)
    _match_others(op, value, indices, position)
    if source.dims != indices.dims:
        raise IllTyped(f"{op_name(op)} pairs {op.axes.describe(source)} with indices that are {op.axes.describe(indices)}", 3)
    partial = list(linear(op, source).partial)
    add_sums(op, partial, [indices.dims[position]] if indices.dims else [])
    merged = combine(op, [value.with_dims(()), Type((), tuple(partial), source.zero)], (0, 3))
    check_disjoint(op, value.dims, merged.partial)
    return Type(value.dims, merged.partial)


def index_select(op: Op, value: Type, dim: int, indices: Type, *_: Any) -> Type:
    """Rows of a whole dimension."""
    refuse_partial(op, [None, None, indices], "look-up by the values of a sum in")
    position = dim % max(value.rank, 1)
    whole_along(op, value, {position})
    dims = (*value.dims[:position], *indices.dims, *value.dims[position + 1 :])
    _unique(op, dims)
    check_disjoint(op, dims, value.partial)
    return Type(dims, value.partial)


def nll_loss(op: Op, value: Type, target: Type, weight: Type | None, reduction: int, *_: Any) -> tuple[Type, Type]:
    """-x[n, target[n]] reduced (0: none, 1: mean, 2: sum); also the total weight."""
    refuse_partial(op, [value, target, weight], "non-linear op")
    whole_along(op, value, {value.rank - 1})
    rows = value.dims[: value.rank - 1]
    if rows != target.dims:
        raise IllTyped(f"the scores are {op.axes.describe(value)} but the targets are {op.axes.describe(target)}", 0, 1)
    partial = list(op.axes.none)
    add_sums(op, partial, rows)
    if reduction == 1 and any(partial):
        raise Untypable("the mean loss over rows that are cut depends on how many of each rank's targets are ignored")
    weights = Type((), op.axes.none if reduction == 0 else tuple(partial))
    return Type(rows if reduction == 0 else (), weights.partial), weights


def nll_loss_backward(op: Op, gradient: Type, value: Type, target: Type, weight: Any, *rest: Any) -> Type:
    """Row by row; the total weight must be the final one."""
    refuse_partial(op, [None, value, target, weight, None, None, *rest], "non-linear op")
    if value.dims[: value.rank - 1] != target.dims or (gradient.rank and gradient.dims != target.dims):
        raise IllTyped(f"the scores are {op.axes.describe(value)} but the targets are {op.axes.describe(target)}", 1, 2)
    whole_along(op, value, {value.rank - 1})
    refuse_partial(op, [arg for arg in rest if isinstance(arg, Type)], "the total weight in")
    check_disjoint(op, value.dims, gradient.partial)
    return Type(value.dims, linear(op, gradient).partial)


def _heads_pair(op: Op, query: Dim, key: Dim) -> bool:
    """Equal heads, or consecutive query heads that share a key head, with the sharing ones on one rank."""
    if query == key:
        return True
    if query.size % max(key.size, 1) or not (op.axes.is_even(query) and op.axes.is_even(key)):
        return False
    plain = [op.axes.prefix(dim.size, [cut.axis for cut in dim.cuts]) for dim in (query, key)]
    return plain == [query, key] and [c.axis for c in query.cuts] == [c.axis for c in key.cuts]


def _attention_dims(op: Op, query: Type, key: Type, value: Type, *, causal: bool) -> None:
    if query.dims[0] != key.dims[0] or not _heads_pair(op, query.dims[1], key.dims[1]) or key.dims[:3] != value.dims[:3]:
        shown = [op.axes.describe(operand) for operand in (query, key, value)]
        raise IllTyped("attention pairs queries {} with keys {} and values {}".format(*shown), 0, 1)
    for operand in (query, key, value):
        whole_along(op, operand, {3})
    if key.dims[2].cuts:
        raise IllTyped(f"attention sees only a piece of the keys ({op.axes.describe(key)}): the softmax needs all of them", 1)
    if causal and query.dims[2].cuts:
        raise IllTyped(
            f"causal attention of queries that are cut ({op.axes.describe(query)}) masks from position 0 on every rank", 0
        )


def _check_mask(op: Op, query: Type, mask: Type | None) -> None:
    if mask is None:
        return
    refuse_partial(op, [mask], "non-linear op")
    for mine, theirs in zip(reversed(query.dims[:3]), list(reversed(mask.dims))[1:], strict=False):
        if theirs != mine and not (theirs.size == 1 and not theirs.cuts):
            raise IllTyped(f"the attention mask is {op.axes.describe(mask)} but the queries are {op.axes.describe(query)}", 0)


def attention(mask_argument: int | None, causal_argument: int) -> Any:
    """softmax(q k') v kernels: outputs (out, logsumexp, ...)."""

    def rule(op: Op, query: Type, key: Type, value: Type, *rest: Any) -> tuple[Any, ...]:
        args = (query, key, value, *rest)
        refuse_partial(op, args[:3], "non-linear op")
        _attention_dims(op, query, key, value, causal=args[causal_argument] is True)
        _check_mask(op, query, None if mask_argument is None else args[mask_argument])
        _no_dropout(op, args)
        made = op.node.meta["val"]
        first = Type((*query.dims[:3], value.dims[3]), op.axes.none)
        rows = Type(query.dims[:3], op.axes.none)
        if len(made) > 1 and not _fits(op, rows, made[1]):
            raise Untypable("the kernel pads its logsumexp")
        return (first, rows, *[op.axes.whole(tuple(m.shape)) if hasattr(m, "shape") else None for m in made[2:]])

    return rule


def _fits(op: Op, value: Type, made: Any) -> bool:
    return tuple(made.shape) == tuple(op.axes.first_rank(n) for n in op.axes.local_shape(value))


def _no_dropout(op: Op, args: Sequence[Any]) -> None:
    if any(isinstance(arg, float) and arg > 0 for arg in args[3:6]) and not all(v.is_whole for v in args[:3]):
        raise Untypable("attention with dropout draws other numbers on every rank")


def attention_backward(mask_argument: int | None, causal_argument: int) -> Any:
    """Gradients of (q, k, v): linear in the incoming one; queries that are cut leave partial sums for k and v."""

    def rule(op: Op, gradient: Type, query: Type, key: Type, value: Type, *rest: Any) -> tuple[Any, ...]:
        args = (gradient, query, key, value, *rest)
        refuse_partial(op, [None, *args[1:]], "non-linear op")
        _attention_dims(op, query, key, value, causal=args[causal_argument] is True)
        _check_mask(op, query, None if mask_argument is None else args[mask_argument])
        if gradient.dims[:3] != query.dims[:3]:
            raise IllTyped(f"the gradient is {op.axes.describe(gradient)} but the queries are {op.axes.describe(query)}", 0, 1)
        check_disjoint(op, query.dims, gradient.partial)
        partial = list(linear(op, gradient).partial)
        add_sums(op, partial, [query.dims[2]])
        keys = Type(key.dims, tuple(partial))
        results = (Type(query.dims, gradient.partial), keys, Type(value.dims, tuple(partial)))
        made = op.node.meta["val"]
        return (*results, *[None] * (len(made) - 3))

    return rule
