"""Type rules of ops that make constants.

A constant-filled tensor of local size n is a whole tensor of size n and as well the piece of a longer one; the declared layout says
which of the two is meant, and either is right.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from .problem import Op
from .value import Integer, Type


def filled(size_argument: int, fill: float | None, fill_argument: int | None = None) -> Callable[..., Type]:
    """zeros, ones, full and their ``new_`` forms. fill: the value where the op's name says it."""

    def rule(op: Op, *args: Any) -> Type:
        sizes: Sequence[Integer] = args[size_argument]
        value = args[fill_argument] if fill_argument is not None else fill
        dims = op.uniform(list(sizes))
        op.new_args[size_argument] = [dim.size for dim in dims]
        return Type(dims, op.axes.none, _is_zero(value))

    return rule


def _is_zero(value: Any) -> bool:
    return isinstance(value, (int, float)) and value == 0


def filled_like(fill: float | None, fill_argument: int | None = None) -> Callable[..., Type]:
    """zeros_like and so on: cut like their model, never partial."""

    def rule(op: Op, value: Type, *args: Any) -> Type:
        made = args[fill_argument - 1] if fill_argument is not None else fill
        return Type(value.dims, op.axes.none, _is_zero(made))

    return rule


def fill(op: Op, value: Type, constant: Any, *_: Any) -> Type:
    """fill(x, c): shaped like x."""
    return Type(value.dims, op.axes.none, _is_zero(constant))
