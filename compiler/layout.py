"""Where the pieces of a tensor lie: one DTensor placement per mesh axis, read from the outermost axis inwards.

layout (Shard(0), Replicate())  on  dp=2,tp=4:  dimension 0 is cut in two over dp, every tp rank holds the same piece
layout (Shard(0), Shard(0))     the dp piece is cut again over tp (left to right, as in DTensor)
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch.distributed.tensor import Partial, Replicate, Shard
from torch.distributed.tensor.placement_types import Placement

from ..runtime.mesh import Mesh
from ..runtime.shards import chunk_size, coordinate, local_offset, local_size, padded_size, padding

__all__ = [
    "Layout",
    "Partial",
    "Placement",
    "Replicate",
    "Shard",
    "assemble",
    "chunk_size",
    "coordinate",
    "cut",
    "format_layout",
    "format_placement",
    "global_slices",
    "has_empty_piece",
    "local_offset",
    "local_shape",
    "local_size",
    "padded_size",
    "padding",
    "parse_placement",
    "replicated",
]

Layout = tuple[Placement, ...]
"""One placement per mesh axis, outermost axis first."""


def replicated(mesh: Mesh) -> Layout:
    """The layout in which every rank holds everything."""
    return (Replicate(),) * len(mesh.axes)


def format_placement(placement: Placement | None) -> str:
    """``R``, ``S(0)``, ``P(sum)``; ``-`` for something that is not a tensor."""
    match placement:
        case None:
            return "-"
        case Replicate():
            return "R"
        case Shard():
            return f"S({placement.dim})"
        case Partial():
            return f"P({placement.reduce_op})"
    return str(placement)


def parse_placement(text: str) -> Placement:
    """Inverse of ``format_placement`` for tensors."""
    if text == "R":
        return Replicate()
    kind, inner = text[:1], text[2:-1]
    return Shard(int(inner)) if kind == "S" else Partial(inner)


def format_layout(layout: Layout | None) -> str:
    """``S(0),R`` and the like, one entry a mesh axis."""
    return "-" if layout is None else ",".join(map(format_placement, layout))


def global_slices(shape: Sequence[int], layout: Layout, mesh: Mesh, rank: int) -> tuple[tuple[int, int], ...]:
    """For each dimension the (offset, length) of the piece that ``rank`` holds."""
    where = mesh.coordinate(rank)
    spans = [(0, size) for size in shape]
    for placement, (axis, parts) in zip(layout, mesh.axes, strict=True):
        if isinstance(placement, Shard):
            offset, length = spans[placement.dim]
            index = where[axis]
            spans[placement.dim] = (offset + local_offset(length, parts, index), local_size(length, parts, index))
    return tuple(spans)


def local_shape(shape: Sequence[int], layout: Layout, mesh: Mesh, rank: int = 0) -> tuple[int, ...]:
    """Shape of the piece that ``rank`` holds."""
    return tuple(length for _, length in global_slices(shape, layout, mesh, rank))


def has_empty_piece(shape: Sequence[int], layout: Layout, mesh: Mesh) -> bool:
    """Whether some rank holds nothing of a value that is not empty itself (8 over 2 and then over 3 leaves 2, 2, 0, ...)."""
    return _has_empty_piece(tuple(shape), layout, mesh)


@functools.lru_cache(maxsize=1 << 14)
def _has_empty_piece(shape: tuple[int, ...], layout: Layout, mesh: Mesh) -> bool:
    lengths = [{size} for size in shape]
    for placement, (_, parts) in zip(layout, mesh.axes, strict=True):
        if isinstance(placement, Shard):
            dim = placement.dim
            lengths[dim] = {local_size(n, parts, index) for n in lengths[dim] for index in range(parts)}
    return 0 not in shape and any(0 in found for found in lengths)


def cut(value: torch.Tensor, layout: Layout, mesh: Mesh) -> list[torch.Tensor]:
    """The pieces of ``value`` on every rank, as views where nothing is partial.

    A partial sum is represented by the value on index 0 of its axis and zeros elsewhere; a partial max/min/avg/product by the value
    on every rank (avg, max, min) or ones elsewhere (product).
    """
    pieces = []
    for rank in range(mesh.size):
        piece = value
        for dim, (offset, length) in enumerate(global_slices(value.shape, layout, mesh, rank)):
            if length != piece.shape[dim]:
                piece = piece.narrow(dim, offset, length)
        where = mesh.coordinate(rank)
        for placement, (axis, _) in zip(layout, mesh.axes, strict=True):
            if isinstance(placement, Partial) and where[axis] != 0:
                if placement.reduce_op == "sum":
                    piece = torch.zeros_like(piece)
                elif placement.reduce_op == "product":
                    piece = torch.ones_like(piece)
        pieces.append(piece)
    return pieces


def assemble(pieces: Sequence[torch.Tensor], layout: Layout, mesh: Mesh) -> torch.Tensor:
    """Inverse of ``cut``: the global value from all ranks' pieces (rank order). Axes are joined innermost first."""
    values = list(pieces)
    for placement, (_, parts) in zip(reversed(layout), reversed(mesh.axes), strict=True):
        values = [_join(values[start : start + parts], placement) for start in range(0, len(values), parts)]
    return values[0]


def _join(pieces: Sequence[torch.Tensor], placement: Placement) -> torch.Tensor:
    if isinstance(placement, Shard):
        return torch.cat(list(pieces), placement.dim)
    if isinstance(placement, Partial):
        stacked = torch.stack(list(pieces))
        match placement.reduce_op:
            case "sum":
                return stacked.sum(0)
            case "avg":
                return stacked.mean(0)
            case "max":
                return stacked.amax(0)
            case "min":
                return stacked.amin(0)
            case "product":
                return stacked.prod(0)
    return pieces[0]
