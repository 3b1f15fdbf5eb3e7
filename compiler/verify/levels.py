"""The levels of verification, cheapest first. A level is a function from a question to an answer; a policy is a tuple of levels.

    types   distribution: placements, shapes, collectives     all ranks at once, nothing is executed
    ring    equality, exactly, over a finite ring             one rank after erasure, else all ranks in lockstep
    float   equality to rounding, and growth of the rounding  all ranks in lockstep, float64 and float32

To add a level, write such a function and put it into a tuple; ``verify`` and the pass manager take any.
"""

from __future__ import annotations

import dataclasses
import math
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from ...runtime.collector import without_collector
from ..contract import Approx, Contract, Equal, Spec
from ..errors import HocketError, InputError, UnsupportedError
from ..program import Program
from ..tiles import written_out
from .counterexample import Counterexample, counterexample
from .differential import float_level
from .lowered import with_whole_inputs
from .report import LevelResult, Outcome, Status, Verdict, combine
from .ring.compare import compare
from .ring.cones import MAX_ELEMENTS
from .ring.lemmas import Congruence, congruence_of_lines
from .ring.localise import localise
from .ring.verdict import Bound, RingVerdict
from .ring.verdict import Status as RingStatus
from .templates import Lines, Templates, lines_of
from .types import TypeReport, check_types, erase, erased_lines

VARIABLE = "HOCKET_VERIFY"
DEFAULT = "ring"
BUDGET = 2e10
"""Multiply-adds, over all ranks, that an execution level may cost at the sizes at hand."""

RING_COST = 50
"""A multiply-add over the ring costs about this many in floating point."""

LARGE_LEMMA = 1 << 24
"""Elements of all values of a lemma where whole programs are too large to be compared: about half a minute, and a gigabyte."""


Pair = tuple[Program, Program]
"""What a program was, and what it became."""


@dataclass(frozen=True)
class Question:
    """Is ``transformed`` what ``contract`` promises of ``original``?

    small: both programs at smaller sizes, with the same skeleton, for the levels that execute, or a function that makes them when
    they are needed; None to execute the full ones.
    """

    original: Program
    transformed: Program
    contract: Contract = field(default_factory=Equal)
    small: Pair | Callable[[], Pair | None] | None = None
    typed: dict[int, TypeReport] = field(default_factory=dict, repr=False, compare=False)
    """Reports of the programs of this question by identity, so that types are worked out once."""

    @property
    def whole(self) -> Pair:
        """Both programs at the sizes in question; under Spec the original is the reference's result."""
        return self._as_promised(self.original, self.transformed)

    @property
    def reduced(self) -> Pair:
        """The same at small sizes where there are some."""
        small = self.small() if callable(self.small) else self.small
        return self.whole if small is None else self._as_promised(*small)

    @property
    def executed(self) -> Pair:
        """The pair for levels that run programs, small where it can be, with whole values on the inputs."""
        original, transformed = self.reduced
        return with_whole_inputs(original), transformed

    def mapped(self, function: Callable[[Program], Program]) -> Question:
        """The same question about the programs that ``function`` makes of these."""
        small = self.small

        def reduced() -> Pair | None:
            pair = small() if callable(small) else small
            return None if pair is None else (function(pair[0]), function(pair[1]))

        both = (function(self.original), function(self.transformed))
        return dataclasses.replace(self, original=both[0], transformed=both[1], small=None if small is None else reduced)

    def _as_promised(self, original: Program, transformed: Program) -> Pair:
        return (self.contract.reference(original) if isinstance(self.contract, Spec) else original), transformed


Level = Callable[[Question, tuple[LevelResult, ...]], LevelResult]
"""Given the question and the answers of the levels before, this level's answer."""


def types_level(question: Question, _: tuple[LevelResult, ...]) -> LevelResult:
    """Placement types of a lowered program; skipped for a logical one."""
    if question.transformed.mesh is None:
        return LevelResult("types", Outcome.SKIPPED, "the program is not lowered to a mesh")
    start = time.process_time()
    report = check_types(question.transformed, question.original if question.original.mesh is None else None)
    question.typed[id(question.transformed)] = report
    return _typed(report, time.process_time() - start)


