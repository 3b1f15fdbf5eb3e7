"""Collectives as functions of the values of all ranks at once: what a communicator does, without one.

Each takes and returns one value per rank. Members of a group that receive the same tensor receive the same object. What a real
communicator would refuse (pieces of different shapes, strided memory) is refused here as well.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from ...runtime.mesh import Mesh
from ..errors import CollectiveMismatch, UnsupportedError

c10d = torch.ops._c10d_functional

Values = list[torch.Tensor]
"""One tensor per rank."""


def is_collective(target: Any) -> bool:
    """Whether an op needs the values of several ranks."""
    return isinstance(target, torch._ops.OpOverload) and target.namespace == "_c10d_functional"


def run_collective(target: Any, values: Values, arguments: Sequence[Any], mesh: Mesh) -> Values:
    """Run one collective. values: first argument on every rank; arguments: the other ones, the same on every rank.

    Raises CollectiveMismatch where real ranks would disagree, UnsupportedError for an op that is not known here.
    """
    if target is c10d.wait_tensor.default:
        return values
    if target not in _BODIES:
        raise UnsupportedError(f"expected one of {', '.join(map(str, _BODIES))}; found {target}, which no interpreter here knows")
    *settings, axis = arguments
    results: list[torch.Tensor | None] = [None] * mesh.size
    for group in mesh.groups(axis):
        members = [values[rank] for rank in group]
        _check_members(target, members, group)
        for rank, result in zip(group, _BODIES[target](members, *settings), strict=True):
            results[rank] = result
    return [result for result in results if result is not None]


def run_exchange(values: Values, splits: Sequence[tuple[Sequence[int], Sequence[int]]], mesh: Mesh, axis: str) -> Values:
    """all_to_all_single, whose split sizes may differ from rank to rank. splits: (received, sent) rows per peer, for every rank."""
    results: list[torch.Tensor | None] = [None] * mesh.size
    for group in mesh.groups(axis):
        parts = []
        for member, rank in enumerate(group):
            received, sent = splits[rank]
            rows = values[rank].shape[0]
            if sum(sent) != rows or len(sent) != len(group) or len(received) != len(group):
                raise CollectiveMismatch(f"expected {len(group)} splits of {rows} rows, found {list(sent)}")
            expected = [splits[other][0][member] for other in group]
            if list(sent) != expected:
                raise CollectiveMismatch(f"rank {rank} sends {list(sent)} rows to the ranks {list(group)}, which expect {expected}")
            parts.append(torch.split(values[rank], list(sent)))
        for member, rank in enumerate(group):
            results[rank] = torch.cat([part[member] for part in parts])
    return [result for result in results if result is not None]


def reduce_values(values: Sequence[torch.Tensor], operation: str) -> torch.Tensor:
    """Elementwise over ranks, in rank order: sum, avg, max, min or product."""
    result = values[0]
    for value in values[1:]:
        match operation:
            case "sum" | "avg":
                result = result + value
            case "max":
                result = torch.maximum(result, value)
            case "min":
                result = torch.minimum(result, value)
            case "product":
                result = result * value
            case _:
                raise UnsupportedError(f"expected a reduction by sum, avg, max, min or product; found {operation!r}")
    return result / len(values) if operation == "avg" else result


def _check_members(target: Any, members: Values, group: Sequence[int]) -> None:
    shapes = {rank: tuple(value.shape) for rank, value in zip(group, members, strict=True)}
    if len(set(shapes.values())) > 1:
        raise CollectiveMismatch(f"{target}: expected the same shape on every rank of the group, found {shapes}")
    if target is not c10d.all_reduce.default and not all(value.is_contiguous() for value in members):
        raise CollectiveMismatch(f"{target}: expected contiguous tensors, found strides {[value.stride() for value in members]}")


def _check_size(found: int, members: Values) -> None:
    if found != len(members):
        raise CollectiveMismatch(f"expected a group of {len(members)} ranks, found group_size {found}")


def _all_reduce(members: Values, operation: str) -> Values:
    return [reduce_values(members, operation)] * len(members)


def _all_gather(members: Values, size: int) -> Values:
    _check_size(size, members)
    return [torch.cat(members)] * len(members)


def _reduce_scatter(members: Values, operation: str, size: int) -> Values:
    _check_size(size, members)
    rows = members[0].shape[0]
    if rows % size:
        raise CollectiveMismatch(f"expected dimension 0 to be a multiple of {size} ranks, found {rows}")
    return [piece.contiguous() for piece in torch.split(reduce_values(members, operation), rows // size)] if rows else members


def _all_to_all(members: Values, received: Sequence[int], sent: Sequence[int]) -> Values:
    if math.fsum(sent) != members[0].shape[0] or len(sent) != len(members) or len(received) != len(members):
        raise CollectiveMismatch(f"expected {len(members)} splits of {members[0].shape[0]} rows, found {list(sent)}")
    parts = [torch.split(value, list(sent)) for value in members]
    return [torch.cat([parts[source][target] for source in range(len(members))]) for target in range(len(members))]


_BODIES: dict[Any, Callable[..., Values]] = {
    c10d.all_reduce.default: _all_reduce,
    c10d.all_gather_into_tensor.default: _all_gather,
    c10d.reduce_scatter_tensor.default: _reduce_scatter,
    c10d.all_to_all_single.default: _all_to_all,
}
