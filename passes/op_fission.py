"""Give the gradients of an op's weights a node of their own.

    (dx, dw, db) = op_backward(.., [1, 1, 1])   ==   (dx, _, _) = op_backward(.., [1, 0, 0]); (_, dw, db) = op_backward(.., [0,
    1, 1])

Ops with an output mask compute each output by itself from the same arguments, so the numbers are the same to the last bit. Only
then can the weight gradients of a convolution or a norm run later than the gradient of its input.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
import torch.fx as fx

from ..compiler.contract import Context, Contract, Equal
from ..compiler.program import Decision, Program, annotate, copy_program, note

aten = torch.ops.aten

MASKED: Mapping[Any, str] = {
    aten.convolution_backward.default: "a convolution",
    aten.native_batch_norm_backward.default: "a batch norm",
    aten.native_group_norm_backward.default: "a group norm",
    aten.native_layer_norm_backward.default: "a layer norm",
    aten._fused_rms_norm_backward.default: "an RMS norm",
    aten.linear_backward.default: "a linear layer",
}
"""Ops whose first output is the gradient of the input, the others those of weights, with a mask that says which are wanted."""


def all_of_them(_node: fx.Node) -> bool:
    """Every op that can be split."""
    return True


@dataclass(frozen=True)
class OpFission:
    """Split backward ops that compute the gradient of their input and of their weights in one call.

    wanted: which of them. Every op of ``MASKED`` gets a Decision.
    """

    name: ClassVar[str] = "op-fission"
    contract: ClassVar[Contract] = Equal()
    wanted: Callable[[fx.Node], bool] = all_of_them

    def __call__(self, program: Program, context: Context) -> Program:  # noqa: ARG002
        """The program with two calls in the place of one."""
        new, _ = copy_program(program)
        decisions = []
        for node in new.nodes:
            if node.target in MASKED:
                reason = self._refusal(node)
                decisions.append(
                    Decision(self.name, node.name, not reason, reason or _split(node, self.name), None, note(node).source)
                )
        return new.decided(*decisions)

    def _refusal(self, node: fx.Node) -> str:
        """Why a node stays whole, "" if it is to be split."""
        if not can_split(node):
            return f"the backward of {MASKED[node.target]} gives one kind of gradient only: nothing to split"
        return "" if self.wanted(node) else f"the backward of {MASKED[node.target]} was not asked for"


def can_split(node: fx.Node) -> bool:
    """Whether a node computes both the gradient of its input and one of a weight, each read by itself."""
    if node.target not in MASKED or any(user.target is not operator.getitem for user in node.users):
        return False
    read = {user.args[1] for user in node.users}
    return 0 in read and len(read) > 1


def _split(node: fx.Node, by: str) -> str:
    """Split one node; what was done, in words."""
    graph, mask = node.graph, mask_of(node)
    with graph.inserting_before(node):
        late = _masked(node, [False, *mask[1:]], f"{node.name}_weights", by)
        early = _masked(node, [mask[0], *(False for _ in mask[1:])], f"{node.name}_input", by)
    for user in list(node.users):
        user.replace_input_with(node, early if user.args[1] == 0 else late)
    graph.erase_node(node)
    return f"the backward of {MASKED[node.target]} split into {early.name} and {late.name}"


def mask_of(node: fx.Node) -> list[bool]:
    """The output mask of a node of ``MASKED``: its last argument."""
    return list(cast(Any, node.args[-1]))


def _masked(node: fx.Node, mask: list[bool], name: str, by: str) -> fx.Node:
    new = node.graph.create_node("call_function", node.target, (*node.args[:-1], mask), dict(node.kwargs), name)
    new.meta.update(node.meta)
    new.meta["val"] = tuple(value if wanted else None for value, wanted in zip(node.meta["val"], mask, strict=True))
    known, changes = note(node), {}
    for field in ("layouts", "shapes", "global_shapes"):
        entries = getattr(known, field)
        if entries is not None:
            changes[field] = tuple(entry if wanted else None for entry, wanted in zip(entries, mask, strict=True))
    annotate(new, added_by=by, **changes)
    return new
