"""Calls whose arguments are numbers of values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch.fx as fx

from .value import Value


class Ref(int):
    """The number of a value, in the arguments of a call."""

    __slots__ = ()


@dataclass(slots=True)
class Call:
    """One value. target: the op, or None for an input, whose role is then ``args[0]``; node: one node that makes it."""

    target: Any
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    node: fx.Node

    def uses(self) -> list[int]:
        """Numbers of its arguments, in order of appearance, repeats kept."""
        found: list[int] = []
        _collect(self.args, found)
        _collect(tuple(self.kwargs.values()), found)
        return found


def with_numbers(argument: Any, numbers: Mapping[fx.Node, int]) -> Any:
    """An argument with numbers in place of nodes."""
    if isinstance(argument, fx.Node):
        return Ref(numbers[argument])
    if isinstance(argument, tuple):
        return tuple([with_numbers(item, numbers) for item in argument])
    if isinstance(argument, list):
        return [with_numbers(item, numbers) for item in argument]
    if isinstance(argument, dict):
        return {name: with_numbers(item, numbers) for name, item in argument.items()}
    if isinstance(argument, slice):
        return slice(*[with_numbers(item, numbers) for item in (argument.start, argument.stop, argument.step)])
    return argument


def filled(argument: Any, values: Mapping[int, Value]) -> Any:
    """An argument with values in place of their numbers."""
    kind = type(argument)
    if kind is Ref:
        return values[argument]
    if kind is tuple:
        return tuple([filled(item, values) for item in argument])
    if kind is list or isinstance(argument, (list, tuple)):
        return [filled(item, values) for item in argument]
    if kind is dict:
        return {name: filled(item, values) for name, item in argument.items()}
    return argument


def _collect(argument: Any, found: list[int]) -> None:
    kind = type(argument)
    if kind is Ref:
        found.append(int(argument))
    elif isinstance(argument, (list, tuple)):
        for item in argument:
            _collect(item, found)
    elif kind is dict:
        for item in argument.values():
            _collect(item, found)
    elif kind is slice:
        _collect((argument.start, argument.stop, argument.step), found)
