"""How likely a differing entry was missed.

Rational programs (+, -, x, / and rearrangements only): the difference of one entry is a quotient of polynomials of degree <= D in
the inputs. If it does not vanish mod r and mod p, a random point of F_r hides it with probability <= D/r and one of GF(p^3) with
<= D/p^3 (Schwartz 1980, Zippel 1979); the two are independent, and so are draws. D is computed below by the schoolbook rules

    deg(a + b) = (max(n_a + d_b, n_b + d_a), d_a + d_b)     deg(a b) = (n_a + n_b, d_a + d_b)     deg(1/a) = (d_a, n_a)

Everything else (exponentials, roots, keyed functions, order) has no proven bound: the figure given is the rate measured for one
comparison with nested exponentials, 1/p^2 a draw, called heuristic.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.fx as fx

from ...program import Program
from .tables import check_pair
from .verdict import Bound

aten = torch.ops.aten

Degree = tuple[int, int]
"""Of numerator and denominator."""

_MOVE_NAMES = """
view _unsafe_view reshape permute transpose t unsqueeze squeeze expand slice select cat stack split split_with_sizes
unbind clone detach alias _to_copy constant_pad_nd flip roll repeat tril triu slice_backward select_backward embedding
gather index index_select neg where masked_fill copy lift_fresh_copy
"""
_MOVES = {getattr(aten, name) for name in _MOVE_NAMES.split()}
_SUMS = {aten.sum, aten.mean, aten.cumsum}
_PRODUCTS = {aten.mm, aten.bmm}


@dataclass(frozen=True)
class Evidence:
    """programs: both sides; draws: the p of every draw that agreed; used: treatments met."""

    programs: tuple[Program, Program]
    draws: tuple[int, ...]
    used: frozenset[str]


def bound_of(evidence: Evidence) -> Bound:
    """The bound for one entry over all draws."""
    degrees = [program_degree(program) for program in evidence.programs]
    first, second = degrees
    if not evidence.used and first is not None and second is not None:
        degree = max(first[0] + second[1], second[0] + first[1])
        chances = [min(1.0, degree / check_pair(p)) * min(1.0, degree / p**3) for p in evidence.draws]
        reason = f"rational programs; an entry's difference has degree <= {degree}"
        return Bound(math.prod(chances), rigorous=True, degree=degree, explanation=reason)
    beyond = sorted(evidence.used) or ["ops whose degree is not tracked"]
    reason = f"no theorem covers {', '.join(beyond)}; measured 1/p^2 for a draw"
    return Bound(math.prod(1 / p**2 for p in evidence.draws), rigorous=False, degree=None, explanation=reason)


def program_degree(program: Program) -> Degree | None:
    """The largest degree over the outputs; None where an op is not a rational function with a simple rule."""
    degrees: dict[fx.Node, Degree] = {}
    for node in program.nodes:
        if node.op == "output":
            break
        found = (1, 0) if node.op == "placeholder" else _degree(node, degrees)
        if found is None:
            return None
        degrees[node] = found
    kept = [degrees[node] for node in program.results if node is not None]
    return (max((n for n, _ in kept), default=0), max((d for _, d in kept), default=0))


def _degree(node: fx.Node, degrees: dict[fx.Node, Degree]) -> Degree | None:
    packet: Any = getattr(node.target, "overloadpacket", None)
    inputs = [degrees[source] for source in node.all_input_nodes]
    largest = (max((n for n, _ in inputs), default=0), max((d for _, d in inputs), default=0))
    if packet is None or packet in _MOVES or not inputs:
        return largest if getattr(node.target, "namespace", "aten") == "aten" else None
    operands = [degrees[a] if isinstance(a, fx.Node) else (0, 0) for a in node.args[:2]]
    if packet in (aten.add, aten.sub):
        return _sum(operands[0], operands[1])
    if packet is aten.mul:
        return _product(operands[0], operands[1])
    if packet is aten.div:
        return _product(operands[0], (operands[1][1], operands[1][0]))
    if packet is aten.reciprocal:
        return operands[0][1], operands[0][0]
    if packet is aten.pow and isinstance(node.args[1], int) and node.args[1] >= 0:
        return operands[0][0] * node.args[1], operands[0][1] * node.args[1]
    if packet in _SUMS:
        return _repeated(operands[0], _terms(node))
    if packet in _PRODUCTS:
        return _repeated(_product(*operands), int(node.args[0].meta["val"].shape[-1]))  # type: ignore[union-attr]
    return None


def _sum(a: Degree, b: Degree) -> Degree:
    return max(a[0] + b[1], b[0] + a[1]), a[1] + b[1]


def _product(a: Degree, b: Degree) -> Degree:
    return a[0] + b[0], a[1] + b[1]


def _repeated(a: Degree, terms: int) -> Degree:
    """Sum of so many entries with different denominators."""
    return a[0] + max(terms - 1, 0) * a[1], max(terms, 1) * a[1]


def _terms(node: fx.Node) -> int:
    source, result = node.args[0].meta["val"], node.meta["val"]  # type: ignore[union-attr]
    if node.target.overloadpacket is aten.cumsum:  # type: ignore[union-attr]
        return int(source.shape[node.args[1]]) if source.dim() else 1
    return int(source.numel() // max(int(result.numel()), 1))
