"""Find repeated segments x[t+1] = f(x[t], u[t]) in a flat graph.

1. Every node gets a symbol (``symbols``).
2. A segment of period p that repeats is a run of positions i with symbol[i] = symbol[i + p]; all periods are compared at once each.
3. A run is a chain if, for some start, each argument is one of: made in the same step; made d steps before (a carry); the same in
   all steps; a different outside value in each step (a stream). The start with the most steps, then the fewest carries, wins, so
   that an irregular first or last step is peeled off.

The cost is linear in the nodes, but for the comparisons in (2), which are vectorised.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
import torch.fx as fx

from .symbols import Table, picks

aten = torch.ops.aten

MAX_PERIOD = 400
MAX_DISTANCE = 8
CANDIDATES = 24
"""Runs looked at for each chain that is found."""

TRIED_STEPS = 8
"""Steps on which starts are compared before one is checked in full."""

OPERANDS = frozenset((aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor, aten.div.Tensor))
"""Ops whose second argument may be an integer that moves from step to step."""

Slot = tuple[str, Any]
"""("in", offset), ("carry", (offset, distance)), ("same", node) or ("stream", index)."""


@dataclass
class Found:
    """A chain in a graph.

    nodes: of all steps, in order; period, count: nodes of a step, steps; slots: per node argument of a step, in order, where it
    comes from; streams: per stream its value in each step; inits: (offset, distance) -> the value before the first step; moving:
    offset of a node one of whose integers goes on by the same amount each step -> (its first value, the amount).
    """

    nodes: list[fx.Node]
    period: int
    count: int
    slots: list[Slot]
    streams: list[tuple[fx.Node, ...]]
    inits: dict[tuple[int, int], fx.Node]
    moving: dict[int, tuple[int, int]] = field(default_factory=dict)

    @property
    def carries(self) -> list[tuple[int, int]]:
        """(offset, distance) of every carry; one at distance d brings those nearer with it."""
        return sorted(self.inits)

    def renamed(self, names: Mapping[fx.Node, fx.Node]) -> Found:
        """The same chain once some of its inputs are made elsewhere."""
        return replace(
            self,
            slots=[(kind, names.get(where, where) if kind == "same" else where) for kind, where in self.slots],
            streams=[tuple(names.get(node, node) for node in column) for column in self.streams],
            inits={key: names.get(node, node) for key, node in self.inits.items()},
        )


@dataclass
class Refused:
    """A repeated segment that is no chain. node: its first; steps: how often it repeats."""

    node: fx.Node
    steps: int
    reason: str


def find_chains(graph: fx.Graph, shortest: int) -> tuple[list[Found], list[Refused]]:
    """All chains of at least ``shortest`` steps, none overlapping, in order of their last node, and what was refused."""
    outside = picks(graph)
    nodes = [n for n in graph.nodes if n.op == "call_function" and n not in outside]
    table = Table(nodes)
    found: list[Found] = []
    refused: list[Refused] = []
    while True:
        runs = _runs(table.symbols, shortest)
        chain: Found | None = None
        for start, length, period in runs[:CANDIDATES]:
            looked_at = _best_start(table, start, length, period, shortest)
            if isinstance(looked_at, Found):
                chain = looked_at
                break
            refused.append(Refused(nodes[start], length // period, looked_at))
        if chain is None:
            break
        found.append(chain)
        table.take(chain.nodes)
    taken = {node for chain in found for node in chain.nodes}
    refused = _distinct([r for r in refused if r.node not in taken])
    place = {node: i for i, node in enumerate(graph.nodes)}
    return sorted(found, key=lambda c: place[c.nodes[-1]]), refused


def _runs(symbols: np.ndarray, shortest: int) -> list[tuple[int, int, int]]:
    """(start, length, period) of every repeated segment, the ones that would save most nodes first."""
    total = len(symbols)
    found = []
    for period in range(1, min(MAX_PERIOD, total // shortest) + 1):
        same = symbols[:-period] == symbols[period:]
        if np.count_nonzero(same) < (shortest - 1) * period:
            continue
        edges = np.flatnonzero(np.diff(np.concatenate(([0], same.view(np.int8), [0]))))
        for start, stop in zip(edges[::2], edges[1::2], strict=True):
            length = int(stop - start) + period
            if length // period >= shortest:
                found.append((int(start), length, period))
    return sorted(found, key=lambda run: (run[2] - run[1], run[2], run[0]))


def _best_start(table: Table, start: int, length: int, period: int, shortest: int) -> Found | str:
    """The chain in a run, or why there is none."""
    reason = "its steps do not feed each other"
    tried: list[tuple[tuple[int, int, int], int]] = []
    for shift in range(min(2 * period, length - period * shortest + 1)):
        count = (length - shift) // period
        sample = _read(table, start + shift, period, min(count, TRIED_STEPS))
        if isinstance(sample, str):
            reason = sample
            continue
        tried.append(((-count, len(sample.inits), shift), shift))
    for _, shift in sorted(tried)[:4]:
        count = (length - shift) // period
        whole = _read(table, start + shift, period, count)
        if isinstance(whole, Found):
            return whole if _is_acyclic(whole) else "an input of a step depends on another step's result"
        reason = whole
    return reason


def _read(table: Table, start: int, period: int, count: int) -> Found | str:
    """The steps from ``start`` on as a chain, or why they are none."""
    nodes = table.nodes[start : start + period * count]
    for node in nodes[:period]:
        if torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ()):
            return f"a step draws random numbers ({node.target})"
    reader = _Reader(table, start, period, count)
    moving: dict[int, tuple[int, int]] = {}
    for offset in range(period):
        places = range(start + offset, start + period * count, period)
        if len({tuple(table.integers[place]) for place in places}) != 1:
            moved = _progression(nodes[offset], [table.integers[place] for place in places])
            if moved is None:
                return f"an integer of {nodes[offset].target} moves from step to step (index arithmetic)"
            moving[offset] = moved
        for position in range(len(table.arguments[start + offset])):
            problem = reader.argument(offset, [table.arguments[place][position] for place in places])
            if problem:
                return problem
    if not _feeds_itself(reader, [len(table.arguments[start + offset]) for offset in range(period)]):
        return "its steps do not feed each other"
    missing = [(o, d) for (o, far) in list(reader.inits) for d in range(1, far) if (o, d) not in reader.inits]
    if missing:
        return "a step reads a result of several steps before without those in between"
    return Found(nodes, period, count, reader.slots, list(reader.streams), reader.inits, moving)


def _progression(node: fx.Node, integers: Sequence[Sequence[int]]) -> tuple[int, int] | None:
    """(first value, amount) where the one integer of a node that moves is an operand or an index, and goes on evenly."""
    is_operand = node.target in OPERANDS and len(node.args) == 2 and type(node.args[1]) is int and not node.kwargs
    if not is_operand and node.target is not aten.select.int:
        return None
    *fixed, moved = zip(*integers, strict=True)
    step = moved[1] - moved[0]
    is_even = all(value == moved[0] + step * k for k, value in enumerate(moved))
    is_index = is_operand or min(moved) >= 0
    return (moved[0], step) if is_even and is_index and all(len(set(column)) == 1 for column in fixed) else None


class _Reader:
    """Sorts the arguments of a step, column by column over the steps."""

    def __init__(self, table: Table, start: int, period: int, count: int) -> None:
        self.place, self.start, self.period, self.count = table.place, start, period, count
        self.stop = start + period * count
        self.slots: list[Slot] = []
        self.streams: dict[tuple[fx.Node, ...], int] = {}
        self.inits: dict[tuple[int, int], fx.Node] = {}

    def argument(self, offset: int, column: Sequence[fx.Node]) -> str:
        """Read one argument of one node in every step; a problem, or ""."""
        inside = [self._within(node) for node in column]
        if all(place is None for place in inside):
            if all(node is column[0] for node in column):
                self.slots.append(("same", column[0]))
            else:
                self.slots.append(("stream", self.streams.setdefault(tuple(column), len(self.streams))))
            return ""
        last = inside[-1]
        if last is None:
            return "an argument comes from the steps and later from outside"
        relative = last - self.period * (self.count - 1)
        steps_back, source = divmod(relative, self.period)
        distance = -steps_back
        if distance > MAX_DISTANCE or (distance == 0 and source >= offset) or distance < 0:
            return f"a step reads what was made {distance} steps before"
        for k, place in enumerate(inside):
            if (place is None) != (k < distance) or (place is not None and place != relative + self.period * k):
                return "an argument comes from different places of a step, or its first values are made otherwise"
        if distance == 0:
            self.slots.append(("in", source))
            return ""
        for k in range(distance):
            known = self.inits.setdefault((source, distance - k), column[k])
            if known is not column[k]:
                return "one result starts from two different values"
        self.slots.append(("carry", (source, distance)))
        return ""

    def _within(self, node: fx.Node) -> int | None:
        place = self.place.get(node)
        return place - self.start if place is not None and self.start <= place < self.stop else None


def _feeds_itself(reader: _Reader, arities: Sequence[int]) -> bool:
    """Whether some carry depends on itself, through however many steps; one that is only passed on is no recurrence."""
    slots = iter(reader.slots)
    made: list[set[Any]] = []
    for arity in arities:
        sources = [next(slots) for _ in range(arity)]
        own = {where for kind, where in sources if kind == "carry"}
        made.append(own.union(*(made[where] for kind, where in sources if kind == "in")))
    needs = {(offset, d): made[offset] if d == 1 else {(offset, d - 1)} for offset, d in reader.inits}
    while needs:
        loose = [key for key, read in needs.items() if not read & needs.keys()]
        if not loose:
            return True
        for key in loose:
            del needs[key]
    return False


def _is_acyclic(chain: Found) -> bool:
    """Whether everything that goes in can be computed before the chain."""
    inside = set(chain.nodes)
    inputs = {node for column in chain.streams for node in column} | set(chain.inits.values())
    inputs |= {node for kind, node in chain.slots if kind == "same"}
    pending, seen = [n for n in inputs if n not in inside], set()
    while pending:
        node = pending.pop()
        if node in seen:
            continue
        seen.add(node)
        if node in inside:
            return False
        pending.extend(node.all_input_nodes)
    return True


def _distinct(refused: list[Refused]) -> list[Refused]:
    """One refusal a reason, the longest run first, so that a report stays short."""
    kept: dict[str, Refused] = {}
    for one in refused:
        if one.reason not in kept or kept[one.reason].steps < one.steps:
            kept[one.reason] = one
    return list(kept.values())
