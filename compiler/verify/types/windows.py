"""Type rules of ops whose windows run over the trailing dimensions: pooling, padding by neighbours, interpolation.

The trailing dimensions must be whole, the others pass through:  [N, C, H, W] cut in N or C -> cut in N or C
"""

# ruff: noqa: ARG001 (all rules share one signature)

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from .pointwise import check_disjoint, linear, op_name, refuse_partial
from .problem import IllTyped, Op, Untypable
from .value import Dim, Type


def pooling(op: Op, value: Type, *rest: Any) -> Any:
    """Pooling and other windows over the trailing dimensions, which must be whole; leading dimensions pass through."""
    refuse_partial(op, [value], "non-linear op")
    return _windows(op, value)


def linear_window(op: Op, value: Type, *rest: Any) -> Any:
    """The same for linear windows: average pooling, interpolation."""
    return _windows(op, linear(op, value))


def moving_window(op: Op, value: Type, *rest: Any) -> Any:
    """The same for windows that only copy elements: any pending reduction stays one."""
    return _windows(op, value)


def _spatial(op: Op) -> int:
    """How many trailing dimensions a window op works on, as its name says: a picture may come without a batch."""
    found = re.search(r"([123])d", op_name(op))
    if found is None:
        raise Untypable(f"no rule for the windows of {op_name(op)}")
    return int(found[1])


def _windows(op: Op, value: Type) -> Any:
    made = op.node.meta["val"]
    kept = value.rank - _spatial(op)
    _refuse_cut(op, value.dims[kept:])
    outputs = made if isinstance(made, (tuple, list)) else [made]
    results = [value.with_dims((*value.dims[:kept], *(Dim(int(n)) for n in output.shape[kept:]))) for output in outputs]
    return tuple(results) if isinstance(made, (tuple, list)) else results[0]


def _refuse_cut(op: Op, dims: Sequence[Dim]) -> None:
    if any(dim.cuts for dim in dims):
        raise Untypable(f"{op_name(op)} along a dimension that is cut needs its neighbours' borders")


def interpolation_backward(op: Op, gradient: Type, output_size: Any, input_size: Sequence[Any], *rest: Any) -> Type:
    """Gradient of an interpolation: linear, of the size that is given for the pieces."""
    kept = gradient.rank - _spatial(op)
    _refuse_cut(op, gradient.dims[kept:])
    dims = (*gradient.dims[:kept], *(Dim(int(n)) for n in input_size[kept:]))
    op.new_args[2] = [dim.size for dim in dims]
    return linear(op, gradient).with_dims(dims)


def pooling_backward(op: Op, gradient: Type, value: Type, *rest: Any) -> Type:
    """Gradient of a window op: linear in the gradient, sized like the input."""
    kept = value.rank - _spatial(op)
    _refuse_cut(op, (*gradient.dims[kept:], *value.dims[kept:]))
    refuse_partial(op, [None, value, *rest], "non-linear op")
    if gradient.dims[:kept] != value.dims[:kept]:
        raise IllTyped(f"the gradient is {op.axes.describe(gradient)} and the input {op.axes.describe(value)}", 0, 1)
    check_disjoint(op, value.dims, gradient.partial)
    return Type(value.dims, linear(op, gradient).partial)
