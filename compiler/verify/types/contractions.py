"""Type rules of matrix products and convolutions.

mm:  [M, K] @ [K, N] -> [M, N]     M or N cut -> cut     K cut on both sides -> P(sum)     K cut on one side -> error
"""

# ruff: noqa: ARG001 (all rules share one signature)

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .pointwise import check_disjoint, combine, op_name, product
from .problem import IllTyped, Op, Untypable
from .value import Dim, Type


def contract(op: Op, left: Type, right: Type, labels: str) -> Type:
    """An einsum of two operands, ``labels`` such as ``"mk,kn->mn"``. Labels that vanish are summed."""
    inputs, output = labels.split("->")
    first, second = inputs.split(",")
    dims: dict[str, Dim] = {}
    for names, value in ((first, left), (second, right)):
        for name, dim in zip(names, value.dims, strict=True):
            have = dims.setdefault(name, dim)
            if have != dim:
                raise IllTyped(_unequal(op, name, output, left, right), 0, 1)
    partial = list(product(op, [left.with_dims(()), right.with_dims(())]).partial)
    add_sums(op, partial, [dims[name] for name in dims if name not in output])
    result = tuple(dims[name] for name in output)
    used = [cut.axis for dim in result for cut in dim.cuts]
    if len(used) != len(set(used)):
        raise IllTyped(
            f"{op_name(op)} of {op.axes.describe(left)} and {op.axes.describe(right)}: one mesh axis would cut two dimensions", 0, 1
        )
    check_disjoint(op, result, partial)
    return Type(result, tuple(partial), left.zero or right.zero)


def _unequal(op: Op, name: str, output: str, left: Type, right: Type) -> str:
    doing = "pairs" if name in output else "contracts"
    return (
        f"{op_name(op)} {doing} {op.axes.describe(left)} of {list(left.shape)} "
        f"with {op.axes.describe(right)} of {list(right.shape)}: "
        "the pieces belong to different positions"
    )


def add_sums(op: Op, partial: list[str], summed: Sequence[Dim], state: str = "sum") -> None:
    """Every axis that cuts a summed dimension becomes a pending sum."""
    for dim in summed:
        for cut in dim.cuts:
            if partial[cut.axis]:
                raise IllTyped(f"a partial value over {op.axes.names[cut.axis]} is summed over a dimension cut by the same axis", 0)
            partial[cut.axis] = state


def mm(op: Op, left: Type, right: Type, *_: Any) -> Type:
    """[M, K] @ [K, N]."""
    return contract(op, left, right, "mk,kn->mn")


def bmm(op: Op, left: Type, right: Type, *_: Any) -> Type:
    """[B, M, K] @ [B, K, N]."""
    return contract(op, left, right, "bmk,bkn->bmn")


def mv(op: Op, left: Type, right: Type, *_: Any) -> Type:
    """[M, K] @ [K]."""
    return contract(op, left, right, "mk,k->m")


def dot(op: Op, left: Type, right: Type, *_: Any) -> Type:
    """[K] @ [K]."""
    return contract(op, left, right, "k,k->")


def addmm(op: Op, bias: Type, left: Type, right: Type, *_: Any) -> Type:
    """b + x @ y."""
    return _plus(op, bias, mm(op, left, right))


def baddbmm(op: Op, bias: Type, left: Type, right: Type, *_: Any) -> Type:
    """b + x @ y, batched."""
    return _plus(op, bias, bmm(op, left, right))


def addmv(op: Op, bias: Type, left: Type, right: Type, *_: Any) -> Type:
    """b + x @ v."""
    return _plus(op, bias, mv(op, left, right))


def _plus(op: Op, bias: Type, matrix: Type) -> Type:
    try:
        return combine(op, [bias, matrix], (0, 1))
    except IllTyped as problem:
        if "counted" in str(problem):
            raise IllTyped(str(problem).replace("a replicated value", "a replicated bias", 1), 0) from None
        raise


def linear(op: Op, value: Type, weight: Type, bias: Type | None = None, *_: Any) -> Type:
    """[..., K] @ [N, K].T + b."""
    rows = "abcdefgh"[: value.rank - 1]
    made = contract(op, value, weight, f"{rows}k,nk->{rows}n")
    return made if bias is None else _plus(op, bias, made)


def _refuse_spatial(op: Op, *values: Type) -> None:
    for value in values:
        if any(dim.cuts for dim in value.dims[2:]):
            raise Untypable("a convolution along a dimension that is cut needs its neighbours' borders")


def convolution(
    op: Op,
    value: Type,
    weight: Type,
    bias: Type | None,
    stride: Any,
    padding: Any,
    dilation: Any,
    transposed: bool,  # noqa: FBT001 (the op's own schema)
    output_padding: Any,
    groups: int,
) -> Type:
    """[N, C, *] * [O, C, *] -> [N, O, *]: a contraction over C."""
    _refuse_spatial(op, value, weight)
    if groups != 1 and (value.dims[1].cuts or weight.dims[0].cuts or weight.dims[1].cuts):
        raise Untypable("the channels of a grouped convolution are cut")
    channels = Dim(1) if groups != 1 else value.dims[1]
    inner, outer = (weight.dims[0], weight.dims[1]) if transposed else (weight.dims[1], weight.dims[0])
    spatial = op.node.meta["val"].shape[2:]
    image = value.with_dims((value.dims[0], channels))
    kernel = weight.with_dims((Dim(1) if groups != 1 else inner, outer))
    made = contract(op, image, kernel, "nc,co->no")
    count = made.dims[1].size * (groups if transposed else 1)
    result = made.with_dims((made.dims[0], made.dims[1]._replace(size=count), *(Dim(int(n)) for n in spatial)))
    if bias is None:
        return result
    column = bias.with_dims((bias.dims[0], *[Dim(1)] * len(spatial)))
    return _plus(op, column, result)


def convolution_backward(op: Op, gradient: Type, value: Type, weight: Type, bias_sizes: Any, *rest: Any) -> tuple[Type | None, ...]:
    """The gradients of input (sum over O), weight (sum over N and places) and bias (the same)."""
    *_, transposed, _output_padding, groups, mask = rest
    _refuse_spatial(op, gradient, value, weight)
    if groups != 1 and any(d.cuts for d in (gradient.dims[1], value.dims[1], weight.dims[0], weight.dims[1])):
        raise Untypable("the channels of a grouped convolution are cut")
    whole = groups != 1
    inner, outer = (weight.dims[0], weight.dims[1]) if transposed else (weight.dims[1], weight.dims[0])
    image = value.with_dims((value.dims[0], Dim(1) if whole else value.dims[1]))
    upstream = gradient.with_dims((gradient.dims[0], Dim(1) if whole else gradient.dims[1]))
    kernel = weight.with_dims((Dim(1) if whole else outer, Dim(1) if whole else inner))
    results: list[Type | None] = [None, None, None]
    if mask[0]:
        made = contract(op, upstream, kernel, "no,oc->nc")
        results[0] = made.with_dims(value.dims)
    if mask[1]:
        made = contract(op, upstream, image, "no,nc->oc")
        results[1] = made.with_dims(weight.dims)
    if mask[2]:
        partial = list(gradient.partial)
        add_sums(op, partial, [gradient.dims[0]])
        results[2] = Type((gradient.dims[1],), tuple(partial))
    if bias_sizes is not None:
        op.new_args[3] = [gradient.dims[1].size]
    return tuple(results)
