"""Choose what the forward saves for the backward, and what the backward computes again: a minimum cut.

    backward(saved values)  ==  backward(again(fewer saved values))

The same function of the same values, so nothing changes but memory and time (Chen et al., arXiv 1604.06174). Without a pass of
this kind the backward reads whatever forward values its formulas name.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch.fx as fx

from ..compiler.contract import Context, Contract, Equal
from ..compiler.errors import InputError
from ..compiler.program import Decision, Phase, Program, copy_program, note
from .backward_split import repeat
from .backward_split_choice import is_at_hand
from .backward_split_costs import Costs, stored_bytes
from .backward_split_cut import Saved, cheapest_cut, within_budget
from .backward_split_normal import NormaliseBackward, is_backward
from .remembered import Remembered


@dataclass(frozen=True)
class RecomputeForward:
    """Let the backward compute forward values again where that saves memory.

    extra: time that may be spent on it, as a fraction of the backward's. Programs with the same nodes are treated alike, see
    ``BackwardSplit``. Run it before that pass.
    """

    name: ClassVar[str] = "recompute-forward"
    contract: ClassVar[Contract] = Equal()
    extra: float = 0.05
    chosen: Remembered[tuple[str, ...]] = field(default_factory=Remembered, compare=False, repr=False)

    def __post_init__(self) -> None:
        if self.extra < 0:
            raise InputError(f"extra must not be negative; found {self.extra}")

    def __call__(self, program: Program, context: Context) -> Program:
        """The program with copies of forward nodes in its backward, and a Decision for each value saved or repeated."""
        new, _ = copy_program(NormaliseBackward()(program, context))
        costs = Costs(context.cluster)
        backward = [node for node in new.nodes if is_backward(node)]
        again = set(self.chosen.choose(new, lambda: tuple(node.name for node in self._saved(new, backward, costs).again)))
        nodes = {node for node in new.nodes if node.name in again}
        decisions = [self._decision(node, costs) for node in nodes if costs.seconds(node) > 0]
        repeat(backward, nodes, Phase.BACKWARD_INPUT, self.name)
        return new.decided(*sorted(decisions, key=lambda one: one.node))

    def _decision(self, node: fx.Node, costs: Costs) -> Decision:
        reason = f"{node.name} ({stored_bytes(node):,} bytes) computed again in the backward: {costs.seconds(node) * 1e6:.0f} us"
        return Decision(self.name, node.name, applied=True, reason=reason, source=note(node).source)

    def _saved(self, program: Program, backward: list[fx.Node], costs: Costs) -> Saved:
        order = {node: position for position, node in enumerate(program.nodes)}
        budget = self.extra * sum(map(costs.seconds, backward))
        changed = {node for node in program.placeholders if not is_at_hand(node)}

        def cut(bytes_per_second: float) -> Saved:
            def price(node: fx.Node) -> float | None:
                return None if node in changed else costs.seconds(node) * bytes_per_second

            return cheapest_cut(backward, free=is_at_hand, price=price, order=order)

        return within_budget(cut, lambda saved: sum(map(costs.seconds, saved.again)), budget, 1 / costs.seconds_per_byte())
