"""Split the backward into input and weight gradients (2BP, arXiv 2405.18047; zero bubble, arXiv 2401.10241).

    dL/dx = dL/dy . dy/dx      needed upstream now         -> phase BACKWARD_INPUT   (p1)
    dL/dw = dL/dy . dy/dw      needed by the optimizer     -> phase BACKWARD_WEIGHT  (p2)

p2 runs after p1, weight gradient by weight gradient in the order of the backward. Nothing is computed otherwise than before, so
every gradient is the same to the last bit; only the order of independent nodes changes. What p2 reads is held until then, or
computed once more where a budget of time for that is given.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch.fx as fx

from ..compiler.contract import Context, Contract, Equal, Pass
from ..compiler.errors import InputError
from ..compiler.plan.tactics import RewriteTactic
from ..compiler.program import Decision, Phase, Program, annotate, copy_program, graph_module, note
from .backward_split_choice import candidates, choose, is_at_hand, weight_results
from .backward_split_costs import Costs, is_alias, stored_bytes
from .backward_split_cut import Saved, cheapest_cut, within_budget
from .backward_split_normal import NormaliseBackward, is_backward
from .op_fission import MASKED, OpFission
from .remembered import Remembered

_PRODUCTS = frozenset(target for target, name in MASKED.items() if "norm" not in name)


@dataclass(frozen=True)
class Choice:
    """What was decided for a program, by node names: late nodes, values held for them, nodes computed again for them."""

    late: frozenset[str]
    again: tuple[str, ...]
    decisions: tuple[Decision, ...]


@dataclass(frozen=True)
class BackwardSplit:
    """Mark every backward node as p1 or p2 and order the program forward, p1, p2, optimizer.

    worth: a weight gradient is deferred if it takes at least this many times as long as reading the bytes it keeps alive; 0 defers
    all. extra: time that may be spent on computing values again rather than holding them, as a fraction of the backward's.
    split_norms: defer the scales and shifts of norms too where that is worth it. The choice depends on sizes; programs with the
    same nodes are split alike, as the first of them was: a proof at small sizes is then one of the same rewrite.
    """

    name: ClassVar[str] = "backward-split"
    contract: ClassVar[Contract] = Equal()
    worth: float = 3.0
    extra: float = 0.0
    split_norms: bool = False
    chosen: Remembered[Choice] = field(default_factory=Remembered, compare=False, repr=False)

    def __post_init__(self) -> None:
        if self.worth < 0 or self.extra < 0:
            raise InputError(f"worth and extra must not be negative; found {self.worth} and {self.extra}")

    def __call__(self, program: Program, context: Context) -> Program:
        """The program with its backward in two phases, and a Decision for each weight gradient and each value held or repeated."""
        ready = OpFission(self._wants_fission)(NormaliseBackward()(program, context), context)
        new, _ = copy_program(ready)
        choice = self.chosen.choose(new, lambda: self._choose(new, Costs(context.cluster)))
        return _ordered(_apply(new, choice, self.name)).decided(*choice.decisions)

    def _wants_fission(self, node: fx.Node) -> bool:
        return self.split_norms or node.target in _PRODUCTS

    def _choose(self, program: Program, costs: Costs) -> Choice:
        late, decisions = choose(candidates(program, costs), weight_results(program), costs, self.worth, self.name)
        saved = self._saved(program, late, costs)
        decisions += [
            Decision(
                self.name,
                node.name,
                applied=False,
                reason=f"{node.name} held: {stored_bytes(node):,} bytes",
                source=note(node).source,
            )
            for node in saved.hold
        ]
        decisions += [
            Decision(
                self.name,
                node.name,
                applied=True,
                reason=f"{node.name} computed again for the weight gradients",
                source=note(node).source,
            )
            for node in saved.again
            if costs.seconds(node) > 0
        ]
        return Choice(frozenset(node.name for node in late), tuple(node.name for node in saved.again), tuple(decisions))

    def _saved(self, program: Program, late: set[fx.Node], costs: Costs) -> Saved:
        """Hold or compute again: the least memory within the budget of time."""
        order = {node: place for place, node in enumerate(program.nodes)}

        def cut(bytes_per_second: float | None) -> Saved:
            def price(node: fx.Node) -> float | None:
                return None if bytes_per_second is None else costs.seconds(node) * bytes_per_second

            return cheapest_cut(late, free=is_at_hand, price=price, order=order)

        if not self.extra or not late:
            return cut(None)
        budget = self.extra * sum(costs.seconds(node) for node in program.nodes if is_backward(node))
        return within_budget(cut, lambda saved: sum(map(costs.seconds, saved.again)), budget, 1 / costs.seconds_per_byte())


@dataclass(frozen=True)
class SplitBackward(RewriteTactic):
    """Compute weight gradients after the gradients of activations, on any mesh; see ``BackwardSplit`` for the options."""

    worth: float = 3.0
    extra: float = 0.0
    split_norms: bool = False
    chosen: Remembered[Choice] = field(default_factory=Remembered, compare=False, repr=False)

    def rewrites_after(self) -> tuple[Pass, ...]:
        """The pass."""
        return (BackwardSplit(self.worth, self.extra, self.split_norms, self.chosen),)


def _apply(program: Program, choice: Choice, by: str) -> Program:
    """Mark the late nodes, and give them copies of what is computed again for them. Changes ``program``, a fresh copy."""
    late = [node for node in program.nodes if node.name in choice.late]
    for node in program.nodes:
        if is_backward(node):
            annotate(node, phase=Phase.BACKWARD_WEIGHT if node.name in choice.late else Phase.BACKWARD_INPUT)
    repeat(late, {node for node in program.nodes if node.name in set(choice.again)}, Phase.BACKWARD_WEIGHT, by)
    return program


def repeat(consumers: list[fx.Node], again: set[fx.Node], phase: Phase, by: str) -> None:
    """Give ``consumers`` their own copies of the nodes in ``again``, of that phase; views stay shared unless what they show is
    not."""
    copies: dict[fx.Node, fx.Node] = {}

    def copy_of(node: fx.Node) -> fx.Node:
        if node not in again:
            return node
        if node not in copies:
            inputs = {source: copy_of(source) for source in node.all_input_nodes}
            if is_alias(node) and all(source is new for source, new in inputs.items()):
                copies[node] = node
            else:
                copies[node] = node.graph.node_copy(node, inputs.__getitem__)
                annotate(copies[node], phase=phase, added_by=by)
        return copies[node]

    for node in consumers:
        with node.graph.inserting_before(node):
            for source in node.all_input_nodes:
                new = copy_of(source)
                if new is not source:
                    node.replace_input_with(source, new)


_RANK = {Phase.FORWARD: 0, Phase.BACKWARD_INPUT: 1, Phase.BACKWARD_WEIGHT: 2, Phase.OPTIMIZER: 3}


def _ordered(program: Program) -> Program:
    """The program with its phases one after the other, each in its old order; nodes never come before what they read."""
    rank: dict[fx.Node, int] = {}
    for node in program.nodes:
        before = max((rank[source] for source in node.all_input_nodes), default=0)
        rank[node] = 0 if node.op == "placeholder" else 4 if node.op == "output" else max(before, _RANK[note(node).phase])
    graph = fx.Graph()
    made: dict[fx.Node, fx.Node] = {}
    for node in sorted(program.nodes, key=rank.__getitem__):
        made[node] = graph.node_copy(node, made.__getitem__)
    return program.replace(graph=graph_module(graph))
