"""What was shown at small sizes, and what it says about large ones.

A rewrite is verified on the same model traced at tiny, pairwise different sizes. That carries over to the full size if both
rewritten programs are the same but for their integers (the skeleton), and if every integer is one expression of the named sizes.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from fractions import Fraction
from typing import Any

import sympy
import torch
import torch.fx as fx

from ..errors import InputError
from ..program import Program


def skeleton_difference(first: Program, second: Program) -> str:
    """The first place where two programs differ in more than integers, in words; empty when they have one skeleton."""
    if first.signature.inputs != second.signature.inputs or first.signature.outputs != second.signature.outputs:
        return "their inputs or outputs have other roles"
    if first.mesh != second.mesh:
        return f"one is for mesh {first.mesh}, the other for {second.mesh}"
    for a, b in itertools.zip_longest(first.nodes, second.nodes):
        if a is None or b is None:
            return f"one has {len(first.nodes)} nodes, the other {len(second.nodes)}"
        if (a.op, a.name) != (b.op, b.name) or (a.op == "call_function" and a.target != b.target):
            return f"{a.name} = {a.target} stands where the other has {b.name} = {b.target}"
        shapes = [_abstract((n.args, n.kwargs)) for n in (a, b)]
        if shapes[0] != shapes[1]:
            return f"the arguments of {a.name} = {a.target} differ: {a.args} and {b.args}"
        if _abstract_value(a.meta.get("val")) != _abstract_value(b.meta.get("val")):
            return f"{a.name} has another rank or dtype in the other program"
    return ""


def _abstract(argument: Any) -> Any:
    """An argument with nodes by name and integers left out."""
    if isinstance(argument, fx.Node):
        return ("node", argument.name)
    argument = _opened(argument)
    if isinstance(argument, (list, tuple)):
        return tuple(_abstract(item) for item in argument)
    if isinstance(argument, Mapping):
        return tuple((key, _abstract(item)) for key, item in argument.items())
    return "int" if isinstance(argument, int) and not isinstance(argument, bool) else repr(argument)


def _opened(argument: Any) -> Any:
    """The body of a chain, which stands in a program as text, as the nest that it is: its sizes are integers like any others."""
    if not (isinstance(argument, str) and argument.startswith('{"calls":')):
        return argument

    def named(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        return {key: f"slot {value}" if key == "slot" else value for key, value in pairs}

    return json.loads(argument, object_pairs_hook=named)


def _abstract_value(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return (value.dim(), value.dtype)
    if isinstance(value, (list, tuple)):
        return tuple(_abstract_value(item) for item in value)
    return type(value).__name__


def integers(program: Program) -> list[tuple[str, int]]:
    """Every integer of a program in order, with the place it stands at: arguments, and sizes of values."""
    found: list[tuple[str, int]] = []
    for node in program.nodes:
        if node.op != "output":
            found += [(f"an argument of {node.name}", n) for n in _walk((node.args, node.kwargs))]
            found += [(f"the shape of {node.name}", n) for n in _sizes(node.meta.get("val"))]
    return found


def _walk(argument: Any) -> Iterator[int]:
    argument = _opened(argument)
    if isinstance(argument, int) and not isinstance(argument, bool):
        yield argument
    elif isinstance(argument, (list, tuple)):
        for item in argument:
            yield from _walk(item)
    elif isinstance(argument, Mapping):
        for item in argument.values():
            yield from _walk(item)


def _sizes(value: Any) -> Iterator[int]:
    if isinstance(value, torch.Tensor):
        yield from (int(n) for n in value.shape)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _sizes(item)


def integer_difference(programs: Sequence[Program], max_degree: int = 3) -> str:
    """The first integer that is no one polynomial ``a + b * product of named sizes`` over all programs, in words; empty if none.

    programs: one skeleton at different named sizes (``Program.sizes``); at least three, of which the last is the one in question.
    Raises InputError for fewer, or where sizes are not named alike.
    """
    if len(programs) < 3 or any(p.sizes.keys() != programs[0].sizes.keys() for p in programs):
        raise InputError(f"expected at least 3 programs with the same named sizes, found {[dict(p.sizes) for p in programs]}")
    for one in programs[1:]:
        difference = skeleton_difference(programs[0], one)
        if difference:
            return difference
    fits: dict[tuple[int, ...], sympy.Expr | None] = {}
    columns = zip(*(integers(program) for program in programs), strict=True)
    for column in columns:
        values = tuple(value for _, value in column)
        if len(set(values)) > 1:
            if values not in fits:
                fits[values] = fit([p.sizes for p in programs], values, max_degree)
            if fits[values] is None:
                return f"{column[0][0]} is {list(values)}, which is no expression of the sizes {[dict(p.sizes) for p in programs]}"
    return ""


def fit(sizes: Sequence[Mapping[str, int]], values: Sequence[int], max_degree: int = 3) -> sympy.Expr | None:
    """``a + b * m`` with a monomial m of the named sizes that takes all values; the simplest one, None where there is none."""
    names = sorted(sizes[0])
    for degree in range(1, max_degree + 1):
        for factors in itertools.combinations_with_replacement(names, degree):
            points = [_product(size, factors) for size in sizes]
            line = _line(points, values)
            if line is not None:
                intercept, slope = line
                monomial = sympy.Mul(*[sympy.Symbol(name) for name in factors])
                return sympy.Rational(intercept.numerator, intercept.denominator) + monomial * sympy.Rational(
                    slope.numerator, slope.denominator
                )
    return None


def _product(size: Mapping[str, int], factors: Sequence[str]) -> int:
    result = 1
    for name in factors:
        result *= size[name]
    return result


def _line(points: Sequence[int], values: Sequence[int]) -> tuple[Fraction, Fraction] | None:
    """The line through all (point, value); None where they are on none, or where one point says nothing about a slope."""
    first = next((i for i in range(1, len(points)) if points[i] != points[0]), None)
    if first is None:
        return None
    slope = Fraction(values[first] - values[0], points[first] - points[0])
    intercept = values[0] - slope * points[0]
    if all(intercept + slope * x == y for x, y in zip(points, values, strict=True)):
        return intercept, slope
    return None
