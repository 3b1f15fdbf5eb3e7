"""The facts of a compiled program as plain rows (JSON-ready): everything that tables, ``--json`` and tests show."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
import torch.fx as fx

from ..layout import Layout, format_layout
from ..plan.plan import Plan
from ..program import Decision, Phase, Program, RoleKind, note, tensor_leaves
from ..redistribute import StepKind

_NUMBER = re.compile(r"(?<=\.)\d+(?=\.|$)|^\d+(?=\.)")


def pattern(name: str) -> str:
    """``layers.3.attention.q`` -> ``layers.*.attention.q``: the copies of a repeated block share one row."""
    return _NUMBER.sub("*", name)


@dataclass
class Group:
    """Tensors of one pattern that lie alike."""

    name: str
    kind: str
    shape: tuple[int, ...]
    layout: str
    why: str
    count: int = 1

    def row(self) -> dict[str, object]:
        """As a JSON row."""
        return {
            "name": self.name,
            "kind": self.kind,
            "shape": list(self.shape),
            "layout": self.layout,
            "count": self.count,
            "why": self.why,
        }


def parameter_groups(program: Program, plan: Plan) -> list[Group]:
    """Parameters and buffers, one group a (pattern, shape, layout)."""
    reasons = {d.node: d.reason for d in plan.decisions}
    found = []
    for node, role in zip(program.placeholders, program.signature.inputs, strict=True):
        if role.kind in (RoleKind.PARAM, RoleKind.BUFFER, RoleKind.INPUT):
            layout = plan.nodes[node.name].outputs[0]
            _, _, why = reasons.get(node.name, "").partition(", ")  # the part before it names the tensor and its layout
            found.append(Group(pattern(role.name), str(role.kind), _shape(node), format_layout(layout), why))
    return list(_merged(found))


def activation_groups(program: Program, plan: Plan) -> list[Group]:
    """What each submodule hands on in the forward: its last tensor, one group a (pattern, shape, layout)."""
    last: dict[str, fx.Node] = {}
    for node in program.nodes:
        seen = note(node)
        if node.op == "call_function" and seen.phase is Phase.FORWARD and seen.module and _layout(node, plan) is not None:
            last[seen.module] = node
    found = [
        Group(pattern(module), "activation", _shape(node), format_layout(_layout(node, plan)), ", ".join(_origins(node, plan)))
        for module, node in last.items()
    ]
    return list(_merged(found))


def collective_rows(records: Iterable[Decision]) -> list[dict[str, object]]:
    """Collectives that sharding inserted, from its decisions: kind, how many, why."""
    counts: dict[str, int] = {}
    kinds = {str(kind) for kind in StepKind}
    for decision in records:
        kind = next((k for k in sorted(kinds) if decision.applied and k in decision.reason), "")
        if kind:
            counts[kind] = counts.get(kind, 0) + 1
    return [{"kind": kind, "count": count} for kind, count in sorted(counts.items())]


def decision_row(decision: Decision) -> dict[str, object]:
    """As a JSON row."""
    return {
        "by": decision.by,
        "node": decision.node,
        "applied": decision.applied,
        "reason": decision.reason,
        "gain_s": decision.gain,
        "source": decision.source,
    }


def _merged(groups: Iterable[Group]) -> Iterator[Group]:
    merged: dict[tuple[str, str, tuple[int, ...], str], Group] = {}
    for group in groups:
        key = (group.name, group.kind, group.shape, group.layout)
        if key in merged:
            merged[key].count += 1
        else:
            merged[key] = group
    yield from merged.values()


def _shape(node: fx.Node) -> tuple[int, ...]:
    value = next((v for v in tensor_leaves(node.meta.get("val")) if isinstance(v, torch.Tensor)), None)
    return () if value is None else tuple(value.shape)


def _layout(node: fx.Node, plan: Plan) -> Layout | None:
    chosen = plan.nodes.get(node.name)
    return None if chosen is None else next((layout for layout in chosen.outputs if layout is not None), None)


def _origins(node: fx.Node, plan: Plan) -> tuple[str, ...]:
    return plan.nodes[node.name].rules