def _typed(report: TypeReport, seconds: float) -> LevelResult:
    if report.problems:
        first = str(report.problems[0])
        more = f" and {len(report.problems) - 1} more" if len(report.problems) > 1 else ""
        return LevelResult("types", Outcome.FAILED, first + more, seconds, Status.ILL_TYPED, divergence=first)
    if report.untyped:
        detail = (
            f"{len(report.untyped)} of {report.ops} ops cannot be typed, an execution has to judge them; first: {report.untyped[0]}"
        )
        return LevelResult("types", Outcome.UNSUPPORTED, detail, seconds)
    return LevelResult(
        "types", Outcome.PASSED, f"the distribution of {report.ops} ops holds on all {report.axes.mesh.size} ranks", seconds
    )


def ring_level(question: Question, _: tuple[LevelResult, ...]) -> LevelResult:
    """Exact equality over the finite exponential ring."""
    if isinstance(question.contract, Approx):
        return LevelResult("ring", Outcome.SKIPPED, "an approximate pass is judged in floating point only")
    start = time.process_time()
    found = by_congruence(question.whole, question.typed)
    if (found is None or not found.equal) and question.small is not None:
        found = by_congruence(question.reduced, {})
    if found is not None and found.equal:
        return _from_lemmas(found, question, time.process_time() - start)
    original, transformed = question.executed
    if not is_affordable(original, transformed, RING_COST):
        found = by_congruence(question.executed, {}, LARGE_LEMMA)
        if found is not None and found.equal:
            return _from_lemmas(found, question, time.process_time() - start)
        return LevelResult("ring", Outcome.SKIPPED, _too_expensive(), 0.0)
    erased, how = _one_rank(transformed)
    verdict = compare(original, erased)
    if verdict.status is RingStatus.DIFFERENT and erased is not transformed and transformed.mesh is not None:
        # name the node in the program that the user knows; and do not let a fault of the erasure stand as one of the pass
        verdict, how = compare(original, transformed), f"all {transformed.mesh.size} ranks"
    return _from_ring(question, verdict, how, time.process_time() - start)


def by_congruence(pair: Pair, typed: Mapping[int, TypeReport], most: int = MAX_ELEMENTS) -> Congruence | None:
    """What shared values and lemmas show of two programs; None where they cannot be put side by side on one rank. most: elements of
    all values of a lemma."""
    known = [typed[id(one)] for one in pair if id(one) in typed]
    templates = known[0].templates if known else Templates()

    def lines(program: Program) -> Lines:
        if program.mesh is None:
            return lines_of(program, templates)
        report = typed.get(id(program))
        fits = report is not None and report.templates is templates
        return erased_lines(program, report if report is not None and fits else check_types(program, templates=templates))

    try:
        return congruence_of_lines(lines(pair[0]), lines(pair[1]), most)
    except HocketError:
        return None


def _from_lemmas(found: Congruence, question: Question, seconds: float) -> LevelResult:
    where = "one rank" if question.transformed.mesh is None else "one rank, the distribution being typed"
    detail = f"equal on {where}: {found}"
    bound, relied = _bound_text(found.bound), tuple(sorted(found.sensitivity - {"exp"}))
    return LevelResult("ring", Outcome.PROVED, detail, seconds, bound=bound, sensitivity=relied)


def _bound_text(bound: Bound | None) -> str:
    if bound is None:
        return ""
    if bound.probability == 0:
        return f"certain: {bound.explanation}"
    kind = "rigorous" if bound.rigorous else "heuristic"
    return f"missed with probability <= {bound.probability:.2g} an entry ({kind}: {bound.explanation})"


def _one_rank(transformed: Program) -> tuple[Program, str]:
    if transformed.mesh is None:
        return transformed, "one rank"
    try:
        return erase(transformed), "one rank, the distribution being typed"
    except UnsupportedError:
        return transformed, f"all {transformed.mesh.size} ranks"


def _from_ring(question: Question, verdict: RingVerdict, how: str, seconds: float) -> LevelResult:
    relied = tuple(sorted(verdict.sensitivity))
    if verdict.status is RingStatus.EQUAL:
        detail = f"equal over the ring, {verdict.draws} draws, on {how}"
        return LevelResult("ring", Outcome.PROVED, detail, seconds, bound=_bound_text(verdict.bound), sensitivity=relied)
    if verdict.status is RingStatus.DIFFERENT:
        try:
            found = localise(*question.executed)
        except HocketError:
            found = None
        return LevelResult(
            "ring",
            Outcome.FAILED,
            str(verdict),
            seconds,
            divergence="" if found is None else str(found),
            counterexample=smallest_piece(*question.reduced),
            sensitivity=relied,
        )
    return LevelResult("ring", Outcome.UNSUPPORTED, str(verdict), seconds)


