"""Reshapes: which cut of the input is a cut of the output.

    dimension i of the input and o of the output, with  prod(in[:i]) == prod(out[:o])  and  parts | in[i], parts | out[o]:
    Shard(i) -> Shard(o), since both cut every block of the same length into the same equal runs.

Uneven chunks of i and o are the same runs only if in[i] == out[o]. What holds for every element holds for partial values.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch

aten = torch.ops.aten

RESHAPES = frozenset(
    {
        aten.view.default,
        aten._unsafe_view.default,
        aten.view_copy.default,
        aten.reshape.default,
        aten._reshape_alias.default,
        aten.flatten.using_ints,
        aten.squeeze.default,
        aten.squeeze.dim,
        aten.squeeze.dims,
        aten.unsqueeze.default,
    }
)
"""Ops that keep the row-major order of the elements and change the dimensions only."""


def cut_pairs(before: Sequence[int], after: Sequence[int], parts: int) -> list[tuple[int, int]]:
    """All (input dimension, output dimension) such that cutting the one in ``parts`` cuts the other."""
    starts: dict[int, int] = {}
    for o, size in enumerate(after):
        if size > 1:
            starts[math.prod(after[:o])] = o
    pairs = []
    for i, size in enumerate(before):
        o = starts.get(math.prod(before[:i]), -1)
        if size <= 1 or o < 0:
            continue
        if size == after[o] or (size % parts == 0 and after[o] % parts == 0):
            pairs.append((i, o))
    return pairs


def factors(before: Sequence[int], after: Sequence[int]) -> tuple[list[list[int]], list[list[int]], list[int]] | None:
    """Common factors of both shapes: per dimension of each the indices into the last list, the factors themselves.

    None when the boundaries do not nest, as in (6, 4) -> (4, 6), or the tensor is empty.
    """
    edges = sorted({math.prod(shape[:k]) for shape in (before, after) for k in range(len(shape) + 1)})
    if 0 in edges or any(b % a for a, b in itertools.pairwise(edges)):
        return None
    found = [b // a for a, b in itertools.pairwise(edges)]

    def spans(shape: Sequence[int]) -> list[list[int]]:
        starts = [edges.index(math.prod(shape[:k])) for k in range(len(shape) + 1)]
        return [list(range(a, b)) for a, b in itertools.pairwise(starts)]

    return spans(before), spans(after), found
