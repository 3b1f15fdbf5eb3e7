"""One axis of a plan as a sum of small tables: a variable per site, a table per op (compute) and per value (redistribution).

The choices on the other axes are given, so that every price is that of whole layouts. A value that several sites use is
redistributed once per distinct layout, however many want it. That is exact: such a value gets a variable of its own whose labels
are the sets of layouts made of it; its maker pays for the set, and each user needs its layout to be in the set.

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
from .elimination import INFINITE, Factor, Table
from .tactics import Move, Tactic
from .view import Site, TensorType, Value, View

UNIT = 1e-10
"""Seconds of one cost unit."""

AVOIDED = 10**12
"""Units charged for a move that a tactic does without: more than any real step, far from forbidden."""

MAX_SETS = 256
"""Most sets of layouts of one value that are looked at."""


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


@dataclass
class AxisProblem:
    """The tables of one axis. domains and factors are for ``elimination.minimise``; the first variables are the sites.

    is_exact: False where a value had so many layouts in use that not all their sets could be looked at.
    """

    labels: list[Labels]
    domains: list[int]
    factors: list[Factor]
    is_exact: bool = True

    def chosen(self, solution: Sequence[int]) -> list[Rule]:
        """The rule of every site."""
        return [labels.rules[label] for labels, label in zip(self.labels, solution, strict=False)]


class ProblemBuilder:
    """Builds the tables of one axis; tables of equal neighbourhoods are made once and shared."""

    def __init__(self, pricing: Pricing) -> None:
        self.pricing = pricing
        self._direct: dict[object, Table] = {}
        self._shared: dict[object, tuple[Table, list[Table], bool]] = {}

    def build(self, labels: list[Labels]) -> AxisProblem:
        """The tables for the given labels of every site."""
        view = self.pricing.view
        problem = AxisProblem(labels, [len(site_labels.rules) for site_labels in labels], [])
        problem.factors = [Factor((i,), site_labels.costs) for i, site_labels in enumerate(labels) if site_labels.costs.any()]
        for value in view.values:
            maker, output = value.maker
            slots_of: dict[int, list[int]] = {}
            for user, slot in value.uses:
                slots_of.setdefault(user, []).append(slot)
            users = [(user, tuple(slots)) for user, slots in slots_of.items()]
            to_port = any(not view.sites[user].is_op for user, _ in users)
            for group in self._sharing_groups(labels, users):
                self._add(problem, (maker, output), group, value, to_port=to_port)
        return problem

    @staticmethod
    def _sharing_groups(labels: list[Labels], users: list[tuple[int, tuple[int, ...]]]) -> list[list[tuple[int, tuple[int, ...]]]]:
        """Users that may want the same layout, and so may share a redistribution, together."""
        if len(users) == 1:
            return [users]
        groups: list[tuple[set[Layout], list[tuple[int, tuple[int, ...]]]]] = []
        for user, slots in users:
            wanted = {layout for slot in slots for layout in labels[user].wants[slot]}
            members = [(user, slots)]
            apart = []
            for group_wanted, group in groups:
                if group_wanted & wanted:
                    wanted |= group_wanted
                    members = group + members
                else:
                    apart.append((group_wanted, group))
            groups = [*apart, (wanted, members)]
        return [sorted(group) for _, group in groups]

    def _add(
        self,
        problem: AxisProblem,
        source: tuple[int, int],
        users: list[tuple[int, tuple[int, ...]]],
        value: Value,
        *,
        to_port: bool,
    ) -> None:
        (maker, output), labels = source, problem.labels
        key = (
            id(labels[maker]),
            output,
            tuple((id(labels[user]), slots) for user, slots in users),
            value.from_input,
            to_port,
            users[0][0] == maker,
        )
        if len(users) == 1:
            user, slots = users[0]
            if key not in self._direct:
                self._direct[key] = self._direct_table(labels[maker], output, labels[user], slots, value, to_port=to_port)
            problem.factors.append(_pair(maker, user, self._direct[key]))
            return
        if key not in self._shared:
            self._shared[key] = self._shared_tables(
                labels[maker], output, [(labels[u], s) for u, s in users], value, to_port=to_port
            )
        paid, needed, exact = self._shared[key]
        if paid.any() or any(table.any() for table in needed):
            variable = len(problem.domains)
            problem.domains.append(paid.shape[1])
            problem.factors.append(Factor((maker, variable), paid))
            problem.factors.extend(Factor((variable, user), table) for (user, _), table in zip(users, needed, strict=True))
        problem.is_exact &= exact

    def _direct_table(
        self, maker: Labels, output: int, user: Labels, slots: tuple[int, ...], value: Value, *, to_port: bool
    ) -> Table:
        made = maker.makes[output]
        assert made is not None
        needs = _needs(user, slots)
        known: dict[tuple[Layout, frozenset[Layout]], int] = {}
        table = np.empty((len(made), len(needs)), dtype=np.int64)
        for i, source in enumerate(made):
            for j, need in enumerate(needs):
                if (source, need) not in known:
                    known[(source, need)] = self._paid(source, need, value, to_port=to_port)
                table[i, j] = known[(source, need)]
        return table

    def _shared_tables(
        self, maker: Labels, output: int, users: list[tuple[Labels, tuple[int, ...]]], value: Value, *, to_port: bool
    ) -> tuple[Table, list[Table], bool]:
        made = maker.makes[output]
        assert made is not None
        needs = [_needs(user, slots) for user, slots in users]
        wanted_by_any = dict.fromkeys(layout for need in needs for layouts in need for layout in layouts)
        reachable = {t for t in wanted_by_any if any(self.pricing.move(s, t, value, to_port=to_port) < INFINITE for s in set(made))}
        sets: dict[frozenset[Layout], None] = {frozenset(): None}
        for need in needs:
            possible = [wanted for wanted in dict.fromkeys(need) if wanted <= reachable]
            sets = dict.fromkeys(known | wanted for known in sets for wanted in possible)
        exact = len(sets) <= MAX_SETS
        kept = list(sets) if exact else sorted(sets, key=len)[:MAX_SETS]
        paid = np.array(
            [[self._paid(source, layouts, value, to_port=to_port) for layouts in kept] for source in made], dtype=np.int64
        )
        tables = []
        for need in needs:
            columns = {wanted: [0 if wanted <= layouts else INFINITE for layouts in kept] for wanted in dict.fromkeys(need)}
            tables.append(np.array([columns[wanted] for wanted in need], dtype=np.int64).T.copy())
        return paid, tables, exact

    def _paid(self, source: Layout, targets: frozenset[Layout], value: Value, *, to_port: bool) -> int:
        return min(INFINITE, sum(self.pricing.move(source, target, value, to_port=to_port) for target in targets))


def _needs(user: Labels, slots: tuple[int, ...]) -> list[frozenset[Layout]]:
    """Per label of a user, the layouts of one value that it wants."""
    return [frozenset(user.wants[slot][i] for slot in slots) for i in range(len(user.rules))]


def _pair(maker: int, user: int, table: Table) -> Factor:
    """A table between two sites; over one where a site uses its own value (an updated buffer that passes through unchanged)."""
    if maker == user:
        return Factor((maker,), np.ascontiguousarray(np.diagonal(table)))
    return Factor((maker, user), table)
