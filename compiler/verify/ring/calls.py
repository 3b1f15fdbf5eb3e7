"""Calls whose arguments are numbers of values."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.fx as fx

from ..forms import Form, TensorForm, freeze
from .value import Value

aten = torch.ops.aten


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
    kind = type(argument)
    if kind is int:
        return argument
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


def draws(call: Call) -> bool:
    """Whether two calls with the same arguments may differ. Attention without dropout draws nothing."""
    if torch.Tag.nondeterministic_seeded not in getattr(call.target, "tags", ()):
        return False
    for place, argument in enumerate(call.target._schema.arguments):
        if argument.name == "dropout_p":
            given = call.args[place] if place < len(call.args) else call.kwargs.get("dropout_p", argument.default_value)
            return type(given) is not float or given != 0.0
    return True


@functools.cache
def defaults_of(target: torch._ops.OpOverload) -> dict[str, Any]:
    """What an op takes for an argument that is not given, frozen."""
    return {one.name: freeze(one.default_value, int) for one in target._schema.arguments if one.has_default_value()}


def order_of(target: Any, args: tuple[Any, ...], ndim: int) -> list[int]:
    """The permutation that a transposing op makes of a value of this rank."""
    if target is aten.permute.default:
        return [dim % ndim for dim in args[1]]
    first, second = (0, 1) if target is aten.t.default else (args[1] % ndim, args[2] % ndim)
    order = list(range(ndim))
    order[first], order[second] = order[second], order[first]
    return order


def range_of(call: Call, source: Form) -> tuple[int, int, int, int] | None:
    """(dim, start, end, step) of a slice, within the tensor; None where it is not given in plain integers."""
    dim, start, end, step = (*call.args[1:], *(0, None, None, 1)[len(call.args) - 1 :])[:4]
    if (
        call.kwargs
        or type(source) is not TensorForm
        or not source.shape
        or any(type(n) not in (int, type(None)) for n in call.args[1:])
    ):
        return None
    size = source.shape[dim]
    if call.target is aten.narrow.default:
        start += size * (start < 0)
        return dim % len(source.shape), start, start + end, 1
    start, end, _ = slice(start, end).indices(size)
    return dim % len(source.shape), start, max(start, end), step
