"""Functional collectives on values: a function of what all ranks of each group hold. Groups are mesh-axis names."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ....runtime.mesh import Mesh
from ...errors import CollectiveMismatch, UnsupportedError
from .algebra import Algebra
from .ops.views import join, narrow
from .order import maximum, minimum
from .value import RingTensor, Value

c10d = torch.ops._c10d_functional

Group = list[tuple[Any, ...]]
"""Positional arguments of each member, in group order."""


@dataclass(frozen=True)
class Meeting:
    """One collective of all ranks. arguments: positional, per rank."""

    algebra: Algebra
    mesh: Mesh
    target: Any
    arguments: Sequence[tuple[Any, ...]]


def run_collective(meeting: Meeting) -> list[Value]:
    """Results per rank. Raises CollectiveMismatch where members of a group disagree, UnsupportedError for an unknown one."""
    if meeting.target is c10d.wait_tensor.default:
        return [arguments[0] for arguments in meeting.arguments]
    function = _MEANINGS.get(meeting.target)
    if function is None:
        raise UnsupportedError(f"unsupported({meeting.target}): no meaning in lockstep; give one through `extensions`")
    axes = {arguments[-1] for arguments in meeting.arguments}
    if len(axes) != 1 or not axes <= set(meeting.mesh.names):
        raise CollectiveMismatch(
            f"{meeting.target}: all ranks must name one axis of mesh {meeting.mesh} as the group; found {sorted(map(str, axes))}"
        )
    results: list[Value] = [None] * meeting.mesh.size
    for members in meeting.mesh.groups(axes.pop()):
        for rank, result in zip(members, function(meeting.algebra, [meeting.arguments[r] for r in members]), strict=True):
            results[rank] = result
    return results


def _agree(group: Group, *, shapes: bool = True) -> None:
    """Everything but the tensor must be the same on all members; its shape and dtype as well where the collective needs that."""
    settings = {tuple(map(str, arguments[1:])) for arguments in group}
    kinds = {(tuple(a[0].shape) if shapes else len(a[0].shape), a[0].dtype) for a in group}
    if len(settings) != 1 or len(kinds) != 1:
        raise CollectiveMismatch(
            f"members of a group disagree: settings {sorted(settings)}, shapes and dtypes {sorted(map(str, kinds))}"
        )


def reduce_values(alg: Algebra, values: Sequence[Value], op: str) -> Value:
    """sum, avg, product, max or min of values on several ranks."""
    concrete = not any(isinstance(value, RingTensor) for value in values)
    steps: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
        "sum": (torch.add, alg.add),
        "avg": (torch.add, alg.add),
        "product": (torch.mul, alg.mul),
        "max": (torch.maximum, lambda a, b: maximum(alg, a, b)),
        "min": (torch.minimum, lambda a, b: minimum(alg, a, b)),
    }
    if op not in steps:
        raise UnsupportedError(f"unsupported(reduction {op!r}): known are {', '.join(steps)}")
    step = steps[op][0 if concrete else 1]
    total = values[0]
    for value in values[1:]:
        total = step(total, value)
    if op == "avg":
        total = torch.div(total, len(values), rounding_mode="floor") if concrete else alg.div(total, len(values))
    return total


def all_reduce(alg: Algebra, group: Group) -> list[Value]:
    """(input, op, group)."""
    _agree(group)
    return [reduce_values(alg, [a[0] for a in group], group[0][1])] * len(group)


def all_reduce_coalesced(alg: Algebra, group: Group) -> list[Value]:
    """(inputs, op, group)."""
    totals = [reduce_values(alg, values, group[0][1]) for values in zip(*[a[0] for a in group], strict=True)]
    return [totals] * len(group)


def all_gather(alg: Algebra, group: Group) -> list[Value]:
    """(input, group size, group): concatenated along dimension 0."""
    _agree(group)
    _check_size(group[0][1], group)
    return [_cat(alg, [a[0] for a in group])] * len(group)


def reduce_scatter(alg: Algebra, group: Group) -> list[Value]:
    """(input, op, group size, group): member i gets chunk i of the reduction along dimension 0."""
    _agree(group)
    _check_size(group[0][2], group)
    total = reduce_values(alg, [a[0] for a in group], group[0][1])
    if total.shape[0] % len(group):
        raise CollectiveMismatch(f"reduce_scatter: dimension 0 of {tuple(total.shape)} does not divide by {len(group)} members")
    length = total.shape[0] // len(group)
    return [_range(total, index * length, length) for index in range(len(group))]


def all_to_all(alg: Algebra, group: Group) -> list[Value]:
    """(input, output split sizes, input split sizes, group) along dimension 0."""
    sent = []
    for index, (value, receive, send, *_) in enumerate(group):
        if sum(send) != value.shape[0] or any(send[j] != group[j][1][index] for j in range(len(group))):
            raise CollectiveMismatch(
                f"all_to_all: member {index} sends {list(send)} of {value.shape[0]} rows, the others expect "
                f"{[group[j][1][index] for j in range(len(group))]} from it"
            )
        del receive
        starts = [sum(send[:j]) for j in range(len(send))]
        sent.append([_range(value, start, length) for start, length in zip(starts, send, strict=True)])
    return [_cat(alg, [parts[index] for parts in sent]) for index in range(len(group))]


def broadcast(_: Algebra, group: Group) -> list[Value]:
    """(input, source, group): the source is an index on the axis."""
    _agree(group)
    return [group[group[0][1]][0]] * len(group)


def _check_size(size: int, group: Group) -> None:
    if size != len(group):
        raise CollectiveMismatch(f"the collective says {size} members, the axis has {len(group)}")


def _cat(alg: Algebra, values: Sequence[Value]) -> Value:
    return join(alg, values, 0) if any(isinstance(value, RingTensor) for value in values) else torch.cat(list(values), 0)


def _range(value: Value, start: int, length: int) -> Value:
    return narrow(value, 0, start, length) if isinstance(value, RingTensor) else value.narrow(0, start, length)


_MEANINGS: dict[Any, Callable[[Algebra, Group], list[Value]]] = {
    c10d.all_reduce.default: all_reduce,
    c10d.all_reduce_coalesced.default: all_reduce_coalesced,
    c10d.all_gather_into_tensor.default: all_gather,
    c10d.reduce_scatter_tensor.default: reduce_scatter,
    c10d.all_to_all_single.default: all_to_all,
    c10d.broadcast.default: broadcast,
}