def smallest_piece(original: Program, transformed: Program) -> Counterexample | None:
    """Where two programs that differ do so first, as small programs; None where they have no form of one rank, or no such node."""
    try:
        before, after = (one if one.mesh is None else erase(one) for one in (original, transformed))
    except HocketError:
        return None
    return counterexample(before, after)


def numeric_level(question: Question, _: tuple[LevelResult, ...]) -> LevelResult:
    """Float64 equality and growth of the float32 error."""
    original, transformed = question.executed
    if not is_affordable(original, transformed, 3):
        return LevelResult("float", Outcome.SKIPPED, _too_expensive(), 0.0)
    if isinstance(question.contract, Approx):
        return float_level(original, transformed, rtol=question.contract.tolerance)
    return float_level(original, transformed)


def unless_proved(level: Level) -> Level:
    """The level, asked only where no level before it has shown equality or found a fault."""

    def ask(question: Question, before: tuple[LevelResult, ...]) -> LevelResult:
        if any(result.outcome in (Outcome.PROVED, Outcome.FAILED) for result in before):
            return LevelResult("float", Outcome.SKIPPED, "not needed")
        return level(question, before)

    return ask


def if_untyped(level: Level) -> Level:
    """The level, asked only where types were asked for and could not judge everything."""

    def ask(question: Question, before: tuple[LevelResult, ...]) -> LevelResult:
        if any(result.outcome is Outcome.UNSUPPORTED for result in before):
            return level(question, before)
        return LevelResult("float", Outcome.SKIPPED, "not asked")

    return ask


POLICIES: Mapping[str, tuple[Level, ...]] = {
    "off": (),
    "types": (types_level, if_untyped(numeric_level)),
    "float": (types_level, numeric_level),
    "ring": (types_level, ring_level, unless_proved(numeric_level)),
    "full": (types_level, ring_level, numeric_level),
}


def policy(name: str | None = None) -> tuple[str, tuple[Level, ...]]:
    """A policy by name; the environment variable HOCKET_VERIFY, then ``ring``, where no name is given. InputError if unknown."""
    chosen = name or os.environ.get(VARIABLE) or DEFAULT
    if chosen not in POLICIES:
        raise InputError(f"expected a verification level among {', '.join(POLICIES)}; found {chosen!r}")
    return chosen, POLICIES[chosen]


@without_collector()
def ask(question: Question, levels: tuple[Level, ...]) -> Verdict:
    """Ask the levels in order and stop at the first fault. Tile loops are judged tile by tile, written out in plain ops."""
    found: tuple[LevelResult, ...] = ()
    question = question.mapped(written_out)
    for level in levels:
        start = time.process_time()
        result = level(question, found)
        found = (*found, dataclasses.replace(result, seconds=result.seconds or time.process_time() - start))
        if result.outcome is Outcome.FAILED:
            break
    return combine(found)


def is_affordable(original: Program, transformed: Program, factor: float) -> bool:
    """Whether running both, at ``factor`` times their multiply-adds, is within BUDGET."""
    ranks = transformed.mesh.size if transformed.mesh is not None else 1
    return factor * (work(original) + ranks * work(transformed)) <= BUDGET


def _too_expensive() -> str:
    return f"more than {BUDGET:g} multiply-adds at these sizes, and no way to trace the program at smaller ones was given"


PRODUCTS = {"mm": 0, "bmm": 0, "addmm": 1, "baddbmm": 1, "mv": 0, "linear": 0, "convolution": 1, "convolution_backward": 2}
"""Ops whose cost is the size of the result times the row length of this argument."""


def work(program: Program) -> float:
    """Multiply-adds of one rank, roughly: every element made, times the row length for products."""
    total = 0.0
    for node in program.nodes:
        values: Any = node.meta.get("val")
        for value in values if isinstance(values, (tuple, list)) else [values]:
            if isinstance(value, torch.Tensor):
                total += math.prod(value.shape) * _row(node)
    return total


def _row(node: Any) -> float:
    name = str(getattr(getattr(node.target, "overloadpacket", None), "__name__", ""))
    if name not in PRODUCTS:
        return 1.0
    shape = node.args[PRODUCTS[name]].meta["val"].shape
    return float(math.prod(shape[1:]) if name.startswith("conv") else shape[-1])
