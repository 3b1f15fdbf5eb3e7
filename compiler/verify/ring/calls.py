"""Calls whose arguments are numbers of values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.fx as fx

from ...program import Role
from ..forms import Form, TensorForm
from ..templates import Template
from .value import Value

aten = torch.ops.aten


class Ref(int):
    """The number of a value, in the arguments of a call."""

    __slots__ = ()


@dataclass(slots=True)
class Call:
    """One value. template: what is called, None for an input; operands: numbers of the values that it takes; node: one node that
    makes it; role: of an input."""

    template: Template | None
    operands: tuple[int, ...]
    node: fx.Node
    role: Role | None = None

    @property
    def target(self) -> Any:
        """The op; None for an input."""
        return None if self.template is None else self.template.target

    @property
    def args(self) -> tuple[Any, ...]:
        """Positional arguments, with a Ref for every operand; the role of an input."""
        return (self.role,) if self.template is None else self._filled()[0]

    @property
    def kwargs(self) -> dict[str, Any]:
        """Keyword arguments, likewise."""
        return {} if self.template is None else self._filled()[1]

    def _filled(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        assert self.template is not None
        return self.template.filled([Ref(number) for number in self.operands])

    def filled(self, values: Mapping[int, Value]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """All arguments, with values in place of their numbers."""
        assert self.template is not None
        return self.template.filled([values[number] for number in self.operands])


def order_of(template: Template, ndim: int) -> list[int]:
    """The permutation that a transposing op makes of a value of this rank."""
    target, args = template.target, template.args
    if target is aten.permute.default:
        return [dim % ndim for dim in args[1]]
    first, second = (0, 1) if target is aten.t.default else (args[1] % ndim, args[2] % ndim)
    order = list(range(ndim))
    order[first], order[second] = order[second], order[first]
    return order


def range_of(template: Template, source: Form) -> tuple[int, int, int, int] | None:
    """(dim, start, end, step) of a slice, within the tensor; None where it is not given in plain integers."""
    given = template.args[1:]
    dim, start, end, step = (*given, *(0, None, None, 1)[len(given) :])[:4]
    if (
        template.kwargs
        or type(source) is not TensorForm
        or not source.shape
        or any(type(n) not in (int, type(None)) for n in given)
    ):
        return None
    size = source.shape[dim]
    if template.target is aten.narrow.default:
        start += size * (start < 0)
        return dim % len(source.shape), start, start + end, 1
    start, end, _ = slice(start, end).indices(size)
    return dim % len(source.shape), start, max(start, end), step
