"""Cutting values by layouts and putting them together again: ``compiler.layout`` on ring values, with replicas compared."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ....runtime.mesh import Mesh
from ...layout import Layout, Partial, Replicate, Shard, global_slices
from .algebra import Algebra
from .collectives import reduce_values
from .equality import same
from .ops.views import join, narrow
from .value import RingTensor, Value


@dataclass(frozen=True)
class ReplicasDiffer(Exception):
    """Ranks that should hold the same value do not."""

    axis: str
    first: int
    second: int


def cut_value(algebra: Algebra, value: Value, layout: Layout, mesh: Mesh) -> list[Value]:
    """The piece of every rank; ranks with the same piece share one object. See ``layout.cut`` for partial values."""
    pieces: list[Value] = []
    known: dict[object, Value] = {}
    for rank in range(mesh.size):
        slices = global_slices(value.shape, layout, mesh, rank)
        where = mesh.coordinate(rank)
        neutral = _neutral(layout, mesh, where)
        key = (slices, neutral)
        if key not in known:
            piece = value
            for dim, (offset, length) in enumerate(slices):
                if length != piece.shape[dim]:
                    piece = (
                        narrow(piece, dim, offset, length) if isinstance(piece, RingTensor) else piece.narrow(dim, offset, length)
                    )
            known[key] = piece if neutral is None else _filled(algebra, piece, neutral)
        pieces.append(known[key])
    return pieces


def _neutral(layout: Layout, mesh: Mesh, where: dict[str, int]) -> int | None:
    for placement, (axis, _) in zip(layout, mesh.axes, strict=True):
        if isinstance(placement, Partial) and where[axis] != 0 and placement.reduce_op in ("sum", "product"):
            return 0 if placement.reduce_op == "sum" else 1
    return None


def _filled(algebra: Algebra, piece: Value, number: int) -> Value:
    if isinstance(piece, RingTensor):
        return algebra.full(piece.shape, number, piece.dtype)
    return torch.full_like(piece, number)


def assemble_value(algebra: Algebra, pieces: Sequence[Value], layout: Layout, mesh: Mesh) -> Value:
    """The global value from all ranks' pieces (rank order). Raises ReplicasDiffer with the two ranks that disagree."""
    held = [(piece, rank) for rank, piece in enumerate(pieces)]
    for placement, (axis, parts) in zip(reversed(layout), reversed(mesh.axes), strict=True):
        groups = [held[start : start + parts] for start in range(0, len(held), parts)]
        held = [(_join(algebra, group, placement, axis), group[0][1]) for group in groups]
    return held[0][0]


def _join(algebra: Algebra, group: Sequence[tuple[Value, int]], placement: object, axis: str) -> Value:
    values = [value for value, _ in group]
    if isinstance(placement, Shard):
        ring = any(isinstance(value, RingTensor) for value in values)
        return join(algebra, values, placement.dim) if ring else torch.cat(values, placement.dim)
    if isinstance(placement, Partial):
        return reduce_values(algebra, values, placement.reduce_op)
    assert isinstance(placement, Replicate)
    first, origin = group[0]
    for value, rank in group[1:]:
        if value is not first and not same(algebra, first, value):
            raise ReplicasDiffer(axis, origin, rank)
    return first
