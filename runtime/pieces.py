"""Cut a global tensor into the pieces of the ranks and join them again, by the layout text of a port (``("S(0)", "R")``).

The same meaning as ``compiler.layout`` (axes outermost first, torch's chunk rule), without DTensor, which ranks need not import.
Ranks that hold the same piece get the same object.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from .errors import ProgramError
from .mesh import Mesh
from .shards import local_offset, local_size

_COMBINE: dict[str, Callable[..., torch.Tensor]] = {
    "sum": torch.add,
    "avg": torch.add,
    "max": torch.maximum,
    "min": torch.minimum,
    "product": torch.mul,
}
PARTIAL_OPS = tuple(_COMBINE)


def shard_dim(placement: str) -> int | None:
    """3 for ``S(3)``, None for another placement."""
    return int(placement[2:-1]) if placement.startswith("S(") else None


def partial_op(placement: str) -> str | None:
    """``sum`` for ``P(sum)``, None for another placement."""
    return placement[2:-1] if placement.startswith("P(") else None


def check_layout(layout: Sequence[str], rank_of_tensor: int, mesh: Mesh) -> None:
    """ProgramError unless ``layout`` has one well-formed placement per mesh axis that fits a tensor of that many dimensions."""
    if len(layout) != len(mesh.axes):
        raise ProgramError(f"expected one placement per axis of mesh {mesh}, found {tuple(layout)!r}")
    for placement in layout:
        inner = placement[2:-1]
        well_formed = placement == f"{placement[:1]}({inner})"
        sharded = placement[:1] == "S" and inner.isdecimal() and int(inner) < rank_of_tensor
        if placement != "R" and not (well_formed and (sharded or (placement[:1] == "P" and inner in PARTIAL_OPS))):
            raise ProgramError(f"{placement!r} is no placement of a tensor of {rank_of_tensor} dimensions")


def spans(shape: Sequence[int], layout: Sequence[str], mesh: Mesh, rank: int) -> tuple[tuple[int, int], ...]:
    """(offset, length) per dimension of the piece of ``rank``."""
    where = mesh.coordinate(rank)
    found = [(0, size) for size in shape]
    for placement, (axis, parts) in zip(layout, mesh.axes, strict=True):
        dim = shard_dim(placement)
        if dim is not None:
            offset, length = found[dim]
            found[dim] = (offset + local_offset(length, parts, where[axis]), local_size(length, parts, where[axis]))
    return tuple(found)


def local_shape(shape: Sequence[int], layout: Sequence[str], mesh: Mesh, rank: int) -> tuple[int, ...]:
    """Sizes of the piece of ``rank``."""
    return tuple(length for _, length in spans(shape, layout, mesh, rank))


def piece_of(value: torch.Tensor, layout: Sequence[str], mesh: Mesh, rank: int) -> torch.Tensor:
    """The piece of one rank, a view unless it is partial.

    A partial sum (product) is the value on index 0 of its axis, zeros (ones) elsewhere; avg, max and min are the value everywhere.
    """
    where = mesh.coordinate(rank)
    for dim, (offset, length) in enumerate(spans(value.shape, layout, mesh, rank)):
        if length != value.shape[dim]:
            value = value.narrow(dim, offset, length)
    for placement, axis in zip(layout, mesh.names, strict=True):
        if where[axis] != 0 and partial_op(placement) in ("sum", "product"):
            return torch.full_like(value, 0 if partial_op(placement) == "sum" else 1)
    return value


def holders(layout: Sequence[str], mesh: Mesh) -> tuple[int, ...]:
    """rank -> the first rank that holds the same piece (itself included)."""
    axes = [
        axis
        for placement, axis in zip(layout, mesh.names, strict=True)
        if placement[:1] == "S" or "sum" in placement or "pro" in placement
    ]
    first: dict[tuple[int, ...], int] = {}
    found = []
    for rank in range(mesh.size):
        where = mesh.coordinate(rank)
        found.append(first.setdefault(tuple(where[axis] for axis in axes), rank))
    return tuple(found)


def cut(value: torch.Tensor, layout: Sequence[str], mesh: Mesh) -> list[torch.Tensor]:
    """The pieces of all ranks, in rank order."""
    if mesh.size == 1:
        return [value]
    pieces: dict[int, torch.Tensor] = {}
    return [
        pieces[holder] if holder in pieces else pieces.setdefault(holder, piece_of(value, layout, mesh, holder))
        for holder in holders(layout, mesh)
    ]


def assemble(pieces: Sequence[torch.Tensor], layout: Sequence[str], mesh: Mesh) -> torch.Tensor:
    """Inverse of ``cut``: the global tensor from the pieces of all ranks. Axes are joined innermost first."""
    values = list(pieces)
    for placement, (_, parts) in zip(reversed(layout), reversed(mesh.axes), strict=True):
        values = [_join(values[start : start + parts], placement) for start in range(0, len(values), parts)]
    return values[0]


def _join(pieces: Sequence[torch.Tensor], placement: str) -> torch.Tensor:
    dim, op = shard_dim(placement), partial_op(placement)
    if len(pieces) == 1:
        return pieces[0]
    if dim is not None:
        return torch.cat(list(pieces), dim)
    return pieces[0] if op is None else reduce_tensors(pieces, op)


def reduce_tensors(pieces: Sequence[torch.Tensor], op: str) -> torch.Tensor:
    """Elementwise ``op`` over equal shapes, in rank order, as a new tensor."""
    combine = _COMBINE.get(op)
    if combine is None:
        raise ProgramError(f"expected one of the reductions {PARTIAL_OPS}, found {op!r}")
    if len(pieces) == 1:
        return pieces[0].clone()
    result = combine(pieces[0], pieces[1])
    for piece in pieces[2:]:
        combine(result, piece, out=result)
    return result.div_(len(pieces)) if op == "avg" else result
