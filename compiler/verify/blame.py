"""Where do two programs start to differ? The first node of the rewritten one whose value is not the original's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.fx as fx

from ...runtime.mesh import Mesh
from ..layout import assemble, format_layout
from ..program import Program, Role, note, tensor_leaves
from .lockstep import ONE_RANK, Values, layout_of, run_ranks

UNINITIALISED = ("empty", "new_empty", "empty_like", "empty_strided", "new_empty_strided", "empty_permuted")

SMALL = 1.0
"""Magnitude below which values are compared absolutely: what cancels to zero (the gradient of a key's bias) is all rounding."""


@dataclass(frozen=True)
class Divergence:
    """node: in the rewritten program; original: in the other one; layouts: of the node's tensor arguments and of its output, as
    text; error: largest difference relative to the largest element of the true value (inf where shapes differ)."""

    node: str
    original: str
    op: str
    layouts: tuple[str, ...]
    source: str
    error: float

    def __str__(self) -> str:
        *inputs, output = self.layouts
        return (
            f"{self.node} = {self.op} ({'; '.join(inputs) or 'no inputs'} -> {output}) is the first node whose value differs from "
            f"{self.original}: relative error {self.error:.3g} (from {self.source or 'unknown source'})"
        )


def blame(before: Program, after: Program, inputs: Mapping[Role, torch.Tensor], *, tolerance: float = 1e-9) -> Divergence | None:
    """Run both programs in float64 and compare node by node, in the order of the rewritten one; None when all values agree.

    Nodes are matched by ``Note.carries``, or ``Note.origin`` where that is empty; nodes that hold no whole value are skipped.
    """
    true = run_ranks(before, inputs, dtype=torch.float64, record=True, check_replicas=False)
    found = run_ranks(after, inputs, dtype=torch.float64, record=True, check_replicas=False)
    originals = {node.name: node for node in before.nodes}
    for node in after.nodes:
        original = originals.get(note(node).carries or note(node).origin)
        if original is None or node.op == "output" or _is_uninitialised(node):
            continue
        expected = _whole(original, true.values[original.name], before.mesh or ONE_RANK)
        actual = _whole(node, found.values[node.name], after.mesh or ONE_RANK)
        for index, (want, have) in enumerate(zip(expected, actual, strict=False)):
            error = relative_error(want, have)
            if error > tolerance:
                return _divergence(node, original, index, error, after.mesh or ONE_RANK)
    return None


def relative_error(expected: torch.Tensor | None, found: torch.Tensor | None) -> float:
    """Largest difference over the largest magnitude of ``expected``, or over SMALL where that is larger.

    NaN equals NaN and infinities equal themselves; inf where shapes or integers differ.
    """
    if expected is None or found is None:
        return 0.0
    if expected.shape != found.shape:
        return float("inf")
    if expected.numel() == 0 or torch.equal(expected, found):
        return 0.0
    if not (expected.is_floating_point() or expected.is_complex()):
        return float("inf")
    same = (expected == found) | (expected.isnan() & found.isnan())
    difference = torch.where(same, 0.0, (expected - found).abs())
    if not bool(difference.isfinite().all()):
        return float("inf")
    finite = expected.abs()[expected.abs().isfinite()]
    scale = float(finite.max()) if finite.numel() else 0.0
    return float(difference.max()) / max(scale, SMALL)


def _whole(node: fx.Node, values: Values, mesh: Mesh) -> list[torch.Tensor | None]:
    """Global value per output; None for what is no tensor or lies in no layout."""
    per_rank = [tensor_leaves(value) for value in values]
    result: list[torch.Tensor | None] = []
    for index, leaf in enumerate(per_rank[0]):
        layout = layout_of(node, mesh, index) if isinstance(leaf, torch.Tensor) else None
        result.append(None if layout is None else _assembled([leaves[index] for leaves in per_rank], layout, mesh))
    return result


def _assembled(pieces: list[torch.Tensor], layout: Any, mesh: Mesh) -> torch.Tensor | None:
    try:
        return assemble(pieces, layout, mesh)
    except RuntimeError:  # pieces that do not fit together differ from any true value
        return pieces[0].new_empty((0,) * (pieces[0].dim() + 1))


def _is_uninitialised(node: fx.Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.name.split("::")[-1] in UNINITIALISED


def _divergence(node: fx.Node, original: fx.Node, index: int, error: float, mesh: Mesh) -> Divergence:
    inputs = [m for m in node.all_input_nodes if isinstance(m.meta.get("val"), torch.Tensor)]
    layouts = [format_layout(layout_of(m, mesh)) for m in inputs] + [format_layout(layout_of(node, mesh, index))]
    return Divergence(node.name, original.name, str(node.target), tuple(layouts), note(node).source, error)
