"""What a plan costs as formulas of the named sizes: ``flops = 4546560*B*S + 57344*B*S**2``.

A program has fixed sizes. The same call captured at two other sizes has the same nodes, and three numbers for every dimension: the
dimension is the constant, the multiple ``c*B*S`` or the line ``a*S + b`` that gives all three. A width that happens to equal the
batch is told apart from it, since it does not change with it.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from fractions import Fraction

import sympy
from torch import Tensor

from ...runtime.mesh import Mesh
from ..cost.cluster import Cluster
from ..cost.cost import Cost
from ..cost.estimate import estimate
from ..cost.symbols import symbols
from ..cost.transfer import TransferPrices
from ..program import Program, annotate, copy_program, tensor_leaves
from ..retrace import Retrace, same_program_at, smaller_program
from .plan import Plan
from .view import view_program

Sizes = Sequence[Mapping[str, int]]
"""The named sizes of each capture."""


def cost_formulas(
    program: Program,
    plan: Plan,
    cluster: Cluster,
    retrace: Retrace,
    *,
    gradients_like_parameters: bool = False,
) -> Cost | None:
    """Every figure of ``plan.cost`` as an expression of the program's named sizes, for the placements of this plan.

    retrace: captures the program at other sizes. None where it is another program there, or a dimension is neither a multiple of
    named sizes nor a line through one, so that no formula holds.
    """
    others = list(itertools.islice(_at_other_sizes(program, retrace, plan.mesh), 2))
    named = name_dimensions(program, others) if len(others) == 2 else None
    if named is None:
        return None
    view = view_program(named, gradients_like_parameters=gradients_like_parameters)
    return estimate(view, plan.nodes, plan.results, TransferPrices(plan.mesh, cluster), symbolic=True)


def _at_other_sizes(program: Program, retrace: Retrace, mesh: Mesh) -> Iterator[Program]:
    """Captures at multiples of the sizes, every name with a factor of its own, then at small sizes."""
    for factor in (2, 4):
        larger = {name: (factor + i) * size for i, (name, size) in enumerate(program.sizes.items())}
        found = same_program_at([larger, *({name: size} for name, size in larger.items())], program, retrace)
        if found is not None:
            yield found
    for skip in (0, 1):
        small = smaller_program(program, retrace, mesh, skip=skip)
        if small is not None:
            yield small


def name_dimensions(program: Program, others: Sequence[Program]) -> Program | None:
    """A copy whose notes say every dimension as an expression. others: of the same skeleton, at other sizes. None where one has no
    expression.
    """
    named, mapping = copy_program(program)
    sizes = [one.sizes for one in (program, *others)]
    known: dict[tuple[int, ...], sympy.Expr | None] = {}
    for alike in zip(program.nodes, *(other.nodes for other in others), strict=True):
        if alike[0].op == "output":
            continue
        leaves = [tensor_leaves(node.meta["val"]) for node in alike]
        shapes: list[tuple[sympy.Expr, ...] | None] = []
        for values in zip(*leaves, strict=True):
            if not isinstance(values[0], Tensor):
                shapes.append(None)
                continue
            dims = list(zip(*(one.shape for one in values), strict=True))
            known.update({found: dimension(found, sizes) for found in dims if found not in known})
            if any(known[found] is None for found in dims):
                return None
            shapes.append(tuple(known[found] for found in dims))
        annotate(mapping[alike[0]], shapes=tuple(shapes))
    return named


def dimension(found: Sequence[int], sizes: Sizes) -> sympy.Expr | None:
    """The simplest expression that is ``found[i]`` at ``sizes[i]``; None where there is none."""
    if len(set(found)) == 1:
        return sympy.Integer(found[0])
    by_name = symbols(sizes[0])
    for count in range(1, len(by_name) + 1):
        for names in itertools.combinations(by_name, count):
            factors = {Fraction(size, math.prod(one[name] for name in names)) for size, one in zip(found, sizes, strict=True)}
            if len(factors) == 1:
                (factor,) = factors
                return sympy.Rational(factor.numerator, factor.denominator) * sympy.Mul(*(by_name[name] for name in names))
    for name, symbol in by_name.items():
        slope = Fraction(found[0] - found[1], sizes[0][name] - sizes[1][name]) if sizes[0][name] != sizes[1][name] else None
        if slope is None:
            continue
        offsets = {size - slope * one[name] for size, one in zip(found, sizes, strict=True)}
        if len(offsets) == 1:
            (offset,) = offsets
            return sympy.Rational(slope.numerator, slope.denominator) * symbol + sympy.Rational(
                offset.numerator, offset.denominator
            )
    return None
