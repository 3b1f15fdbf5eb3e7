"""Type rules of element-by-element ops.

R + R -> R     S(d) + S(d) -> S(d)     P + P -> P     P + R -> error: R would be counted once per rank
P * R -> P     P * P -> error           f(P) -> error unless f is linear
"""

# ruff: noqa: ARG001 (all rules share one signature)

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .problem import IllTyped, Op
from .value import Dim, Type

MONOTONE = ("max", "min")


def broadcast(op: Op, values: Sequence[Type]) -> tuple[Dim, ...]:
    """Dims of an element-by-element result; partial states are left aside."""
    first = values[0].dims
    if all(value.dims == first for value in values):
        return first
    rank = max(len(value.dims) for value in values)
    result = [Dim(1)] * rank
    for value in values:
        shift = rank - len(value.dims)
        for position, dim in enumerate(value.dims):
            have = result[position + shift]
            if have == dim or (dim.size == 1 and not dim.cuts):
                continue
            if have.size != 1 or have.cuts:
                raise IllTyped(_mismatch(op, values))
            result[position + shift] = dim
    used = [cut.axis for dim in result for cut in dim.cuts]
    if len(set(used)) != len(used):
        raise IllTyped(f"one mesh axis would cut two dimensions of the result: {_describe(op, values)}")
    return tuple(result)


def _mismatch(op: Op, values: Sequence[Type]) -> str:
    shapes = {value.shape for value in values}
    cause = "operands are cut differently" if len(shapes) == 1 else "operands do not line up globally"
    return f"{cause}: {_describe(op, values)}; the pieces would be combined with the wrong partners"


def _describe(op: Op, values: Sequence[Type]) -> str:
    return " and ".join(f"{op.axes.describe(value)} of {list(value.shape)}" for value in values)


def tensors(args: Sequence[Any]) -> list[Type]:
    """The tensor operands among the arguments."""
    return [arg for arg in args if isinstance(arg, Type)]


def check_disjoint(op: Op, dims: Sequence[Dim], partial: Sequence[str]) -> None:
    """An axis either cuts a value or is still to be summed, not both."""
    for dim in dims:
        for cut in dim.cuts:
            if partial[cut.axis]:
                name = op.axes.names[cut.axis]
                raise IllTyped(f"a partial {partial[cut.axis]} over {name} meets an operand that is cut over {name}")


def nonlinear(op: Op, *args: Any) -> Type:
    """f(x, y, ...) of final values only."""
    operands = tensors(args)
    refuse_partial(op, args, "non-linear op")
    return Type(broadcast(op, operands), op.axes.none)


def refuse_partial(op: Op, args: Sequence[Any], kind: str) -> None:
    """Raise when an operand still waits for a reduction."""
    for position, arg in enumerate(args):
        if isinstance(arg, Type) and any(arg.partial):
            raise IllTyped(f"{kind} {op_name(op)} on a partial {reduction_name(arg.partial)}", position)


def op_name(op: Op) -> str:
    """Short name of the op being typed."""
    packet = getattr(op.node.target, "overloadpacket", op.node.target)
    return str(getattr(packet, "__name__", packet))


def reduction_name(partial: Sequence[str]) -> str:
    """``sum``, ``max`` and so on, of the first pending reduction."""
    return next((reduce for reduce in partial if reduce), "sum")


def identity(op: Op, value: Type, *_: Any) -> Type:
    """x -> x."""
    return value


def linear(op: Op, value: Type, *_: Any) -> Type:
    """x -> c x: any partial sum or average stays one."""
    if any(state in MONOTONE or state == "product" for state in value.partial):
        raise IllTyped(f"{op_name(op)} of a partial {reduction_name(value.partial)} is not the {op_name(op)} of the total", 0)
    return Type(value.dims, value.partial, value.zero)


