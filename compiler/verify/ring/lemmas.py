"""Equality of whole programs from small lemmas, each proven once.

Both programs go into one table (``numbering``). Where a node of the rewritten program says of which original value it holds (its
note) and the table does not show it, the two ways of computing that value are cut off at the nearest values that both programs
share, and compared as programs of their own, on arbitrary inputs:

    for all x:  f(x) = g(x)      =>      f(v) = g(v)  for whatever v the model computes there

A lemma that holds makes the two values one, so what follows is shared again; a repeated block meets the lemmas of its first copy. A
lemma that does not hold says nothing: the equality may need more of what lies before the cut. Then the whole programs are compared.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ...errors import InputError
from ...program import Program, Role, RoleKind, note
from ..forms import TensorForm
from ..templates import Line, Lines, Templates, lines_of
from .compare import compare
from .cones import MAX_ELEMENTS, Cones, Cutter
from .joint import Outputs
from .numbering import Numbering
from .verdict import Bound, Status

MAX_REFUTED = 24
"""Lemmas that failed before no more are tried."""

BEHIND = (0, 3)
"""How many shared values to look behind, one attempt after the other."""


@dataclass(frozen=True)
class Congruence:
    """What the table and the lemmas show.

    open: output roles they do not; values: of the transformed program; lemmas: distinct ones proven; uses: values shared by one of
    them; unsupported: an op without an entry in the op table, in words.
    """

    open: tuple[Role, ...]
    values: int
    lemmas: int
    uses: int
    bound: Bound
    sensitivity: frozenset[str]
    unsupported: str = ""

    @property
    def equal(self) -> bool:
        """Whether every output is shown to be the same."""
        return not self.open and not self.unsupported

    def __str__(self) -> str:
        shared = f"its {self.values} values are those of the original"
        if not self.lemmas:
            return f"{shared}, op for op"
        return f"{shared}, {self.uses} of them by {self.lemmas} lemma{'s' * (self.lemmas > 1)} and the others op for op"


def congruence(original: Program, transformed: Program) -> Congruence:
    """Show what can be shown without comparing whole programs. Both are programs of one rank.

    Raises HocketError where they cannot be put side by side: inputs of other roles or forms, a constant without a value.
    """
    templates = Templates()
    return congruence_of_lines(lines_of(original, templates), lines_of(transformed, templates))


def congruence_of_lines(original: Lines, transformed: Lines, most: int = MAX_ELEMENTS) -> Congruence:
    """The same for programs as lists, both of one table of templates. most: elements of all values of a lemma."""
    given = set(original.program.signature.inputs)
    for role in transformed.program.signature.inputs:
        if role not in given and role.kind is not RoleKind.CONSTANT:
            raise InputError(f"the transformed program has an input {role} that the original does not have")
    return Prover(original, transformed, most).run()


class Prover:
    """One attempt. refuted: the lemmas that did not hold, in the order of the transformed program."""

    def __init__(self, original: Lines, transformed: Lines, most: int = MAX_ELEMENTS) -> None:
        self.transformed = transformed
        self.table = Numbering(templates=original.templates)
        self.before = Outputs.of(original, self.table)
        self.cutter = Cutter(self.table, len(self.table.calls), most)
        lines = zip(original.lines, self.before.lines, strict=True)
        self.claims = {line.node.name: number for line, number in lines if line.is_whole}
        self.known: dict[Any, Bound | None] = {}
        self.refuted: list[Cones] = []
        self.used: set[str] = set()
        self.uses = 0

    def run(self) -> Congruence:
        """Walk through the transformed program."""
        after = Outputs.of(self.transformed, self.table, self._settled)
        left, right = ({**one.literals, **one.numbers} for one in (self.before, after))
        needed = self.table.needed((*self.before.numbers.values(), *after.numbers.values()))
        proven = [bound for bound in self.known.values() if bound is not None]
        return Congruence(
            open=tuple(role for role in {**left, **right} if left.get(role, ...) != right.get(role, ...)),
            values=sum(line.template is not None for line in self.transformed.lines),
            lemmas=len(proven),
            uses=self.uses,
            bound=_union(proven),
            sensitivity=frozenset(self.used),
            unsupported=self.table.without_meaning(needed),
        )

    def _settled(self, line: Line, number: int) -> int:
        """The original's number where the note claims it and a lemma shows it."""
        if number < self.cutter.boundary or not line.is_whole:
            return number
        known = note(line.node)
        claim = self.claims.get(known.carries or known.origin)
        if claim is None or claim == number:
            return number
        form = self.table.form(number)
        if type(form) is not TensorForm or not form.is_float or form != self.table.form(claim):
            return number
        return claim if self._holds(claim, number) else number

    def _holds(self, claim: int, number: int) -> bool:
        for behind in BEHIND:
            cones = self.cutter.cut(claim, number, behind)
            if cones is None:
                return False
            key = self.cutter.key(cones)
            if key not in self.known:
                if sum(bound is None for bound in self.known.values()) >= MAX_REFUTED:
                    return False
                verdict = compare(*self.cutter.programs(cones))
                self.known[key] = verdict.bound if verdict.status is Status.EQUAL else None
                if verdict.status is Status.EQUAL:
                    self.used |= verdict.sensitivity
                else:
                    self.refuted.append(cones)
            if self.known[key] is not None:
                self.uses += 1
                return True
        return False


def _union(bounds: list[Bound]) -> Bound:
    """That any of the lemmas was accepted wrongly is at most as likely as all of their chances together."""
    if not bounds:
        return Bound(0.0, rigorous=True, degree=0, explanation="the same operations on the same values")
    chance = min(1.0, sum(bound.probability for bound in bounds))
    worst = max(bounds, key=lambda bound: (not bound.rigorous, bound.probability))
    text = f"{len(bounds)} lemma{'s' * (len(bounds) > 1)}; {worst.explanation}"
    return Bound(chance, all(bound.rigorous for bound in bounds), worst.degree, text)
