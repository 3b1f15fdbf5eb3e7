"""Type rules of reductions, softmax and normalisations.

sum over a cut dimension -> P(sum)     mean -> P(avg)     max -> P(max)     softmax, argmax, variance over it -> error
"""

# ruff: noqa: FBT002 (all rules share one signature)

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from .contractions import add_sums
from .pointwise import broadcast, check_disjoint, linear, op_name, refuse_partial
from .problem import IllTyped, Op, Untypable
from .value import Dim, Type


def positions(value: Type, dims: Any) -> set[int]:
    """Reduced dimensions, normalised; None and [] mean all."""
    if dims is None or dims == []:
        return set(range(value.rank))
    return {d % max(value.rank, 1) for d in ([dims] if isinstance(dims, int) else dims)}


def reduced_dims(value: Type, chosen: set[int], *, keep: bool) -> tuple[Dim, ...]:
    """Dims after a reduction."""
    return tuple(Dim(1) if i in chosen else dim for i, dim in enumerate(value.dims) if keep or i not in chosen)


def total(op: Op, value: Type, dims: Any = None, keep: Any = False, *_: Any) -> Type:
    """sum."""
    linear(op, value)
    if not isinstance(keep, bool):
        keep = False
    chosen = positions(value, None if not isinstance(dims, (int, list, tuple)) else dims)
    if any(state == "avg" and value.dims[i].cuts for i in chosen for state in value.partial):
        raise Untypable("a sum over a cut dimension of a value that is partial in another way")
    partial = list(value.partial)
    add_sums(op, partial, [value.dims[i] for i in chosen])
    return Type(reduced_dims(value, chosen, keep=keep), tuple(partial), value.zero)


def mean(op: Op, value: Type, dims: Any = None, keep: Any = False, *_: Any) -> Type:
    """The mean over a cut dimension is a partial average, if all pieces are of the same length."""
    linear(op, value)
    if not isinstance(keep, bool):
        keep = False
    chosen = positions(value, None if not isinstance(dims, (int, list, tuple)) else dims)
    for i in chosen:
        if not op.axes.is_even(value.dims[i]):
            raise IllTyped(f"mean over dimension {i}, which is cut into pieces of different lengths", 0)
    partial = list(value.partial)
    add_sums(op, partial, [value.dims[i] for i in chosen], "avg")
    return Type(reduced_dims(value, chosen, keep=keep), tuple(partial))


def extreme(state: str) -> Callable[..., Type]:
    """amax, amin, any, all: a cut dimension leaves a partial max or min."""

    def rule(op: Op, value: Type, dims: Any = None, keep: Any = False, *_: Any) -> Type:
        if any(s and s != state for s in value.partial):
            refuse_partial(op, [value], "non-linear op")
        chosen = positions(value, dims if isinstance(dims, (int, list, tuple)) else None)
        partial = list(value.partial)
        for i in chosen:
            for cut in value.dims[i].cuts:
                partial[cut.axis] = state
        return Type(reduced_dims(value, chosen, keep=keep is True), tuple(partial))

    return rule


def needs_whole(dim_argument: int, keep_argument: int | None = None, default: Any = None) -> Callable[..., Any]:
    """Ops along one dimension (or several) that have no partial form: argmax, sort, cumsum, prod, var, norm ...

    keep_argument: position of keepdim for ops that drop the dimension, None for ops that keep the shape.
    """

    def rule(op: Op, *args: Any) -> Any:
        value: Type = args[0]
        refuse_partial(op, [value], "non-linear op")
        dims = args[dim_argument] if dim_argument < len(args) else default
        chosen = positions(value, dims if isinstance(dims, (int, list, tuple)) else None)
        whole_along(op, value, chosen)
        result = Type(value.dims, op.axes.none)
        if keep_argument is not None:
            keep = args[keep_argument] is True if keep_argument < len(args) else False
            result = Type(reduced_dims(value, chosen, keep=keep), op.axes.none)
        return many(op, result)

    return rule


def many(op: Op, value: Type) -> Any:
    """The same type for every output."""
    made = op.node.meta["val"]
    return (value,) * len(made) if isinstance(made, (tuple, list)) else value


def whole_along(op: Op, value: Type, chosen: set[int]) -> None:
    """Raise when one of the dimensions is cut."""
    for i in sorted(chosen):
        if i < value.rank and value.dims[i].cuts:
            raise IllTyped(
                f"{op_name(op)} over dimension {i}, which is cut ({op.axes.describe(value)}): it needs a collective first", 0
            )


def cumulative(op: Op, value: Type, dim: int, *_: Any) -> Type:
    """cumsum: linear along a whole dimension."""
    whole_along(op, value, positions(value, dim))
    return linear(op, value)


def topk(op: Op, value: Type, count: int, dim: int = -1, *_: Any) -> tuple[Type, Type]:
    """The largest entries along a whole dimension."""
    refuse_partial(op, [value], "non-linear op")
    position = dim % max(value.rank, 1)
    whole_along(op, value, {position})
    dims = tuple(Dim(count) if i == position else d for i, d in enumerate(value.dims))
    return (Type(dims, op.axes.none),) * 2


def softmax(op: Op, value: Type, dim: int, *_: Any) -> Type:
    """softmax, log_softmax."""
    refuse_partial(op, [value], "non-linear op")
    whole_along(op, value, positions(value, dim))
    return Type(value.dims, op.axes.none)


def softmax_backward(op: Op, gradient: Type, output: Type, dim: int, *_: Any) -> Type:
    """Linear in the gradient."""
    refuse_partial(op, [None, output], "non-linear op")
    whole_along(op, output, positions(output, dim))
    dims = broadcast(op, [gradient, output])
    check_disjoint(op, dims, gradient.partial)
    return Type(dims, linear(op, gradient).partial)