def cast(op: Op, value: Type, *_: Any) -> Type:
    """A change of dtype: linear between floating types, a non-linear op when it rounds to integers."""
    dtype = getattr(op.node.meta.get("val"), "dtype", None)
    before = getattr(op.node.all_input_nodes[0].meta.get("val"), "dtype", None)
    rounds = (
        dtype is not None and before is not None and before.is_floating_point and not (dtype.is_floating_point or dtype.is_complex)
    )
    if rounds:
        refuse_partial(op, [value], "rounding op")
    return value


def add(op: Op, *args: Any) -> Type:
    """a x + b y, with tensors or constants."""
    operands = tensors(args[:2])
    if len(operands) == 1:
        other = next(arg for arg in args[:2] if not isinstance(arg, Type))
        if any(state == "sum" for state in operands[0].partial) and other != 0:
            raise IllTyped(_counted("the constant " + str(other), op, operands[0].partial), 0)
        return operands[0].plain()
    return combine(op, operands, (0, 1))


def combine(op: Op, operands: Sequence[Type], positions: Sequence[int]) -> Type:
    """The sum of operands; ``positions`` are their places among the arguments."""
    dims = broadcast(op, operands)
    zero = all(value.zero for value in operands)
    first = operands[0].partial
    if all(value.partial == first for value in operands):
        if any(state in MONOTONE for state in first):
            raise IllTyped(f"partial {reduction_name(first)} values are added before they are reduced", positions[0])
        check_disjoint(op, dims, first)
        return Type(dims, first, zero)
    partial = []
    for axis, states in enumerate(zip(*[value.partial for value in operands], strict=True)):
        partial.append(_sum_state(op, axis, states, operands, positions))
    check_disjoint(op, dims, partial)
    return Type(dims, tuple(partial), zero)


def _sum_state(op: Op, axis: int, states: Sequence[str], operands: Sequence[Type], positions: Sequence[int]) -> str:
    kinds = {state for state, value in zip(states, operands, strict=True) if not value.zero} or set(states)
    if len(kinds) == 1:
        return kinds.pop()
    if kinds <= {"", "avg"}:
        return "avg"
    if kinds == {"", "sum"}:
        for state, value, position in zip(states, operands, positions, strict=True):
            if state or value.zero:
                continue
            if axis not in value.scaled:
                raise IllTyped(_counted("a value that is " + op.axes.describe(value), op, axis=axis), position)
            op.undo_scale.append((position, op.axes.parts[axis]))
        return "sum"
    found = " and ".join(sorted(f"a partial {kind}" if kind else "a final value" for kind in kinds))
    raise IllTyped(f"{found} over {op.axes.names[axis]} are added: they have no common reduction", *positions)


def _counted(what: str, op: Op, partial: Sequence[str] | None = None, axis: int = -1) -> str:
    if partial is not None:
        axis = next(i for i, state in enumerate(partial) if state == "sum")
    what = "a replicated value" if what.endswith("is R") else what
    return f"{what} is added to a partial sum over {op.axes.names[axis]}: it will be counted {op.axes.parts[axis]} times"


def addition_with_factor(op: Op, value: Type, left: Type, right: Type, *_: Any) -> Type:
    """addcmul: value + c * left * right."""
    return combine(op, [value, product(op, [left, right])], (0, 1))


def addition_with_quotient(op: Op, value: Type, left: Type, right: Type, *_: Any) -> Type:
    """addcdiv: value + c * left / right."""
    return combine(op, [value, divide(op, left, right)], (0, 1))


def lerp(op: Op, start: Type, end: Type, weight: Any, *_: Any) -> Type:
    """start + weight * (end - start): linear in both."""
    if isinstance(weight, Type):
        refuse_partial(op, [None, None, weight], "weight of")
        mixed = combine(op, [start, end], (0, 1))
        return Type(broadcast(op, [mixed, weight]), mixed.partial)
    return combine(op, [start, end], (0, 1))


def multiply(op: Op, *args: Any) -> Type:
    """x * y: at most one of them partial."""
    operands = tensors(args[:2])
    if len(operands) == 1:
        factor = next(arg for arg in args[:2] if not isinstance(arg, Type))
        return _times(op, operands[0], factor)
    return product(op, operands)


