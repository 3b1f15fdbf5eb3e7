"""Two programs of one rank in one table of calls: what they have in common is computed once, or not at all."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch.fx as fx

from ...program import Program, Role
from .algebra import Algebra
from .numbering import Numbering
from .value import Value


@dataclass(frozen=True)
class Outputs:
    """numbers: of the output roles that are values; literals: the others (None where a gradient does not exist); nodes: of all."""

    nodes: Mapping[fx.Node, int]
    numbers: Mapping[Role, int]
    literals: Mapping[Role, Any]

    @staticmethod
    def of(program: Program, table: Numbering) -> Outputs:
        """Enter a program."""
        numbers = table.enter(program)
        pairs = list(zip(program.signature.outputs, program.results, strict=True))
        values = {role: numbers[node] for role, node in pairs if node is not None and node in numbers}
        return Outputs(numbers, values, {role: node for role, node in pairs if role not in values})

    def read(self, values: Mapping[int, Value]) -> dict[Role, Value]:
        """The value of every role."""
        return {**self.literals, **{role: values[number] for role, number in self.numbers.items()}}


class Joint:
    """Both programs, entered: ``open`` lists the roles whose values are not known to be the same."""

    def __init__(self, original: Program, transformed: Program) -> None:
        self.table = Numbering()
        self.left = Outputs.of(original, self.table)
        self.boundary = len(self.table.calls)
        self.right = Outputs.of(transformed, self.table)

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
            elif call.target is None:
                given[number] = inputs[call.args[0]]
        wanted = [*self.left.numbers.values(), *self.right.numbers.values()]
        values, poison = self.table.evaluate(wanted, given, algebra, after=self.boundary)
        return self.left.read(values), self.right.read(values), poison
