"""One product for a sum of products: weight gradients over time steps, or over uses of a weight (2BP's concatenated p2).

    a_1 b_1 + a_2 b_2 + .. + a_n b_n    ==    [a_1 a_2 .. a_n] [b_1; b_2; ..; b_n]

Equal in the reals and over the ring; in floating point the same terms are added in another order. With K columns in all and unit
roundoff u, either side differs from the true sum by at most K u / (1 - K u) times the sum of the products' absolute values (Higham,
Accuracy and Stability of Numerical Algorithms, section 3.5), so they differ from each other by at most twice that. Small products
gain, since one large one uses the processor better; large ones lose, since their factors are copied. So this is asked for, never
chosen by itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.fx as fx

from ..compiler.contract import Context, Contract, Equal
from ..compiler.program import Decision, Program, annotate, copy_program, note
from .backward_split_choice import base_of, weight_results
from .backward_split_normal import NormaliseBackward

aten = torch.ops.aten


@dataclass(frozen=True)
class JoinProducts:
    """Join the products of each weight gradient that is a sum of ``least`` of them or more, with at most ``columns`` columns each.

    The sum's bits change (class ``reordered_sum``), within the bound that each Decision states.
    """

    name: ClassVar[str] = "join-products"
    contract: ClassVar[Contract] = Equal()
    least: int = 2
    columns: int = 64

    def __call__(self, program: Program, context: Context) -> Program:
        """The program with one product for each sum, and a Decision for each sum looked at."""
        new, _ = copy_program(NormaliseBackward()(program, context))
        decisions = []
        for node in {base_of(result): None for result in weight_results(new)}:
            terms = _terms(node)
            if len(terms) < 2:
                continue
            source = note(terms[-1]).source
            reason = self._refusal(terms)
            if not reason:
                _join(node, terms, self.name)
                reason = _bound(terms)
                decisions.append(Decision(self.name, node.name, applied=True, reason=reason, source=source))
            else:
                decisions.append(Decision(self.name, node.name, applied=False, reason=reason, source=source))
        new.graph.graph.eliminate_dead_code()
        return new.decided(*decisions)

    def _refusal(self, terms: list[fx.Node]) -> str:
        widest = max(_columns(term) for term in terms)
        if len(terms) < self.least:
            return f"a sum of {len(terms)} products, fewer than {self.least}"
        if widest > self.columns:
            return f"a sum of {len(terms)} products of up to {widest} columns: copying their factors would cost more than it saves"
        return ""


def _terms(node: fx.Node) -> list[fx.Node]:
    """The products of a sum of nothing else, in order, all as they are or all transposed; [] for any other node."""
    found, transposed = list[fx.Node](), set[bool]()
    pending = [node]
    while pending:
        one = pending.pop()
        if one is not node and len(one.users) != 1:
            return []
        if one.target is aten.add.Tensor and not one.kwargs and len(one.all_input_nodes) == 2:
            pending += reversed(one.all_input_nodes)
            continue
        product = one.all_input_nodes[0] if one.target is aten.t.default else one
        if product.target is not aten.mm.default or (product is not one and len(product.users) != 1):
            return []
        found.append(product)
        transposed.add(product is not one)
    return found if len(transposed) == 1 else []


def _columns(term: fx.Node) -> int:
    left: Any = term.args[0]
    return int(left.meta["val"].shape[1])


def _bound(terms: list[fx.Node]) -> str:
    total = sum(map(_columns, terms))
    roundoff = torch.finfo(terms[0].meta["val"].dtype).eps / 2
    limit = 2 * total * roundoff / (1 - total * roundoff)
    return (
        f"reordered_sum: {len(terms)} products of {total} columns joined into one; no element differs by more than {limit:.1e} "
        "times the sum of its terms' absolute values"
    )


def _join(node: fx.Node, terms: list[fx.Node], by: str) -> None:
    graph = node.graph
    with graph.inserting_before(node):
        factors = []
        for side, dim in ((0, 1), (1, 0)):
            parts: list[Any] = [term.args[side] for term in terms]
            factor = graph.call_function(aten.cat.default, (parts, dim))
            factor.meta["val"] = aten.cat.default([part.meta["val"] for part in parts], dim)
            factors.append(factor)
        product = graph.call_function(aten.mm.default, tuple(factors))
        made_of = [*factors, product]
        if next(iter(terms[0].users)).target is aten.t.default:
            made_of.append(graph.call_function(aten.t.default, (product,)))
    product.meta["val"] = aten.mm.default(*(factor.meta["val"] for factor in factors))
    made_of[-1].meta["val"] = node.meta["val"]
    for made in made_of:
        known = note(terms[-1])
        annotate(made, source=known.source, module=known.module, phase=known.phase, region=known.region, added_by=by)
    node.replace_all_uses_with(made_of[-1])
