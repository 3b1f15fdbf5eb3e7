"""Two programs of one rank in one table of calls: what they have in common is computed once, or not at all."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from ...program import Program, Role
from ..templates import Line, Lines, Place, lines_of
from .algebra import Algebra
from .numbering import Numbering
from .value import Value


@dataclass(frozen=True)
class Outputs:
    """numbers: of the output roles that are values; literals: the others (None where a gradient does not exist); lines: numbers of
    all lines."""

    lines: list[int]
    numbers: Mapping[Role, int]
    literals: Mapping[Role, Any]

    @staticmethod
    def of(program: Lines, table: Numbering, settled: Callable[[Line, int], int] | None = None) -> Outputs:
        """Enter a program, as ``Numbering.enter_lines`` does."""
        lines = table.enter_lines(program, settled)
        pairs = list(zip(program.program.signature.outputs, program.results, strict=True))
        values = {role: lines[place] for role, place in pairs if type(place) is Place}
        return Outputs(lines, values, {role: found for role, found in pairs if role not in values})

    def read(self, values: Mapping[int, Value]) -> dict[Role, Value]:
        """The value of every role."""
        return {**self.literals, **{role: values[number] for role, number in self.numbers.items()}}


class Joint:
    """Both programs, entered: ``open`` lists the roles whose values are not known to be the same."""

    def __init__(self, original: Program, transformed: Program) -> None:
        self.table = Numbering()
        self.left = Outputs.of(lines_of(original, self.table.templates), self.table)
        self.boundary = len(self.table.calls)
        self.right = Outputs.of(lines_of(transformed, self.table.templates), self.table)

    def open(self) -> list[Role]:
        """Output roles that only an evaluation can judge."""
        left, right = {**self.left.literals, **self.left.numbers}, {**self.right.literals, **self.right.numbers}
        return [role for role in left if role not in right or left[role] != right[role]]

    def evaluate(self, inputs: Mapping[Role, Value], algebra: Algebra) -> tuple[dict[Role, Value], dict[Role, Value], int]:
        """Outputs of both, and how often the original divided by zero."""
        given: dict[int, Value] = {}
        for number, call in enumerate(self.table.calls):
            if number in self.table.constants:
                value = self.table.constants[number]
                given[number] = algebra.lift(value) if value.is_floating_point() else value
            elif call.role is not None:
                given[number] = inputs[call.role]
        wanted = [*self.left.numbers.values(), *self.right.numbers.values()]
        values, poison = self.table.evaluate(wanted, given, algebra, after=self.boundary)
        return self.left.read(values), self.right.read(values), poison
