"""Decide whether two programs compute the same function, by exact evaluation on random ring inputs.

equal by the laws of commutative rings, x/x = 1, E(x+y) = E(x)E(y), log E, multiplicative roots, and congruence of uninterpreted
functions and of one fixed order   =>  equal on every draw (no tolerance, no false alarm)
different                          =>  some entry differs on a draw, up to the stated probability
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from ....runtime.mesh import Mesh
from ...errors import CollectiveMismatch, HocketError, InputError, UnsupportedError, VerificationError
from ...layout import Layout, replicated
from ...program import Program, Role, note
from ..ranks import RankGraphs
from .algebra import Algebra
from .arithmetic import ring_of
from .bound import Evidence, bound_of
from .canonical import canonical_form
from .equality import differing
from .inputs import changed_constants, draw_inputs
from .interpret import Extension, Watch, interpret_ranks
from .joint import Joint
from .pieces import ReplicasDiffer, assemble_value, cut_value
from .roots import rings_for
from .value import Value
from .verdict import Difference, RingVerdict, Status

ONE_RANK = Mesh((("one", 1),))
_ORDER_DRAWS = 6
"""Draws per ring where the order of computed values decides something: each draw explores one branch per entry."""
_REDRAWS = 4


@dataclass(frozen=True)
class Draw:
    """One choice of ring and seed."""

    p: int
    seed: int

    def algebra(self) -> Algebra:
        """A fresh evaluation; equal draws interpret uninterpreted functions alike."""
        return Algebra(ring_of(self.p), self.seed)


def compare(
    original: Program,
    transformed: Program,
    *,
    seeds: int | None = None,
    rings: Sequence[int] | None = None,
    extensions: Mapping[Any, Extension] | None = None,
) -> RingVerdict:
    """Compare every output role of two programs; either may be lowered to a mesh.

    seeds: draws per ring; None: one, and more where order decides something. rings: values of p; None: two that hold the roots in
    the programs' literals. extensions: meaning of cross-rank ops the interpreter does not know.
    """
    mismatch = _signatures(original, transformed)
    if mismatch:
        return RingVerdict(Status.DIFFERENT, mismatch, "the programs have different signatures")
    chosen = tuple(rings) if rings is not None else rings_for(original, transformed)
    session = _Session(original, transformed, extensions or {})
    try:
        return session.decide(chosen, seeds)
    except UnsupportedError as error:
        return RingVerdict(Status.UNSUPPORTED, reason=str(error), rings=chosen)
    except (InputError, VerificationError, CollectiveMismatch) as error:
        return RingVerdict(Status.DIFFERENT, reason=str(error), rings=chosen)


@dataclass
class _Session:
    original: Program
    transformed: Program
    extensions: Mapping[Any, Extension]
    used: set[str] = field(default_factory=set)
    canonical: bool = False
    draws: int = 0
    joint: Joint | None = None

    def decide(self, rings: tuple[int, ...], seeds: int | None) -> RingVerdict:
        evidence: list[Draw] = []
        for p in rings:
            wanted, seed, widened = seeds or 1, 0, seeds is not None
            while wanted:
                draw = Draw(p, seed)
                seed += 1
                differences, poison = self._one(draw)
                if poison:
                    if seed > (seeds or 1) + _ORDER_DRAWS + _REDRAWS:
                        return self._verdict(Status.POISON, rings, reason=poison)
                    continue
                if differences and not self.canonical and self._canonicalise():
                    differences, poison = self._one(draw)
                if differences:
                    return self._verdict(Status.DIFFERENT, rings, differences=differences)
                evidence.append(draw)
                wanted -= 1
                if "order" in self.used and not widened:
                    wanted, widened = wanted + _ORDER_DRAWS - 1, True
        bound = bound_of(Evidence((self.original, self.transformed), tuple(d.p for d in evidence), frozenset(self.used)))
        return self._verdict(Status.EQUAL, rings, bound=bound)

    def _verdict(self, status: Status, rings: tuple[int, ...], **more: Any) -> RingVerdict:
        used = frozenset(self.used - {"exp"})
        return RingVerdict(status, rings=rings, draws=self.draws, sensitivity=used, canonical=self.canonical, **more)

    def _canonicalise(self) -> bool:
        """Rewrite both programs to canonical form once, where roots were involved; False where that changes nothing."""
        if "root" not in self.used or isinstance(self.transformed, RankGraphs):
            return False
        left, right = canonical_form(self.original), canonical_form(self.transformed)
        if left is self.original and right is self.transformed:
            return False
        self.original, self.transformed, self.canonical, self.joint = left, right, True, None
        return True

    def _one(self, draw: Draw) -> tuple[tuple[Difference, ...], str]:
        """(differences, why the draw is poisoned)."""
        self.draws += 1
        algebra = draw.algebra()
        inputs = draw_inputs(self.original, self.transformed, algebra, draw.seed)
        if algebra.poison:
            return (), "an input constant is infinite or not a number"
        expected, found, poison = self._values(inputs, algebra, draw)
        self.used |= algebra.used
        differences = tuple(d for d in (_difference(algebra, role, expected[role], found[role]) for role in expected) if d)
        if poison:
            return (), "the original program divides by zero on every draw"
        if algebra.poison:
            return (), "the transformed program divides by zero on every draw, the original does not"
        return differences, ""

    def _values(
        self, inputs: Mapping[Role, Value], algebra: Algebra, draw: Draw
    ) -> tuple[dict[Role, Value], dict[Role, Value], int]:
        """Outputs of both programs, and how often the original divided by zero."""
        if self.original.mesh is None and self.transformed.mesh is None and not self.extensions:
            self.joint = self.joint or Joint(self.original, self.transformed)
            return self.joint.evaluate(inputs, algebra)
        first = draw.algebra()
        expected = evaluate(self.original, inputs, first, extensions=self.extensions)
        inputs = {**inputs, **changed_constants(self.original, self.transformed, algebra)}
        found = evaluate(self.transformed, inputs, algebra, extensions=self.extensions)
        self.used |= first.used
        return expected, found, first.poison


def evaluate(
    program: Program,
    inputs: Mapping[Role, Value],
    algebra: Algebra,
    *,
    extensions: Mapping[Any, Extension] | None = None,
    watch: Watch | None = None,
) -> dict[Role, Value]:
    """Global value of every output role; a ReplicasDiffer in place of a value whose replicas disagree."""
    mesh = program.mesh or ONE_RANK
    pieces = []
    for node, role in zip(program.placeholders, program.signature.inputs, strict=True):
        value = inputs[role]
        layout = _layout(program, node)
        pieces.append(cut_value(algebra, value, layout, mesh) if hasattr(value, "shape") else [value] * mesh.size)
    by_rank = [[piece[rank] for piece in pieces] for rank in range(mesh.size)]
    graphs = program.graphs if isinstance(program, RankGraphs) else (program.graph,)
    outputs = interpret_ranks(graphs, by_rank, mesh, algebra, watch=watch, extensions=extensions)
    result: dict[Role, Value] = {}
    for position, (role, made) in enumerate(zip(program.signature.outputs, program.results, strict=True)):
        held = [output[position] for output in outputs]
        if made is None or not hasattr(held[0], "shape"):
            result[role] = held[0]
            continue
        try:
            result[role] = assemble_value(algebra, held, _layout(program, made), mesh)
        except ReplicasDiffer as clash:
            result[role] = clash
    return result


def _layout(program: Program, node: Any) -> Layout:
    if program.mesh is None:
        return replicated(ONE_RANK)
    layouts = note(node).layouts
    if layouts is None or layouts[0] is None:
        raise HocketError(f"{node.name} of a program lowered to mesh {program.mesh} has no layout in its note")
    return layouts[0]


def _difference(algebra: Algebra, role: Role, expected: Value, found: Value) -> Difference | None:
    if isinstance(found, ReplicasDiffer):
        reason = f"ranks {found.first} and {found.second} along {found.axis!r} should hold the same value and do not"
        return Difference(role, reason, ranks=(found.first, found.second))
    if expected is None or found is None:
        return None if expected is found else Difference(role, "one program has no value for it")
    mask = differing(algebra, expected, found)
    if mask is None:
        return Difference(role, f"shapes {_shape(expected)} and {_shape(found)}")
    if not bool(mask.any()):
        return None
    index = tuple(torch.nonzero(mask)[0].tolist()) if mask.dim() else ()
    return Difference(role, "values differ", index, int(mask.sum()), mask.numel())


def _shape(value: Value) -> list[int]:
    return list(value.shape)


def _signatures(original: Program, transformed: Program) -> tuple[Difference, ...]:
    left, right = set(original.signature.outputs), set(transformed.signature.outputs)
    missing = [
        Difference(role, "the transformed program does not compute it") for role in original.signature.outputs if role not in right
    ]
    extra = [
        Difference(role, "the original program does not compute it") for role in transformed.signature.outputs if role not in left
    ]
    return (*missing, *extra)


Decide = Callable[[Program, Program], RingVerdict]
"""Signature of ``compare`` with default options, as the pass manager calls it."""