def product(op: Op, operands: Sequence[Type]) -> Type:
    """The product of operands."""
    dims = broadcast(op, operands)
    partial = list(op.axes.none)
    for position, value in enumerate(operands):
        for axis, state in enumerate(value.partial):
            if not state:
                continue
            if partial[axis]:
                raise IllTyped(
                    f"the product of two partial values over {op.axes.names[axis]} is not the product of their totals", 0, 1
                )
            if state in MONOTONE:
                raise IllTyped(f"a partial {state} over {op.axes.names[axis]} is scaled before it is reduced", position)
            partial[axis] = state
    check_disjoint(op, dims, partial)
    return Type(dims, tuple(partial), any(value.zero for value in operands))


def _times(op: Op, value: Type, factor: object) -> Type:
    result = linear(op, value)
    if isinstance(factor, float) and factor > 0 and result.is_whole:
        scaled = tuple(axis for axis, n in enumerate(op.axes.parts) if n > 1 and factor * n == 1.0)
        return Type(result.dims, result.partial, result.zero, scaled)
    return result


def divide(op: Op, value: Any, divisor: Any, *rest: Any) -> Type:
    """x / y: linear in x."""
    if isinstance(divisor, Type):
        refuse_partial(op, [None, divisor], "division by the result of a sum in")
        if not isinstance(value, Type):
            return divisor.plain()
        if rest and rest[0] is not None:
            refuse_partial(op, [value], "rounding op")
        dims = broadcast(op, [value, divisor])
        check_disjoint(op, dims, value.partial)
        return Type(dims, linear(op, value).partial, value.zero)
    if rest and rest[0] is not None:
        refuse_partial(op, [value], "rounding op")
    result = linear(op, value)
    if not result.is_whole:
        return result
    scaled = tuple(axis for axis, n in enumerate(op.axes.parts) if n > 1 and divisor == n)
    return Type(result.dims, result.partial, result.zero, scaled)


def linear_in_first(op: Op, gradient: Type, *args: Any) -> Type:
    """A derivative times an incoming gradient: linear in the gradient, which comes first."""
    refuse_partial(op, [None, *args], "non-linear op")
    operands = [gradient, *tensors(args)]
    dims = broadcast(op, operands)
    check_disjoint(op, dims, gradient.partial)
    return Type(dims, linear(op, gradient).partial, gradient.zero)


def where(op: Op, condition: Type, left: Any, right: Any, *_: Any) -> Type:
    """cond ? x : y, linear in (x, y) for a fixed condition."""
    refuse_partial(op, [condition], "the condition of")
    branches = [_branch(op, value) for value in (left, right)]
    merged = _merge_branches(op, branches)
    dims = broadcast(op, [condition, *branches])
    check_disjoint(op, dims, merged.partial)
    return Type(dims, merged.partial, merged.zero)


def _branch(op: Op, value: Any) -> Type:
    return value if isinstance(value, Type) else Type((), op.axes.none, value == 0)


def _merge_branches(op: Op, branches: Sequence[Type]) -> Type:
    states = {branch.partial for branch in branches}
    if len(states) == 1:  # also right for partial max and min: the condition picks the same side on every rank
        return Type(broadcast(op, branches), branches[0].partial, all(branch.zero for branch in branches))
    return combine(op, branches, (1, 2))


def masked_fill(op: Op, value: Type, mask: Type, fill: Any, *_: Any) -> Type:
    """where(mask, fill, x)."""
    return where(op, mask, fill, value)


def extremum(kind: str) -> Any:
    """maximum or minimum: commutes with a partial max or min."""

    def rule(op: Op, left: Type, right: Type, *_: Any) -> Type:
        states = {state for value in (left, right) for state in value.partial if state}
        if states - {kind}:
            refuse_partial(op, [left, right], "non-linear op")
        dims = broadcast(op, [left, right])
        partial = tuple(a or b for a, b in zip(left.partial, right.partial, strict=True))
        check_disjoint(op, dims, partial)
        return Type(dims, partial)

    return rule
