"""The smallest piece of two different programs on which they differ, and what the difference is.

The piece is the first lemma that fails and whose two sides also differ in the whole programs: two ways of computing one value, from
values that both programs share. Over the ring the relation of the two is exact, so it can be named:

    found = 2 x expected      found = expected without the term t      found = t      found = expected + t

How much it matters is measured where it will be felt: in float64, on random inputs.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from ..errors import HocketError
from ..program import Program, note
from .differential import output_error
from .lockstep import run_ranks
from .ring.algebra import Algebra
from .ring.arithmetic import ring_of
from .ring.calls import Call, Ref
from .ring.cones import Cones
from .ring.equality import differing, same
from .ring.inputs import draw_inputs
from .ring.lemmas import Prover
from .ring.tables import PRIMES
from .ring.value import RingTensor
from .samples import sample_inputs
from .templates import Templates, lines_of

FACTORS = (-1, 2, 3, 4, 8, 16)
"""Multiples that a value counted too often, or shared out once too much, is off by."""

SHOWN = 12
"""Lines of either side that are printed."""


@dataclass(frozen=True)
class Counterexample:
    """original, transformed: names of the value in either program; sources: the user's lines; relation: what was found, in terms of
    what was expected; inputs: shapes of the shared values; expected, found: the two ways of computing it, one call a line; entries:
    how many differ, of how many; entry: the first that does; effect: largest difference in float64 on random inputs, relative to
    the largest element; values: expected and found at the worst entry."""

    original: str
    transformed: str
    sources: tuple[str, str]
    relation: str
    inputs: dict[str, tuple[int, ...]]
    expected: tuple[str, ...]
    found: tuple[str, ...]
    entries: tuple[int, int]
    entry: tuple[int, ...]
    effect: float
    values: tuple[float, float]

    def __str__(self) -> str:
        first, second = (source or "unknown source" for source in self.sources)
        some, total = self.entries
        lines = [
            f"{self.transformed} (from {second}) {self.relation} {self.original} (from {first})",
            f"  {some} of {total} entries differ, first at {list(self.entry)}; in float64 by {self.effect:.3g} of the "
            f"largest element ({self.values[1]:.6g} instead of {self.values[0]:.6g})",
            f"  given {', '.join(f'{name}{list(shape)}' for name, shape in self.inputs.items())}",
        ]
        for what, side in (("expected", self.expected), ("found", self.found)):
            lines += [f"  {what}:", *(f"    {line}" for line in side[:SHOWN])]
            lines += [f"    and {len(side) - SHOWN} more"] if len(side) > SHOWN else []
        return "\n".join(lines)


def counterexample(original: Program, transformed: Program, *, seed: int = 0) -> Counterexample | None:
    """The first value that differs, for two programs of one rank that are known to differ; None where no node claims such a one."""
    try:
        templates = Templates()
        prover = Prover(lines_of(original, templates), lines_of(transformed, templates))
        prover.run()
        found = next(_refuted(prover, original, transformed, seed), None)
    except HocketError:
        return None
    return None if found is None else _described(prover, *found)


def _refuted(prover: Prover, original: Program, transformed: Program, seed: int) -> Iterator[tuple[Cones, Any, Any, Algebra, Any]]:
    """Failed lemmas whose sides differ in the whole programs as well."""
    algebra = Algebra(ring_of(PRIMES[0]), seed)
    inputs = draw_inputs(original, transformed, algebra, seed)
    table = prover.table
    given = {
        number: algebra.lift(table.constants[number])
        if number in table.constants and table.constants[number].is_floating_point()
        else table.constants.get(number, None if call.role is None else inputs.get(call.role))
        for number, call in enumerate(table.calls)
        if call.template is None
    }
    for cones in prover.refuted:
        shared = list(dict.fromkeys((*cones.roots, *cones.left, *cones.leaves)))
        values, _ = table.evaluate(shared, given, algebra)
        expected, found = values[cones.roots[0]], values[cones.roots[1]]
        if not same(algebra, expected, found):
            yield cones, expected, found, algebra, values


def _described(prover: Prover, cones: Cones, expected: Any, found: Any, algebra: Algebra, values: Any) -> Counterexample:
    table = prover.table
    calls = [table.calls[root] for root in cones.roots]
    mask = differing(algebra, expected, found)
    where = torch.nonzero(mask)[0].tolist() if mask is not None and mask.dim() else []
    effect, pair = _in_floats(prover, cones)
    names = {
        number: note(table.calls[number].node).carries or table.calls[number].node.name
        for number in (*cones.leaves, *cones.left, *cones.right)
    }
    sides = [
        [_line(table.calls[n], names, n) for n in numbers if table.calls[n].target is not None]
        for numbers in (cones.left, cones.right)
    ]
    return Counterexample(
        original=calls[0].node.name,
        transformed=calls[1].node.name,
        sources=(note(calls[0].node).source, note(calls[1].node).source),
        relation=_relation(algebra, expected, found, {n: values[n] for n in (*cones.leaves, *cones.left)}, names),
        inputs={names[leaf]: tuple(table.form(leaf).shape) for leaf in cones.leaves},
        expected=tuple(sides[0]),
        found=tuple(sides[1]),
        entries=(0, 0) if mask is None else (int(mask.sum()), mask.numel()),
        entry=tuple(where),
        effect=effect,
        values=pair,
    )


def _line(call: Call, names: dict[int, str], number: int) -> str:
    return f"{names[number]} = {call.target}({', '.join(_text(arg, names) for arg in (*call.args, *call.kwargs.values()))})"


def _text(argument: Any, names: dict[int, str]) -> str:
    if type(argument) is Ref:
        return names.get(argument, f"v{int(argument)}")
    if isinstance(argument, (list, tuple)):
        return "[" + ", ".join(_text(item, names) for item in argument) + "]"
    return str(argument)


# ---- what the found value is -----------------------------------------------------------------------------------------------------


def _relation(algebra: Algebra, expected: Any, found: Any, known: dict[int, Any], names: dict[int, str]) -> str:
    """What is found, in words that end where the name of the expected value follows."""
    if not (isinstance(expected, RingTensor) and isinstance(found, RingTensor)) or expected.shape != found.shape:
        return "has not the shape of"
    for factor in FACTORS:
        if same(algebra, found, algebra.mul(expected, factor)):
            return "is minus" if factor == -1 else f"is {factor} x"
        if factor > 1 and same(algebra, algebra.mul(found, factor), expected):
            return f"is 1/{factor} of"
    difference = algebra.sub(expected, found)
    for number, term in known.items():
        if isinstance(term, RingTensor) and _fits(term, expected):
            spread = _spread(term, expected)
            for sign, words in (
                (spread, f"lacks the term {names[number]} of"),
                (algebra.neg(spread), f"has {names[number]} added to"),
            ):
                if same(algebra, difference, sign):
                    return words
            if same(algebra, found, spread):
                return f"is {names[number]} instead of"
    orders = itertools.permutations(range(expected.ndim)) if expected.ndim <= 4 else ()
    for order in orders:
        turned = found.map(lambda t, order=order: t.permute(0, *(dim + 1 for dim in order)))  # type: ignore[misc]
        if turned.shape == expected.shape and same(algebra, turned, expected):
            return f"has the dimensions {list(order)} of"
    return "has no simple relation to"


def _fits(term: RingTensor, whole: RingTensor) -> bool:
    sizes = zip(reversed(term.shape), reversed(whole.shape), strict=False)
    return term.ndim <= whole.ndim and all(a in (1, b) for a, b in sizes)


def _spread(term: RingTensor, whole: RingTensor) -> RingTensor:
    return term.rank(whole.ndim).map(lambda t: t.expand(4, *whole.shape))


# ---- how much it matters ---------------------------------------------------------------------------------------------------------


def _in_floats(prover: Prover, cones: Cones) -> tuple[float, tuple[float, float]]:
    """(largest difference relative to the largest element, the pair at the worst entry), both sides run in float64."""
    left, right = prover.cutter.programs(cones)
    inputs = sample_inputs(left)
    try:
        expected, found = (next(iter(run_ranks(side, inputs, dtype=torch.float64).outputs.values())) for side in (left, right))
    except HocketError:
        return float("nan"), (float("nan"), float("nan"))
    if expected is None or found is None or expected.shape != found.shape or not expected.numel():
        return float("inf"), (float("nan"), float("nan"))
    error, _ = output_error(expected, found)
    worst = int((expected - found).abs().reshape(-1).argmax())
    return error, (float(expected.reshape(-1)[worst]), float(found.reshape(-1)[worst]))
