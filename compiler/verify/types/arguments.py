"""The arguments of a node in the order of its op's schema."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import torch.fx as fx

from .value import Type


@functools.cache
def schema_of(target: Any) -> tuple[tuple[str, Any], ...]:
    """(name, default) of every argument of an op; empty for other callables."""
    schema = getattr(target, "_schema", None)
    if schema is None:
        return ()
    return tuple((argument.name, argument.default_value if argument.has_default_value() else None) for argument in schema.arguments)


@functools.cache
def _numbers(target: Any) -> tuple[int, ...]:
    """Positions of the arguments that enter the arithmetic as a number (factors, not sizes or indices)."""
    schema = getattr(target, "_schema", None)
    return (
        () if schema is None else tuple(i for i, a in enumerate(schema.arguments) if str(a.type) in ("number", "Optional[number]"))
    )


def factor_varies(target: Any, args: list[Any]) -> bool:
    """Whether ranks compute with different numbers, such as ``x * (1 + rank)``."""
    return any(isinstance(args[i], np.ndarray) for i in _numbers(target) if i < len(args))


def arguments(node: fx.Node, values: dict[fx.Node, Any]) -> list[Any]:
    """All arguments in schema order, defaults filled in, nodes replaced by their types."""
    found = [_replaced(arg, values) for arg in node.args]
    schema = schema_of(node.target)
    for name, default in schema[len(found) :]:
        found.append(_replaced(node.kwargs[name], values) if name in node.kwargs else default)
    return found


def _replaced(argument: Any, values: dict[fx.Node, Any]) -> Any:
    if isinstance(argument, fx.Node):
        return values[argument]
    if isinstance(argument, (list, tuple)):
        return [_replaced(item, values) for item in argument]
    return argument


def mentions(args: list[Any], marker: object) -> bool:
    """Whether an argument, or an element of a list, is the marker."""
    return any(arg is marker or (isinstance(arg, list) and mentions(arg, marker)) for arg in args)


def all_whole(args: list[Any]) -> bool:
    """Whether every tensor is whole on every rank and every integer the same on all."""
    for arg in args:
        if isinstance(arg, Type):
            if not arg.is_whole:
                return False
        elif isinstance(arg, list):
            if not all_whole(arg):
                return False
        elif not isinstance(arg, (int, float, str, bool, type(None))) and hasattr(arg, "flat"):
            return False
    return True
