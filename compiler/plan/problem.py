"""One axis of a plan as a sum of small tables: a variable per site, a table per op (compute) and per value (redistribution).

The choices on the other axes are given, so that every price is that of whole layouts. A value that several sites use is
redistributed once per distinct layout, however many want it. That is exact: such a value gets a variable of its own whose labels
are the sets of layouts made of it; its maker pays for the set, and each user needs its layout to be in the set.

Prices are those of ``pricing``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..layout import Layout
from ..rules.rule import Rule
from .elimination import INFINITE, Factor, Table
from .pricing import Labels, Pricing
from .view import Value

MAX_SETS = 256
"""Most sets of layouts of one value that are looked at."""


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