def _refuse_trailing(op: Op, value: Type, count: int) -> None:
    whole_along(op, value, set(range(value.rank - count, value.rank)))


def layer_norm(op: Op, value: Type, shape: Sequence[int], *rest: Any) -> tuple[Type, ...]:
    """layer norm, RMS norm: the normalised dimensions must be whole. Outputs: value and the statistics of each row."""
    refuse_partial(op, [value, None, *rest], "non-linear op")
    _refuse_trailing(op, value, len(shape))
    _refuse_cut_parameters(op, rest)
    rows = Type((*value.dims[: value.rank - len(shape)], *[Dim(1)] * len(shape)), op.axes.none)
    made = op.node.meta["val"]
    return (Type(value.dims, op.axes.none), *[rows] * (len(made) - 1))


def _refuse_cut_parameters(op: Op, values: Sequence[Any]) -> None:
    for value in values:
        if isinstance(value, Type) and not value.is_whole:
            raise IllTyped(f"the parameters of {op_name(op)} must be whole on every rank, found {op.axes.describe(value)}")


def layer_norm_backward(op: Op, gradient: Type, value: Type, shape: Sequence[int], *rest: Any) -> tuple[Type | None, ...]:
    """Input gradient like the input; parameter gradients are sums over all rows. Linear in the incoming gradient."""
    *statistics, mask = rest
    refuse_partial(op, [None, value, None, *statistics], "non-linear op")
    _refuse_trailing(op, value, len(shape))
    if gradient.dims != value.dims:
        raise IllTyped(f"the gradient is {op.axes.describe(gradient)} and the input {op.axes.describe(value)}", 0, 1)
    check_disjoint(op, value.dims, gradient.partial)
    partial = list(linear(op, gradient).partial)
    lead = value.dims[: value.rank - len(shape)]
    add_sums(op, partial, lead)
    parameter = Type(value.dims[value.rank - len(shape) :], tuple(partial))
    made = op.node.meta["val"]
    results: list[Type | None] = [Type(value.dims, gradient.partial), *[parameter] * (len(made) - 1)]
    return tuple(result if wanted else None for result, wanted in zip(results, mask, strict=True))


def group_norm(op: Op, value: Type, *rest: Any) -> tuple[Type, ...]:
    """native_group_norm(x, weight, bias, N, C, HxW, group, eps): only the batch may be cut."""
    refuse_partial(op, [value, *rest], "non-linear op")
    whole_along(op, value, set(range(1, value.rank)))
    _refuse_cut_parameters(op, rest[:2])
    op.new_args[3] = value.dims[0].size
    rows = Type((value.dims[0], Dim(rest[5])), op.axes.none)
    return Type(value.dims, op.axes.none), rows, rows


def group_norm_backward(op: Op, gradient: Type, value: Type, *rest: Any) -> tuple[Type | None, ...]:
    """native_group_norm_backward(grad, x, mean, rstd, weight, N, C, HxW, group, mask)."""
    mask = rest[-1]
    refuse_partial(op, [None, value, *rest], "non-linear op")
    whole_along(op, value, set(range(1, value.rank)))
    if gradient.dims != value.dims:
        raise IllTyped(f"the gradient is {op.axes.describe(gradient)} and the input {op.axes.describe(value)}", 0, 1)
    op.new_args[5] = value.dims[0].size
    partial = list(linear(op, gradient).partial)
    add_sums(op, partial, [value.dims[0]])
    parameter = Type((value.dims[1],), tuple(partial))
    results = (Type(value.dims, gradient.partial), parameter, parameter)
    return tuple(result if wanted else None for result, wanted in zip(results, mask, strict=True))


def batch_norm(train_argument: int | None) -> Callable[..., Any]:
    """Batch norm over [N, C, *]: statistics of the batch need it whole; with running statistics every row stands alone.

    train_argument: position of the flag; None for ops that always use the batch.
    """

    def rule(op: Op, value: Type, *rest: Any) -> Any:
        refuse_partial(op, [value, *rest], "non-linear op")
        training = True if train_argument is None else bool(rest[train_argument - 1])
        others = {i for i in range(value.rank) if i != 1}
        if training:
            whole_along(op, value, others)
        channel = value.dims[1]
        for parameter in rest:
            if isinstance(parameter, Type) and parameter.rank == 1 and parameter.dims[0] != channel and parameter.shape != (0,):
                raise IllTyped(f"batch norm pairs channels of {op.axes.describe(value)} with {op.axes.describe(parameter)}", 0)
        statistics = Type((channel,), op.axes.none)
        made = op.node.meta["val"]
        extras = [statistics if tuple(m.shape) != (0,) else op.axes.whole((0,)) for m in made[1:]]
        return (Type(value.dims, op.axes.none), *extras)

    return rule


def batch_norm_backward(op: Op, gradient: Type, value: Type, *rest: Any) -> tuple[Type | None, ...]:
    """native_batch_norm_backward(grad, x, weight, running_mean, running_var, save_mean, save_invstd, train, eps, mask)."""
    training, mask = bool(rest[5]), rest[7]
    refuse_partial(op, [None, value, *rest], "non-linear op")
    if gradient.dims != value.dims:
        raise IllTyped(f"the gradient is {op.axes.describe(gradient)} and the input {op.axes.describe(value)}", 0, 1)
    others = [dim for i, dim in enumerate(value.dims) if i != 1]
    if training:
        whole_along(op, value, {i for i in range(value.rank) if i != 1})
    partial = list(linear(op, gradient).partial)
    add_sums(op, partial, others)
    parameter = Type((value.dims[1],), tuple(partial))
    results = (Type(value.dims, gradient.partial), parameter, parameter)
    return tuple(result if wanted else None for result, wanted in zip(results, mask, strict=True))
