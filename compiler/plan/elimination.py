"""Exact minimum of a sum of small tables by variable elimination (bucket elimination, Dechter 1999), sharing equal sub-problems.

    min over x of  f1(x1,x2) + f2(x2,x3) + ...   =   min over the rest of  (min over x2 of f1 + f2) + ...

Costs are integers. Each new table is normalised (its minimum is moved into a constant) and interned by its contents, and
eliminations are remembered by the tables they combine: a block that repeats thirty times is solved once, without tying the copies
together.

Where a combined table would grow beyond ``max_table`` entries its factors are split and minimised apart (mini-buckets, Dechter and
Rish 2003). That gives a valid lower bound; the labels decoded from it are then improved one at a time and the gap is reported.
"""

from __future__ import annotations

import heapq
import math
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Table = npt.NDArray[np.int64]

INFINITE = 1 << 57
"""A forbidden combination. Sums of up to 31 forbidden entries do not overflow; results are clipped to this value."""

SMALL, LARGE, LARGEST = 1 << 20, 1 << 23, 1 << 25
"""Entries of a table. Small ones give the same plan on nearly all programs in a quarter of the time."""

_ADDED_AT_ONCE = 31


class Infeasible(Exception):
    """No labels satisfy every table. variable: one whose labels are all forbidden; is_proven: False if none were found only."""

    def __init__(self, variable: int, *, is_proven: bool = True) -> None:
        super().__init__(f"variable {variable} has no label left")
        self.variable = variable
        self.is_proven = is_proven


@dataclass(frozen=True)
class Factor:
    """A table over one or two (or more) distinct variables; axis i of the table is variable i."""

    variables: tuple[int, ...]
    table: Table


@dataclass(frozen=True)
class Solution:
    """labels: one per variable; objective: their cost; lower_bound: no labels cost less; solved, reused: eliminations made and
    shared.
    """

    labels: list[int]
    objective: int
    lower_bound: int
    solved: int
    reused: int

    @property
    def is_exact(self) -> bool:
        """Whether the labels are proven optimal."""
        return self.objective == self.lower_bound


def minimise(domains: Sequence[int], factors: Sequence[Factor], *, max_table: int = LARGE) -> Solution:
    """Labels of least total cost; ties go to the label that comes first where elimination decides it. Raises Infeasible."""
    kept = _consistent_labels(domains, factors)
    store = _Store()
    elimination = _Elimination([len(labels) for labels in kept], store, max_table)
    for factor in factors:
        free = tuple(v for v in factor.variables if len(kept[v]) > 1)
        elimination.add(free, store.restricted(factor, kept))
    lower = elimination.run()
    chosen = elimination.decode()
    labels = [int(kept[i][label]) for i, label in enumerate(chosen)]
    objective = evaluate(labels, factors)
    if objective > lower:
        labels, objective = _improved(labels, kept, factors)
    if objective >= INFINITE:
        raise Infeasible(0, is_proven=False)
    return Solution(labels, objective, min(lower, objective), elimination.solved, elimination.reused)


def evaluate(labels: Sequence[int], factors: Sequence[Factor]) -> int:
    """Total cost of some labels."""
    return sum(int(f.table[tuple(labels[v] for v in f.variables)]) for f in factors)


def _consistent_labels(domains: Sequence[int], factors: Sequence[Factor]) -> list[npt.NDArray[np.intp]]:
    """Labels left after dropping those forbidden by a single table, until nothing changes (arc consistency, AC-3).

    Sets of labels are bit masks. Tables of three and more variables are left to elimination.
    """
    alive = [(1 << size) - 1 for size in domains]
    supports = _Supports()
    touching: list[list[int]] = [[] for _ in domains]
    pending = []
    for number, factor in enumerate(factors):
        if len(factor.variables) < 3 and supports.forbids(factor.table):
            pending.append(number)
            for variable in factor.variables:
                touching[variable].append(number)
    waiting = set(pending)
    while pending:
        number = pending.pop()
        waiting.discard(number)
        factor = factors[number]
        for axis, variable in enumerate(factor.variables):
            other = alive[factor.variables[1 - axis]] if len(factor.variables) == 2 else 1
            left = alive[variable] & supports.of(factor.table, axis, other)
            if left == alive[variable]:
                continue
            if not left:
                raise Infeasible(variable)
            alive[variable] = left
            fresh = [n for n in touching[variable] if n != number and n not in waiting]
            pending.extend(fresh)
            waiting.update(fresh)
    kept: dict[int, npt.NDArray[np.intp]] = {}
    for mask in set(alive):
        kept[mask] = np.array([i for i in range(mask.bit_length()) if mask >> i & 1], dtype=np.intp)
    return [kept[mask] for mask in alive]


