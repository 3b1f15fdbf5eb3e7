"""Calls whose sum has no fixed order of its own: run twice on the same arguments they may round differently.

    index_put(x, i, v, accumulate)[r]  =  x[r] + sum of v[k] over i[k] = r        in the order in which threads come by

On a CPU with several threads torch adds these atomically, so plain PyTorch is not equal to itself to the last bit there. With one
thread, or under ``torch.use_deterministic_algorithms(True)``, the order is that of k, and everything hocket promises to the last
bit holds again. Sums of this kind are of the class ``reordered_sum``: equal in the reals, and to rounding in floating point.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.fx as fx

from ..compiler.program import Decision, Program, note

aten = torch.ops.aten

_ACCUMULATE = {aten.index_put.default: 3, aten.put.default: 3, aten._unsafe_index_put.default: 3}
"""Op -> the position of its argument ``accumulate``."""


def has_no_order(node: fx.Node) -> bool:
    """Whether a call adds up floating-point numbers in no fixed order."""
    place = _ACCUMULATE.get(cast(Any, node.target))
    if place is None:
        return False
    adds = node.args[place] if len(node.args) > place else node.kwargs.get("accumulate", False)
    value = node.meta["val"]
    return bool(adds) and (value.is_floating_point() or value.is_complex())


def unordered_decisions(program: Program, by: str) -> list[Decision]:
    """A Decision for each such call: what it means for equality to the last bit, and what to do for it."""
    reason = (
        "reordered_sum: {name} ({op}) adds where indices repeat; on several CPU threads torch does so in no fixed order, and plain "
        "PyTorch differs from itself there. torch.use_deterministic_algorithms(True), or one thread, makes every bit the same"
    )
    return [
        Decision(by, node.name, applied=False, reason=reason.format(name=node.name, op=node.target), source=note(node).source)
        for node in program.nodes
        if node.op == "call_function" and has_no_order(node)
    ]
