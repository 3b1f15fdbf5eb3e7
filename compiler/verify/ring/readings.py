"""Global values that ranks' values could make, and numbers by which equal values are found again."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from ...layout import Layout, Partial, Replicate, Shard
from .algebra import Algebra
from .collectives import reduce_values
from .equality import same
from .ops.views import join
from .value import RingTensor, Value

_MIX = 0x2545F4914F6CDD1D


def joined(algebra: Algebra, values: list[Value], sizes: Sequence[int]) -> Iterator[tuple[Layout, Value]]:
    """Every (layout, global value) that the ranks' values could make, by replicas, sums or shards; innermost axis first."""
    if not sizes:
        yield (), values[0]
        return
    parts = sizes[-1]
    groups = [values[start : start + parts] for start in range(0, len(values), parts)]
    options: list[tuple[Any, list[Value]]] = []
    if all(v is group[0] or same(algebra, group[0], v) for group in groups for v in group):
        options.append((Replicate(), [group[0] for group in groups]))
    elif all(tuple(v.shape) == tuple(group[0].shape) for group in groups for v in group):
        options.append((Partial("sum"), [reduce_values(algebra, group, "sum") for group in groups]))
    if parts > 1:
        for dim in range(len(values[0].shape)):
            rests = [{tuple(n for d, n in enumerate(v.shape) if d != dim) for v in group} for group in groups]
            if all(len(rest) == 1 for rest in rests):
                options.append((Shard(dim), [concatenated(algebra, group, dim) for group in groups]))
    for placement, wholes in options:
        for layout, value in joined(algebra, wholes, sizes[:-1]):
            yield (*layout, placement), value


def concatenated(algebra: Algebra, values: Sequence[Value], dim: int) -> Value:
    """Values joined along a dimension."""
    return join(algebra, list(values), dim) if isinstance(values[0], RingTensor) else torch.cat(list(values), dim)


def fingerprint(value: RingTensor) -> int:
    """Equal values without a logarithm have equal fingerprints."""
    return hash((tuple(value.shape), value.data.contiguous().numpy().tobytes()))


def keys_of(data: torch.Tensor) -> torch.Tensor:
    """A number for every element [4, ...] -> [...], such that sums of numbers tell sets of elements apart."""
    mixed = torch.zeros(data.shape[1:], dtype=torch.int64)
    for part in data:
        mixed = (mixed ^ part) * _MIX
        mixed = mixed ^ (mixed >> 29)
    return mixed
