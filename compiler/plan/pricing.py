"""What a rule costs a site, and what handing a value from one layout to another costs, given the choices on the other axes.

Costs are integers of ``UNIT`` seconds, so that equal blocks have equal tables and every rank finds the same plan.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch.fx as fx

from ...runtime.mesh import Mesh
from ..cost.cluster import Cluster
from ..cost.ops import LocalTensor, Work, is_transposed, work
from ..cost.transfer import TransferPrices
from ..layout import Layout, Partial, Placement, Replicate, Shard, local_shape
from ..rules.rule import Rule
from .elimination import INFINITE, Table
from .tactics import Move, Tactic
from .view import Site, TensorType, Value, View

UNIT = 1e-10
"""Seconds of one cost unit."""

AVOIDED = 10**12
"""Units charged for a move that a tactic does without: more than any real step, far from forbidden."""


class Rules(Protocol):
    """What the planner needs of the rule table."""

    def rules(self, node: fx.Node, parts: int) -> tuple[Rule, ...]:
        """Ways to run a node cut into ``parts`` along one axis, all-Replicate first."""
        ...

    def explain(self, node: fx.Node, parts: int) -> str:
        """Why a node has only the rule that leaves it whole; "" if it has others."""
        ...


Choice = tuple[Rule, ...]
"""One rule per mesh axis: how a site lies."""


def whole_rule(site: Site) -> Rule:
    """The rule that leaves a site uncut."""
    whole: Placement = Replicate()
    return Rule((whole,) * len(site.uses), tuple(None if v is None else whole for v in site.makes), "whole")


@dataclass(frozen=True, eq=False)
class Labels:
    """The labels of a site on one axis given the others.

    wants: per slot, makes: per output; one layout per label. Compared by identity.
    """

    rules: tuple[Rule, ...]
    costs: Table
    wants: tuple[tuple[Layout, ...], ...]
    makes: tuple[tuple[Layout, ...] | None, ...]


def input_layout(choice: Choice, slot: int) -> Layout:
    """Layout that a site wants in a slot."""
    return tuple(rule.inputs[slot] for rule in choice)


def output_layout(choice: Choice, output: int) -> Layout | None:
    """Layout that a site makes; None for what is no tensor."""
    layout = tuple(rule.outputs[output] for rule in choice)
    return None if any(p is None for p in layout) else layout  # type: ignore[return-value]


def fits(shape: Sequence[int], layout: Layout, mesh: Mesh) -> bool:
    """Whether several axes may lie on a tensor together: a dimension cut twice divides evenly, and partial reductions commute."""
    if len(layout) == 1:
        return True
    parts: dict[int, list[int]] = {}
    for placement, size in zip(layout, mesh.shape, strict=True):
        if isinstance(placement, Shard):
            parts.setdefault(placement.dim, []).append(size)
    if any(len(sizes) > 1 and shape[dim] % int(np.prod(sizes)) for dim, sizes in parts.items()):
        return False
    kinds = {"sum" if p.reduce_op == "avg" else p.reduce_op for p in layout if isinstance(p, Partial)}
    return len(kinds) <= 1


@dataclass(frozen=True)
class MemoryCharge:
    """Seconds charged per byte of the values that are held when most is (inputs, saved activations, gradients)."""

    per_byte: float = 0.0
    values: frozenset[int] = frozenset()


class Pricing:
    """Labels and prices on one mesh, shared by all axes and rounds."""

    def __init__(self, view: View, mesh: Mesh, cluster: Cluster, tactics: Sequence[Tactic], charge: MemoryCharge) -> None:
        self.view, self.mesh, self.cluster, self.tactics, self.charge = view, mesh, cluster, tactics, charge
        self.transfers = TransferPrices(mesh, cluster)
        self._labels: dict[object, Labels | None] = {}
        self._whole: dict[tuple[int, int], Rule] = {}
        self._moves: dict[object, int] = {}
        self._pieces: dict[tuple[TensorType, Layout], LocalTensor] = {}
        self._seconds: dict[tuple[int, ...], float] = {}

    def whole(self, site: Site) -> Rule:
        """The rule that leaves a site uncut: one object for equal sites."""
        key = (site.signature, len(site.uses))
        if key not in self._whole:
            self._whole[key] = whole_rule(site)
        return self._whole[key]

    def labels(self, site: Site, axis: int, candidates: tuple[Rule, ...], choice: Choice) -> Labels | None:
        """The candidates that go with the choice on the other axes; None when none does."""
        others = tuple(None if i == axis else id(rule) for i, rule in enumerate(choice))
        key = (site.signature, len(site.uses), axis, id(candidates), others, *(v in self.charge.values for v in site.makes))
        if key not in self._labels:
            self._labels[key] = self._make_labels(site, axis, candidates, choice)
        return self._labels[key]

    def _make_labels(self, site: Site, axis: int, candidates: tuple[Rule, ...], choice: Choice) -> Labels | None:
        values = self.view.values
        kept = []
        for rule in candidates:
            joint = (*choice[:axis], rule, *choice[axis + 1 :])
            wants = [input_layout(joint, slot) for slot in range(len(site.uses))]
            makes = [output_layout(joint, output) for output in range(len(site.makes))]
            tensors = [
                *zip(site.uses, wants, strict=True),
                *((v, m) for v, m in zip(site.makes, makes, strict=True) if v is not None),
            ]
            if all(m is not None and fits(values[v].type.shape, m, self.mesh) for v, m in tensors):
                kept.append((rule, wants, makes, joint))
        if not kept:
            return None
        return Labels(
            tuple(rule for rule, *_ in kept),
            np.array([round(self._charged_seconds(site, joint) / UNIT) for *_, joint in kept], dtype=np.int64),
            tuple(tuple(wants[slot] for _, wants, _, _ in kept) for slot in range(len(site.uses))),
            tuple(
                None if value is None else tuple(m for _, _, makes, _ in kept if (m := makes[output]) is not None)
                for output, value in enumerate(site.makes)
            ),
        )

    def _charged_seconds(self, site: Site, choice: Choice) -> float:
        """Time of an op, and what the bytes of its values are charged."""
        seconds = self.site_seconds(site, choice)
        for output, value in enumerate(site.makes):
            layout = output_layout(choice, output)
            if value in self.charge.values and value is not None and layout is not None:
                seconds += self.charge.per_byte * float(self._local(self.view.values[value].type, layout).nbytes)
        return seconds

    def site_seconds(self, site: Site, choice: Choice) -> float:
        """Predicted time of an op on its local shapes; ports take none."""
        if not site.is_op:
            return 0.0
        key = (site.signature, len(site.uses), *map(id, choice))  # rules live as long as the candidates do
        known = self._seconds.get(key)
        if known is None:
            known = self._seconds[key] = self._op_seconds(site, choice)
        return known

    def _op_seconds(self, site: Site, choice: Choice) -> float:
        done = self.site_work(site, choice)
        if done.is_view:
            return 0.0
        dtypes = [self.view.values[v].type.dtype for v in (*site.uses, *(v for v in site.makes if v is not None))]
        return self.cluster.op_seconds(float(done.flops), float(done.bytes_moved), dtypes[0]) if dtypes else 0.0

    def site_work(self, site: Site, choice: Choice) -> Work:
        """Flops and bytes of an op on its local shapes."""
        assert site.node is not None
        values = self.view.values
        inputs = [self._local(values[v].type, input_layout(choice, slot)) for slot, v in enumerate(site.uses)]
        outputs = [
            self._local(values[v].type, layout)
            for output, v in enumerate(site.makes)
            if v is not None and (layout := output_layout(choice, output)) is not None
        ]
        return work(site.node.target, inputs, outputs, transposed=is_transposed(site.node.target, site.node.args))

    def _local(self, tensor: TensorType, layout: Layout) -> LocalTensor:
        known = self._pieces.get((tensor, layout))
        if known is None:
            known = self._pieces[(tensor, layout)] = LocalTensor(local_shape(tensor.shape, layout, self.mesh), tensor.itemsize)
        return known

    def move(self, source: Layout, target: Layout, value: Value, *, to_port: bool) -> int:
        """Units of bringing a value from one layout to another, with the charge for moves that a tactic does without."""
        if source == target:
            return 0
        key = (source, target, value.type, value.from_input, to_port)
        known = self._moves.get(key)
        if known is None:
            known = self._moves[key] = self._move(source, target, value, to_port=to_port)
        return known

    def _move(self, source: Layout, target: Layout, value: Value, *, to_port: bool) -> int:
        transfer = self.transfers.price(source, target, value.type.shape, value.type.itemsize)
        if transfer is None:
            return INFINITE
        return round(transfer.seconds / UNIT) + AVOIDED * len(self.avoided(source, target, value, to_port=to_port))

    def avoided(self, source: Layout, target: Layout, value: Value, *, to_port: bool) -> list[Tactic]:
        """The tactics that do without this move."""
        rank = len(value.type.shape)
        return [
            tactic
            for tactic, a, b in zip(self.tactics, source, target, strict=True)
            if a != b and tactic.avoids(Move(a, b, rank, value.from_input, to_port))
        ]
