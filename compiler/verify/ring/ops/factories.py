"""Tensors made from nothing. Floating point constants enter the ring at once, so that 1/3 never becomes a rounded float."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from ..algebra import Algebra
from ..value import RingTensor, Value

aten = torch.ops.aten
prims = torch.ops.prims


def constant(alg: Algebra, shape: Sequence[int], value: Value, dtype: torch.dtype | None) -> Value:
    """A filled tensor of any dtype; the value may be a 0-dim value of the program."""
    if dtype is not None and not dtype.is_floating_point:
        return torch.full(tuple(shape), value, dtype=dtype)
    if isinstance(value, (RingTensor, torch.Tensor)):
        lifted = alg.lift(value)
        return lifted.rank(len(shape)).map(lambda t: t.expand(4, *shape))
    return alg.full(tuple(shape), value, dtype or torch.get_default_dtype())


def _dtype(value: Value, dtype: torch.dtype | None) -> torch.dtype:
    """Result dtype of a factory that is given a number only."""
    if dtype is not None:
        return dtype
    if isinstance(value, bool):
        return torch.bool
    return torch.int64 if isinstance(value, int) else torch.get_default_dtype()


def full(alg: Algebra, shape: Sequence[int], value: Value, dtype: torch.dtype | None = None, **options: Any) -> Value:
    """full."""
    return constant(alg, shape, value, _dtype(value, dtype))


def scalar_tensor(alg: Algebra, value: Value, dtype: torch.dtype | None = None, **options: Any) -> Value:
    """A 0-dim tensor."""
    return constant(alg, (), value, dtype or torch.get_default_dtype())


def filled(value: float) -> Callable[..., Value]:
    """zeros and ones."""
    return lambda alg, shape, dtype=None, **options: constant(alg, shape, value, dtype or torch.get_default_dtype())


def filled_like(value: float) -> Callable[..., Value]:
    """zeros_like and ones_like. A tensor of unspecified content (empty) is read as zeros: programs must not depend on it."""
    return lambda alg, x, dtype=None, **options: constant(alg, x.shape, value, dtype or x.dtype)


def new_filled(value: float) -> Callable[..., Value]:
    """new_zeros and new_ones."""
    return lambda alg, x, shape, *strides, dtype=None, **options: constant(alg, shape, value, dtype or x.dtype)


def full_like(alg: Algebra, x: Value, value: Value, dtype: torch.dtype | None = None, **options: Any) -> Value:
    """full_like."""
    return constant(alg, x.shape, value, dtype or x.dtype)


def new_full(alg: Algebra, x: Value, shape: Sequence[int], value: Value, dtype: torch.dtype | None = None, **options: Any) -> Value:
    """new_full."""
    return constant(alg, shape, value, dtype or x.dtype)


def by_double(op: Any) -> Callable[..., Value]:
    """arange, linspace, eye: made in float64 and read exactly."""

    def apply(alg: Algebra, *arguments: Any, dtype: torch.dtype | None = None, **options: Any) -> Value:
        chosen: torch.dtype = op(*arguments).dtype if dtype is None else dtype
        if not chosen.is_floating_point:
            return op(*arguments, dtype=chosen)
        return alg.lift(op(*arguments, dtype=torch.float64), chosen)

    return apply


def fill(alg: Algebra, x: Value, value: Value) -> Value:
    """A tensor of x's shape."""
    return constant(alg, x.shape, value, x.dtype)


FACTORIES: dict[Any, Callable[..., Any]] = {
    aten.full: full,
    aten.scalar_tensor: scalar_tensor,
    aten.zeros: filled(0),
    aten.ones: filled(1),
    aten.empty: filled(0),
    aten.empty_strided: lambda alg, shape, strides, dtype=None, **o: constant(alg, shape, 0, dtype or torch.get_default_dtype()),
    aten.zeros_like: filled_like(0),
    aten.ones_like: filled_like(1),
    aten.empty_like: filled_like(0),
    aten.new_zeros: new_filled(0),
    aten.new_ones: new_filled(1),
    aten.new_empty: new_filled(0),
    aten.new_empty_strided: new_filled(0),
    aten.full_like: full_like,
    aten.new_full: new_full,
    aten.arange: by_double(aten.arange),
    aten.linspace: by_double(aten.linspace),
    aten.eye: by_double(aten.eye),
    prims.iota: lambda alg, *a, **k: prims.iota(*a, **k),
    aten.fill: fill,
    aten.zero: lambda alg, x: constant(alg, x.shape, 0, x.dtype),
}
