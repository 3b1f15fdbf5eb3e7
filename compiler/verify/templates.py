"""Calls taken apart: what is called, with holes where values go, and the values.

    mm(a, b), mm(c, d)   =   one template mm(_, _), of (a, b) and of (c, d)

A deep model makes tens of thousands of calls of some hundred templates. What depends on nothing but a call's template and on what
its operands are is worked out once, and a program is a list of (template, operands), which costs little to walk over.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.fx as fx

from ..errors import UnsupportedError
from ..program import Program
from .forms import DEVICE_ARGUMENTS, UNKNOWN, Form, form_of, freeze, infer


class Hole(int):
    """The place of an operand in the arguments of a template: its number among the operands."""

    __slots__ = ()


class _Marker:
    """Stands for any operand in the key of a template; which one follows from the order."""


_OPERAND = _Marker()


@dataclass(eq=False, slots=True)
class Template:
    """A call without its values: two calls have one template if and only if target and arguments agree but for the values.

    args, kwargs: with a Hole for every operand, repeats kept; arguments that change no value, and keyword arguments that are the
    default, are left out. draws: whether two calls of the same operands may differ.
    """

    target: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    holes: int
    draws: bool
    _forms: dict[tuple[Form, ...], Form] = field(default_factory=dict)

    def filled(self, values: Sequence[Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Arguments with values in the holes."""
        return tuple(fill(item, values) for item in self.args), {name: fill(item, values) for name, item in self.kwargs.items()}

    def form(self, operands: tuple[Form, ...]) -> Form:
        """Shape and dtype of the result for operands of these forms; UNKNOWN where it cannot be told."""
        found = self._forms.get(operands, self)
        if found is self:
            found = self._forms[operands] = self._infer(operands)
        return found

    def _infer(self, operands: tuple[Form, ...]) -> Form:
        if self.target is operator.getitem:
            source = operands[0]
            return source[self.args[1]] if type(source) is tuple and isinstance(self.args[1], int) else UNKNOWN
        return infer(self.target, freeze(self.args, operands.__getitem__, Hole), freeze(self.kwargs, operands.__getitem__, Hole))


def fill(argument: Any, values: Sequence[Any]) -> Any:
    """An argument with values in its holes."""
    kind = type(argument)
    if kind is Hole:
        return values[argument]
    if kind is int:
        return argument
    if kind is tuple:
        return tuple([fill(item, values) for item in argument])
    if kind is list:
        return [fill(item, values) for item in argument]
    if kind is dict:
        return {name: fill(item, values) for name, item in argument.items()}
    if kind is slice:
        return slice(*[fill(item, values) for item in (argument.start, argument.stop, argument.step)])
    return argument


class Templates:
    """The templates of some programs that are looked at together. Templates of different tables are never the same."""

    def __init__(self) -> None:
        self._known: dict[Any, Template] = {}

    def of(self, target: Any, args: Any, kwargs: Any, operand: type = fx.Node) -> tuple[Template, tuple[Any, ...]]:
        """A call's template, and its operands: what in its arguments is of type ``operand``, in order of appearance."""
        operands: list[Any] = []

        def hole(value: Any) -> Any:
            operands.append(value)
            return _OPERAND

        if kwargs:
            kwargs = {name: value for name, value in kwargs.items() if name not in DEVICE_ARGUMENTS}
            if isinstance(target, torch._ops.OpOverload):
                kwargs = _without_defaults(target, kwargs)
        # a target lives as long as its template; hashing an op itself costs as much as all of its arguments
        key = (id(target), freeze(args, hole, operand), freeze(kwargs, hole, operand) if kwargs else ())
        try:
            found = self._known.get(key)
        except TypeError:  # an argument without a hash: nothing is known to be the same
            return _made(target, args, kwargs, operand), tuple(operands)
        if found is None:
            found = self._known[key] = _made(target, args, kwargs, operand)
        return found, tuple(operands)


def _without_defaults(target: torch._ops.OpOverload, kwargs: dict[str, Any]) -> dict[str, Any]:
    usual = defaults_of(target)
    return {name: value for name, value in kwargs.items() if name not in usual or freeze(value, _itself) != usual[name]}


def _itself(value: Any) -> Any:
    return value


@functools.cache
def defaults_of(target: torch._ops.OpOverload) -> dict[str, Any]:
    """What an op takes for an argument that is not given, frozen."""
    return {one.name: freeze(one.default_value, _itself) for one in target._schema.arguments if one.has_default_value()}


def _made(target: Any, args: Any, kwargs: Any, operand: type) -> Template:
    count = 0

    def hole(_: Any) -> Hole:
        nonlocal count
        count += 1
        return Hole(count - 1)

    args = tuple(_with_holes(item, hole, operand) for item in args)
    kwargs = {name: _with_holes(item, hole, operand) for name, item in kwargs.items()}
    return Template(target, args, kwargs, count, _draws(target, args, kwargs))


def _with_holes(argument: Any, hole: Callable[[Any], Hole], operand: type) -> Any:
    """Visits in the order of ``freeze``."""
    kind = type(argument)
    if kind is operand:
        return hole(argument)
    if kind is int or kind is str or argument is None:
        return argument
    if kind is slice:
        return slice(*[_with_holes(item, hole, operand) for item in (argument.start, argument.stop, argument.step)])
    if isinstance(argument, dict):
        return {name: _with_holes(item, hole, operand) for name, item in argument.items()}
    if isinstance(argument, tuple):
        return tuple([_with_holes(item, hole, operand) for item in argument])
    if isinstance(argument, list):
        return [_with_holes(item, hole, operand) for item in argument]
    return argument


def _draws(target: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> bool:
    """Attention without dropout draws nothing."""
    if torch.Tag.nondeterministic_seeded not in getattr(target, "tags", ()):
        return False
    for place, argument in enumerate(target._schema.arguments):
        if argument.name == "dropout_p":
            given = args[place] if place < len(args) else kwargs.get("dropout_p", argument.default_value)
            return type(given) is not float or given != 0.0
    return True


class Line(NamedTuple):
    """One line of a straight-line program.

    node: the node that it comes from; template: None for an input; operands: the lines whose values it takes; is_whole: whether its
    value is the node's, and not a step on the way; form: of an input.
    """

    node: fx.Node
    template: Template | None
    operands: tuple[int, ...]
    is_whole: bool = True
    form: Form = None


@dataclass(frozen=True)
class Lines:
    """A program of one rank as a list. results: per output a line's place, or what stands there instead of a value."""

    program: Program
    lines: list[Line]
    results: list[Any]
    templates: Templates = field(repr=False)


class Place(int):
    """The place of a line, in ``Lines.results``."""

    __slots__ = ()


def lines_of(program: Program, templates: Templates) -> Lines:
    """A logical program as it stands. Raises UnsupportedError for a node that is neither an input, a call nor the output."""
    places: dict[Any, int] = {}
    lines: list[Line] = []
    for node in program.graph.graph.nodes:
        if node.op == "placeholder":
            lines.append(Line(node, None, (), form=form_of(node.meta.get("val"))))
        elif node.op == "call_function":
            template, operands = templates.of(node.target, node.args, node.kwargs)
            lines.append(Line(node, template, tuple([places[operand] for operand in operands])))
        elif node.op == "output":
            continue
        else:
            raise UnsupportedError(f"a program is flat; found a {node.op} node {node.name}")
        places[node] = len(lines) - 1
    return Lines(program, lines, [Place(places[node]) if node in places else node for node in program.results], templates)
