"""The program at small sizes, captured when a level needs it, and taken through the same passes as the one in question.

What is shown at small sizes carries over if both are one skeleton, and if every integer is one expression of the named sizes. That
is looked at over the program in question and all the small ones.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from ..contract import Pass
from ..errors import VerificationError
from ..program import Program
from .shrink import integer_difference, skeleton_difference

Retrace = Callable[[], Program | None]
"""Captures the program at small sizes; None where it has none."""

Apply = Callable[[Pass, Program], Program]


@dataclass
class Reductions:
    """program: at the sizes in question, before the first pass; retraces: one a small size; apply: runs one pass."""

    program: Program
    retraces: Sequence[Retrace]
    apply: Apply
    _passes: list[tuple[Pass, Program]] = field(default_factory=list)
    _made: list[list[Program]] | None = None

    def through(self, one: Pass, after: Program) -> Callable[[], tuple[Program, Program] | None] | None:
        """Note that this pass came next and made ``after``. Gives what makes the small pair around it; None without one."""
        if not self.retraces:
            return None
        self._passes.append((one, after))
        step = len(self._passes)
        return lambda: self._pair(step)

    def _pair(self, step: int) -> tuple[Program, Program] | None:
        made = self._captured()
        if not made:
            return None
        for number in range(len(made[0]), step + 1):
            one, after = self._passes[number - 1]
            for programs in made:
                programs.append(self.apply(one, programs[-1]))
            _require_same_program(after, [programs[-1] for programs in made], f"the result of {one.name} at small sizes")
        return made[0][step - 1], made[0][step]

    def _captured(self) -> list[list[Program]]:
        if self._made is None:
            found = [retrace() for retrace in self.retraces]
            small = [program for program in found if program is not None]
            if small:
                _require_same_program(self.program, small, "the program that retrace captured")
            self._made = [[program] for program in small]
        return self._made


def _require_same_program(program: Program, small: Sequence[Program], what: str) -> None:
    difference = next(filter(None, (skeleton_difference(program, one) for one in small)), "")
    named = {frozenset(one.sizes) for one in (program, *small)}
    if not difference and len(small) > 1 and len(named) == 1 and program.sizes:
        difference = integer_difference((*small, program))
    if difference:
        raise VerificationError(
            f"{what} is not the same program at other sizes: {difference}; what holds for one says nothing about the other. "
            "Choose small sizes on which the model takes the same way, or leave retrace out"
        )