class _Supports:
    """Which labels a table leaves, remembered by table and by the labels of its other variable."""

    def __init__(self) -> None:
        self._forbids: dict[int, bool] = {}
        self._masks: dict[tuple[int, int], list[int]] = {}
        self._known: dict[tuple[int, int, int], int] = {}

    def forbids(self, table: Table) -> bool:
        """Whether any entry is forbidden."""
        key = id(table)
        if key not in self._forbids:
            self._forbids[key] = bool((table >= INFINITE).any())
        return self._forbids[key]

    def of(self, table: Table, axis: int, other: int) -> int:
        """Mask of the labels along ``axis`` that go with some label in ``other``."""
        key = (id(table), axis, other)
        if key not in self._known:
            masks = self._masks.get(key[:2])
            if masks is None:
                allowed = table < INFINITE
                rows = allowed.reshape(len(allowed), -1) if axis == 0 else allowed.T
                masks = self._masks[key[:2]] = [sum(1 << int(i) for i in np.flatnonzero(row)) for row in rows]
            self._known[key] = sum(1 << label for label, mask in enumerate(masks) if mask & other)
        return self._known[key]


def _improved(labels: list[int], kept: Sequence[npt.NDArray[np.intp]], factors: Sequence[Factor]) -> tuple[list[int], int]:
    """Change one label at a time while that helps (iterated conditional modes)."""
    touching: list[list[Factor]] = [[] for _ in kept]
    for factor in factors:
        for variable in factor.variables:
            touching[variable].append(factor)
    changed = True
    while changed:
        changed = False
        for variable, choices in enumerate(kept):
            row = np.zeros(int(choices.max()) + 1, dtype=object)  # python integers: many forbidden entries may add up
            for factor in touching[variable]:
                index = tuple(slice(None) if v == variable else labels[v] for v in factor.variables)
                row += factor.table[index][: len(row)].astype(object)
            best = min(choices, key=lambda label: (row[label], label != labels[variable]))
            if row[best] < row[labels[variable]]:
                labels[variable] = int(best)
                changed = True
    return labels, evaluate(labels, factors)


class _Store:
    """Tables by contents: equal tables have equal numbers."""

    def __init__(self) -> None:
        self.tables: list[Table] = []
        self._numbers: dict[tuple[tuple[int, ...], int], list[int]] = {}
        self._restricted: dict[tuple[object, ...], int] = {}

    def intern(self, table: Table) -> int:
        """The number of a table."""
        table = np.ascontiguousarray(table)
        alike = self._numbers.setdefault((table.shape, zlib.crc32(table.data)), [])
        for number in alike:
            if np.array_equal(self.tables[number], table):
                return number
        alike.append(len(self.tables))
        self.tables.append(table)
        return alike[-1]

    def restricted(self, factor: Factor, kept: Sequence[npt.NDArray[np.intp]]) -> int:
        """The number of a factor's table on the labels that are left (equal ones are one array). Arrays must outlive this store."""
        shape = factor.table.shape
        whole = all(len(kept[v]) == size for v, size in zip(factor.variables, shape, strict=True))
        key: tuple[object, ...] = (id(factor.table),)
        if not whole:
            key += tuple(id(kept[v]) for v in factor.variables)
        number = self._restricted.get(key)
        if number is None:
            table = factor.table if whole else factor.table[np.ix_(*(kept[v] for v in factor.variables))]
            table = table.reshape([size for size in table.shape if size > 1])
            number = self._restricted[key] = self.intern(np.minimum(table, INFINITE))
        return number


_Scoped = tuple[tuple[int, ...], int]
"""Variables and the number of a table."""


