"""A batch and its micro-batches: equal ones where the rows allow it, else small ones first and last, where they cost least."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch.utils._pytree as pytree
from torch import Tensor

from ...errors import InputError

CallArgs = tuple[tuple[Any, ...], dict[str, Any]]
"""Positional and keyword arguments."""


class Batch:
    """One call. Its first tensor with a dimension says how many rows there are; all tensors of that length are cut."""

    def __init__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """InputError where there is nothing to cut."""
        self._leaves, self._spec = pytree.tree_flatten((args, kwargs))
        sizes = [leaf.shape[0] for leaf in self._leaves if isinstance(leaf, Tensor) and leaf.dim()]
        if not sizes:
            raise InputError(
                "a pipeline cuts a batch along the first dimension of its tensors; found no tensor with a dimension: pass the "
                "batch as a tensor"
            )
        self.rows: int = sizes[0]
        if not self.rows:
            raise InputError("a pipeline needs at least one row in a batch; found none: skip empty batches")

    def cut(self, rows: Sequence[int]) -> list[CallArgs]:
        """Micro-batches of so many rows each."""
        assert sum(rows) == self.rows, "micro-batches make up the batch"
        starts = [sum(rows[:k]) for k in range(len(rows))]
        return [
            pytree.tree_unflatten([self._part(leaf, start, size) for leaf in self._leaves], self._spec)
            for start, size in zip(starts, rows, strict=True)
        ]

    def _part(self, leaf: Any, start: int, size: int) -> Any:
        batched = isinstance(leaf, Tensor) and leaf.dim() and leaf.shape[0] == self.rows
        return leaf.narrow(0, start, size) if batched else leaf


def rows_of(total: int, wanted: int | str | Sequence[int], ranks: int, replicas: int = 1) -> tuple[int, ...]:
    """Rows of each micro-batch.

    wanted: how many, the rows themselves, or "auto" for about twice the ranks of the pipeline. replicas: every micro-batch is cut
    into so many equal parts. InputError, with what would work, where that cannot be.
    """
    if total % replicas:
        raise InputError(
            f"a batch of {total} rows cannot be shared by {replicas} replicas of each stage: use a batch of "
            f"{total + -total % replicas} rows, or of {total - total % replicas}"
        )
    units = total // replicas
    if isinstance(wanted, str):
        return tuple(replicas * size for size in spread_rows(units, _automatic(units, ranks)))
    if isinstance(wanted, int):
        if wanted > units:
            per = f" of at least {replicas} rows, one for each replica" if replicas > 1 else ""
            raise InputError(f"a batch of {total} rows has no {wanted} micro-batches{per}: ask for at most microbatches={units}")
        return tuple(replicas * size for size in spread_rows(units, wanted))
    if sum(wanted) != total:
        share = ", ".join(map(str, (replicas * size for size in spread_rows(units, min(len(wanted), units)))))
        raise InputError(
            f"microbatches={list(wanted)} are {sum(wanted)} rows, the batch has {total}: {len(wanted)} micro-batches of it could "
            f"be [{share}]"
        )
    odd = [size for size in wanted if size % replicas]
    if odd:
        raise InputError(
            f"a micro-batch of {odd[0]} rows cannot be shared by {replicas} replicas of each stage: give every micro-batch a "
            f"multiple of {replicas} rows"
        )
    return tuple(wanted)


def _automatic(units: int, ranks: int) -> int:
    """Twice the ranks where that divides the batch; else the largest divisor below, unless the pipeline would idle for it: then
    uneven ones, of more than one row, since a single row is often another program."""
    most = min(2 * ranks, units)
    even = next(count for count in range(most, 0, -1) if units % count == 0)
    return even if even >= min(ranks, most) else max(1, min(most, units // 2))


def spread_rows(units: int, count: int) -> tuple[int, ...]:
    """``units`` in ``count`` parts that differ by one at most, the smaller ones at both ends: 18 in 4 is 4, 5, 5, 4."""
    size, larger = divmod(units, count)
    smaller = count - larger
    head = (smaller + 1) // 2
    return (size,) * head + (size + 1,) * larger + (size,) * (smaller - head)
