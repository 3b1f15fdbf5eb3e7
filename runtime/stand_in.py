"""Integer functions that stand for any op, so that a program can run on values that are equal or are not.

Every entry of a result depends on every entry of the arguments, on where it stands, and on the key of the op. Sums wrap modulo
2^64, so no order of summation changes them. A value that is late, stale, misplaced or lost changes all that is computed from it.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import torch

from .own_ops import define_op

MIXED, TRUTH = torch.int64, torch.bool
BLANKS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
"""Integer results are read as positions by other ops: they are zeros, which are valid everywhere."""

_ODD = -7046029254386353131  # 2^64 / golden ratio
_A, _B = -49064778989728563, -4265267296055464877


def kind_of(dtype: torch.dtype) -> int:
    """How a result of this dtype is made: 0 for values, 1 for booleans, 2 and up for integers."""
    if dtype.is_floating_point or dtype.is_complex:
        return 0
    return 1 if dtype is torch.bool else 2 + BLANKS.index(dtype)


@functools.cache
def define() -> None:
    """Define ``hocket::stand_in`` and ``hocket::stand_ins`` (several results) in torch, once in a process."""
    define_op("stand_in(Tensor[] values, int key, int[] size, int[] stride, int kind) -> Tensor", stand_in)
    define_op("stand_ins(Tensor[] values, int key, int[] sizes, int[] strides, int[] ranks, int[] kinds) -> Tensor[]", stand_ins)


def stand_in(values: Sequence[torch.Tensor], key: int, size: Sequence[int], stride: Sequence[int], kind: int) -> torch.Tensor:
    """One result of that size and stride, from arguments of any integer type."""
    return _result(_digest(values, key), key, size, stride, kind)


def stand_ins(
    values: Sequence[torch.Tensor],
    key: int,
    sizes: Sequence[int],
    strides: Sequence[int],
    ranks: Sequence[int],
    kinds: Sequence[int],
) -> list[torch.Tensor]:
    """Several results: ``sizes`` and ``strides`` hold those of all, one after the other, ``ranks`` how many belong to each."""
    digest, found, start = _digest(values, key), [], 0
    for index, (rank, kind) in enumerate(zip(ranks, kinds, strict=True)):
        stop = start + rank
        found.append(_result(digest, key + index, sizes[start:stop], strides[start:stop], kind))
        start = stop
    return found


def _digest(values: Sequence[torch.Tensor], key: int) -> torch.Tensor:
    device = values[0].device if values else torch.device("cpu")
    total = torch.full((), key, dtype=torch.int64, device=device)
    for value in values:
        flat = value.reshape(-1).to(torch.int64)
        total = _mix(total * _ODD + _mix(flat + _ODD * torch.arange(1, flat.numel() + 1, device=device)).sum())
    return total


def _result(digest: torch.Tensor, key: int, size: Sequence[int], stride: Sequence[int], kind: int) -> torch.Tensor:
    device = digest.device
    if kind >= 2:
        return torch.zeros(tuple(size), dtype=BLANKS[kind - 2], device=device)
    first = key % 1024
    made = _mix(digest + _ODD * torch.arange(first, first + math.prod(size), device=device)).reshape(tuple(size))
    made = (made & 1).bool() if kind == 1 else made
    if made.stride() == tuple(stride):
        return made
    return torch.empty_strided(tuple(size), tuple(stride), dtype=made.dtype, device=device).copy_(made)


def _mix(z: torch.Tensor) -> torch.Tensor:
    """The finaliser of splitmix64 (Steele, Lea, Flood, OOPSLA 2014), on wrapping int64."""
    z = (z ^ (z >> 33)) * _A
    z = (z ^ (z >> 29)) * _B
    return z ^ (z >> 32)
