"""Bring a captured backward into the form in which splitting sees what belongs together.

    t(t(x)) == x        detach(x) == alias(x) == x        elements of a result belong to the phase that makes it
    batch norm in training reads no running statistics, so its backward need not hold them

All of these are the same memory or the same call: the numbers do not change.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import ClassVar, cast

import torch
import torch.fx as fx

from ..compiler.contract import Context, Contract, Equal
from ..compiler.program import Decision, Phase, Program, annotate, copy_program, note

aten = torch.ops.aten

SAME = frozenset({aten.detach.default, aten.alias.default, aten.lift_fresh.default})
_STATISTICS = slice(3, 5)
_TRAINING = 7


@dataclass(frozen=True)
class NormaliseBackward:
    """See the module."""

    name: ClassVar[str] = "normalise-backward"
    contract: ClassVar[Contract] = Equal()

    def __call__(self, program: Program, context: Context) -> Program:  # noqa: ARG002
        """The program in that form, with one Decision that counts what was removed."""
        new, _ = copy_program(program)
        graph = new.graph.graph
        removed = 0
        for node in graph.nodes:
            if node.target is operator.getitem:
                annotate(node, phase=note(node.args[0]).phase)
            source = same_as(node)
            if source is not None:
                node.replace_all_uses_with(source)
                removed += 1
            elif node.target is aten.native_batch_norm_backward.default and node.args[_TRAINING]:
                node.args = (*node.args[: _STATISTICS.start], None, None, *node.args[_STATISTICS.stop :])
        _sweep(graph)
        return new.decided(Decision(self.name, "", applied=removed > 0, reason=f"{removed} views of views and aliases left out"))


def same_as(node: fx.Node) -> fx.Node | None:
    """The node whose very value (memory and strides) this one repeats, None if it makes a view of its own."""
    if node.target in SAME:
        return cast(fx.Node, node.args[0])
    if node.target is aten.t.default:
        inner = node.args[0]
        if isinstance(inner, fx.Node) and inner.target is aten.t.default:
            return cast(fx.Node, inner.args[0])
    return None


def _sweep(graph: fx.Graph) -> None:
    """Erase views that nobody reads any more."""
    for node in reversed(list(graph.nodes)):
        if node.op == "call_function" and not node.users and (same_as(node) is not None or node.target is aten.t.default):
            graph.erase_node(node)


def is_backward(node: fx.Node) -> bool:
    """Whether a node is a call of the backward."""
    return node.op == "call_function" and note(node).phase in (Phase.BACKWARD_INPUT, Phase.BACKWARD_WEIGHT)