class _Elimination:
    def __init__(self, domains: list[int], store: _Store, max_table: int) -> None:
        self.domains, self.store, self.max_table = domains, store, max_table
        self.solved = self.reused = 0
        self._factors: list[dict[int, _Scoped]] = [{} for _ in domains]
        self._neighbours: list[set[int]] = [set() for _ in domains]
        self._sizes = list(domains)  # of the table that eliminating a variable takes
        self._count = 0
        self._constant = 0
        self._buckets: list[tuple[int, list[_Scoped]]] = []
        self._known: dict[tuple[tuple[tuple[int, ...], int], ...], tuple[int, int]] = {}
        self._decoded: dict[tuple[tuple[int, ...], ...], int] = {}

    def add(self, variables: tuple[int, ...], number: int) -> None:
        """Add a table to the sum; a table over nothing is a constant."""
        if not variables:
            self._constant += int(self.store.tables[number].item())
            return
        scoped = (variables, number)
        for variable in variables:
            self._factors[variable][self._count] = scoped
            if len(variables) == 1:
                break
            neighbours = self._neighbours[variable]
            for other in variables:
                if other != variable and other not in neighbours:
                    neighbours.add(other)
                    self._sizes[variable] *= self.domains[other]
        self._count += 1

    def run(self) -> int:
        """Eliminate every variable, cheapest table first, and return the minimum (a lower bound of it if tables had to be
        split).
        """
        sizes = self._sizes
        queue = [(size, v) for v, size in enumerate(sizes) if self.domains[v] > 1]
        heapq.heapify(queue)
        done = [False] * len(self.domains)
        while queue:
            size, variable = heapq.heappop(queue)
            if done[variable]:
                continue
            if size != sizes[variable]:
                continue  # an entry for its present size is in the queue
            done[variable] = True
            scope = sorted(self._neighbours[variable])
            touched = [(neighbour, sizes[neighbour]) for neighbour in scope]
            self._eliminate(variable, scope)
            for neighbour, before in touched:
                if sizes[neighbour] != before:
                    heapq.heappush(queue, (sizes[neighbour], neighbour))
        return self._constant

    def _eliminate(self, variable: int, scope: list[int]) -> None:
        factors = self._factors
        bucket = list(factors[variable].values())
        for number, (variables, _) in list(factors[variable].items()):
            for other in variables:
                del factors[other][number]
        self._buckets.append((variable, bucket))
        if self._sizes[variable] > self.max_table:
            for neighbour in scope:  # some of them may lose each other
                scopes = (variables for variables, _ in factors[neighbour].values())
                self._neighbours[neighbour] = {v for variables in scopes for v in variables if v != neighbour}
                self._sizes[neighbour] = math.prod(self.domains[v] for v in (neighbour, *self._neighbours[neighbour]))
            for part in self._split(bucket):
                narrow = sorted({v for variables, _ in part for v in variables} - {variable})
                self.add(tuple(narrow), self._minimised(variable, narrow, part))
            return
        for neighbour in scope:
            self._neighbours[neighbour].discard(variable)
            self._sizes[neighbour] //= self.domains[variable]
        self.add(tuple(scope), self._minimised(variable, scope, bucket))

    def _split(self, bucket: list[_Scoped]) -> list[list[_Scoped]]:
        """Groups of factors whose joint tables are small enough, widest factors first."""
        parts: list[tuple[set[int], list[_Scoped]]] = []
        for variables, number in sorted(bucket, key=lambda f: -len(f[0])):
            for scope, part in parts:
                union = scope | set(variables)
                if math.prod([self.domains[v] for v in union]) <= self.max_table:
                    scope.update(variables)
                    part.append((variables, number))
                    break
            else:
                parts.append((set(variables), [(variables, number)]))
        return [part for _, part in parts]

    def _minimised(self, variable: int, scope: list[int], part: list[_Scoped]) -> int:
        """Number of the normalised table  min over variable of the sum of the part; its minimum goes to the constant."""
        axis = {v: i for i, v in enumerate(scope, 1)}
        axis[variable] = 0
        placed = sorted([(tuple([axis[v] for v in variables]), number) for variables, number in part])
        key = tuple(placed)  # the tables have every size
        known = self._known.get(key)
        if known is None:
            self.solved += 1
            total = np.zeros([self.domains[v] for v in (variable, *scope)], dtype=np.int64)
            for count, (axes, number) in enumerate(placed, 1):
                total += _spread(self.store.tables[number], axes, total.ndim)
                if count % (_ADDED_AT_ONCE - 1) == 0:
                    np.minimum(total, INFINITE, out=total)
            least = np.minimum(total.min(0), INFINITE)
            offset = int(least.min())
            if offset >= INFINITE:
                raise Infeasible(variable)
            known = (self.store.intern(np.where(least >= INFINITE, INFINITE, least - offset)), offset)
            self._known[key] = known
        else:
            self.reused += 1
        number, offset = known
        self._constant += offset
        return number

    def decode(self) -> list[int]:
        """Labels by going back through the eliminations: each variable's best given those eliminated after it."""
        labels = [0] * len(self.domains)
        for variable, bucket in reversed(self._buckets):
            key = tuple([(n, *[-1 if v == variable else labels[v] for v in variables]) for variables, n in bucket])
            label = self._decoded.get(key)
            if label is None:
                row = np.zeros(self.domains[variable], dtype=np.int64)
                for number, *chosen in key:
                    row += self.store.tables[number][tuple([slice(None) if at < 0 else at for at in chosen])]
                    np.minimum(row, INFINITE, out=row)
                label = self._decoded[key] = int(row.argmin())
            labels[variable] = label
        return labels


def _spread(table: Table, axes: tuple[int, ...], rank: int) -> Table:
    """A view of the table in which its axes stand at ``axes`` of a tensor of ``rank`` dimensions."""
    order = sorted(range(len(axes)), key=axes.__getitem__)
    shape = [1] * rank
    for position in order:
        shape[axes[position]] = table.shape[position]
    return table.transpose(order).reshape(shape)
