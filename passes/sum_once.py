"""Sum gradients over replicas once a step, not once a micro-batch.

    sum_m all_reduce(g_m)   ==   all_reduce(sum_m g_m)

In a program lowered for one micro-batch, a gradient ends in collectives that add up the shares of the ranks. They are linear, so
what micro-batches accumulate may be the shares, and the collectives may run once, after the last one. The pass moves them into the
phase of the optimizer, which a pipeline runs once a step; nothing is computed otherwise than before.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.fx as fx

from ..compiler.contract import Context, Contract, Equal
from ..compiler.program import Decision, Phase, Program, RoleKind, annotate, copy_program, note, tensor_inputs
from .backward_split_costs import is_alias, stored_bytes
from .backward_split_normal import is_backward

aten = torch.ops.aten
c10d = torch.ops._c10d_functional

_MOVES = frozenset(
    {
        c10d.all_gather_into_tensor.default,
        c10d.all_to_all_single.default,
        c10d.wait_tensor.default,
        aten.clone.default,
        aten.constant_pad_nd.default,
    }
)
"""Linear, and no sum themselves; views are so too."""

_SUMS = frozenset({c10d.all_reduce.default, c10d.reduce_scatter_tensor.default})


@dataclass(frozen=True)
class SumOnce:
    """Mark the sums over ranks at the end of gradients as the optimizer's, with a Decision for each."""

    name: ClassVar[str] = "sum-once"
    contract: ClassVar[Contract] = Equal()

    def __call__(self, program: Program, context: Context) -> Program:  # noqa: ARG002
        """The same program with other phases; a logical program has no such sums."""
        if program.mesh is None:
            return program
        new, _ = copy_program(program)
        decisions = []
        for role, node in zip(new.signature.outputs, new.results, strict=True):
            if role.kind is RoleKind.GRADIENT and node is not None:
                decisions += self._defer(role.name, node)
        return new.decided(*decisions)

    def _defer(self, name: str, gradient: fx.Node) -> list[Decision]:
        path = []
        node = gradient
        while is_backward(node) and _is_linear(node):
            path.append(node)
            node = tensor_inputs(node)[0]
        while path and path[-1].target not in _SUMS:
            path.pop()
        if not path:
            return []
        others = [user.name for one in path for user in one.users if not _is_behind(user, path)]
        if others:
            reason = f"the gradient of {name} is summed over ranks for every micro-batch: {others[0]} reads the sum"
            return [Decision(self.name, gradient.name, applied=False, reason=reason, source=note(gradient).source)]
        for one in path:
            annotate(one, phase=Phase.OPTIMIZER)
        held = f"{stored_bytes(tensor_inputs(path[-1])[0]):,} bytes"
        reason = f"the gradient of {name} is summed over ranks once a step: micro-batches add up each rank's share, {held}"
        return [Decision(self.name, gradient.name, applied=True, reason=reason, source=note(gradient).source)]


def _is_linear(node: fx.Node) -> bool:
    """Whether a call of one tensor is linear in it: sums and moves between ranks, copies, views, and zeros around it."""
    if len(tensor_inputs(node)) != 1 or node.target is operator.getitem:
        return False
    if node.target in _SUMS:
        return node.args[1] in ("sum", "avg")
    return node.target in _MOVES or is_alias(node)


def _is_behind(user: fx.Node, path: list[fx.Node]) -> bool:
    """Whether whoever reads a sum comes after it in the step, not in a micro-batch."""
    return user in path or user.op == "output" or note(user).phase is Phase.OPTIMIZER
