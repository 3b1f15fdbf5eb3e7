"""Order the calls of a lowered program so that collectives travel while independent work is done.

    t(order) = compute + exposed waits;   any topological order computes the same values

A list scheduler (Graham 1969; critical path first: Hu 1961) over the data dependences. A collective is issued as soon as its
operand is there; a wait comes when something needs it and nothing else is left to do, so deferred work, such as the gradients of
weights that only the optimizer reads, fills the time in between. Memory is bounded: where the schedule would hold more than
``memory`` times what the given order holds, it falls back to that order step by step.

What may not be moved is chained: random draws, messages between two ranks, the collectives of one axis, and the forward of a
program whose backward is a call of its own.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
import torch.fx as fx

from ..compiler.contract import Context, Contract, Equal
from ..compiler.program import Decision, Phase, Program, RoleKind, copy_program, note
from .remembered import Remembered
from .timeline import WAIT, Timeline, Timing, axis_of, is_collective


@dataclass(frozen=True)
class OverlapOrder:
    """Issue collectives early, wait late, fill the time with what is ready.

    memory: most bytes of values held at once, as a multiple of what the given order holds; least_gain: predicted part of the step
    below which the order is left alone; contention: see ``Timeline``.
    """

    name: ClassVar[str] = "overlap-order"
    contract: ClassVar[Contract] = Equal()
    memory: float = 1.1
    least_gain: float = 0.01
    contention: float = 0.0
    known: Remembered[tuple[str, ...]] = field(default_factory=Remembered, compare=False, repr=False)

    def __call__(self, program: Program, context: Context) -> Program:
        """The program in its new order, with one decision a collective: how much of it was and is exposed."""
        if program.mesh is None or not any(is_collective(n) for n in program.nodes):
            return program.decided(Decision(self.name, "", applied=False, reason="the program has no collectives to overlap"))
        timeline = Timeline(program, context.cluster, self.contention)
        given = _forward_first(program)
        by_name = {node.name: node for node in given}
        names = self.known.choose(program, lambda: tuple(n.name for n in self._chosen(timeline, given)))
        order = [by_name[name] for name in names]
        before, after = timeline.run(given), timeline.run(order)
        new = program if order == given else _reordered(program, order)
        return new.decided(*self._decisions(given, before, after, moved=order != given))

    def _chosen(self, timeline: Timeline, given: list[fx.Node]) -> list[fx.Node]:
        """The quicker of the given order and the scheduled ones."""
        before = timeline.run(given)
        budget = int(before.peak_bytes * self.memory)
        best, best_seconds = given, before.seconds * (1 - self.least_gain)
        for critical_first in (True, False):
            order = _Scheduler(timeline, given, budget, critical_first=critical_first).order()
            found = timeline.run(order)
            if found.seconds < best_seconds and found.peak_bytes <= budget:
                best, best_seconds = order, found.seconds
        return best

    def _decisions(self, given: Sequence[fx.Node], before: Timing, after: Timing, *, moved: bool) -> list[Decision]:
        found = []
        for node in given:
            if not is_collective(node):
                continue
            was, now = before.exposed[node.name], after.exposed[node.name]
            reason = f"{was * 1e6:.0f} us of it were exposed, {now * 1e6:.0f} us are"
            if not moved:
                reason = f"kept in its place, {was * 1e6:.0f} us of it are exposed: no order within the memory budget is quicker"
            found.append(Decision(self.name, node.name, moved and now < was, reason, was - now, note(node).source))
        if moved:
            reason = (
                f"predicted {before.seconds * 1e3:.3f} ms -> {after.seconds * 1e3:.3f} ms, "
                f"values held {before.peak_bytes} -> {after.peak_bytes} bytes"
            )
            found.append(Decision(self.name, "", applied=True, reason=reason, gain=before.seconds - after.seconds))
        return found


class _Scheduler:
    """One pass of list scheduling. critical_first: rank ready calls by the longest way to the end, else by the given order."""

    def __init__(self, timeline: Timeline, given: list[fx.Node], budget: int, *, critical_first: bool) -> None:
        self.timeline, self.given, self.budget = timeline, given, budget
        self.position = {node: i for i, node in enumerate(given)}
        self.before = {node: {n for n in node.all_input_nodes if n in self.position} for node in given}
        _chain(self.before, given, timeline.program)
        self.after: dict[fx.Node, list[fx.Node]] = {node: [] for node in given}
        for node, sources in self.before.items():
            for source in sources:
                self.after[source].append(node)
        self.rank = {node: -way for node, way in self._ways().items()} if critical_first else dict(self.position)

    def _ways(self) -> dict[fx.Node, float]:
        """Seconds from the start of a node to the end of the program along its longest path, travel included."""
        ways: dict[fx.Node, float] = {}
        for node in reversed(self.given):
            own = self.timeline.compute[node] + self.timeline.wire.get(node, 0.0)
            ways[node] = own + max((ways[user] for user in self.after[node]), default=0.0)
        return ways

    def order(self) -> list[fx.Node]:
        """Repeatedly: issue what can travel; else compute what is ready; else stand still for the first arrival."""
        timeline = self.timeline
        missing = {node: len(sources) for node, sources in self.before.items()}
        ready: list[tuple[float, int, fx.Node]] = []
        waiting: list[tuple[float, int, fx.Node]] = []
        arrival: dict[fx.Node, float] = {}
        link: dict[str, float] = {}
        left = timeline.readers(self.given)
        clock, held = 0.0, 0
        done: list[fx.Node] = []

        def release(node: fx.Node) -> None:
            if node.target is WAIT and node.all_input_nodes[0] in arrival:
                heapq.heappush(waiting, (arrival[node.all_input_nodes[0]], self.position[node], node))
            else:
                heapq.heappush(ready, (-1e30 if is_collective(node) else self.rank[node], self.position[node], node))

        for node in self.given:
            if not missing[node]:
                release(node)
        while ready or waiting:
            if waiting and (waiting[0][0] <= clock or not ready):
                when, _, node = heapq.heappop(waiting)
                clock = max(clock, when)
            else:
                node = self._next(ready, held)
            clock += timeline.compute[node]
            if node in timeline.wire:
                axis = axis_of(node)
                link[axis] = arrival[node] = max(clock, link.get(axis, 0.0)) + timeline.wire[node]
            held += timeline.size[node] - timeline.freed(node, left)
            done.append(node)
            for user in self.after[node]:
                missing[user] -= 1
                if not missing[user]:
                    release(user)
        return done

    def _next(self, ready: list[tuple[float, int, fx.Node]], held: int) -> fx.Node:
        """The best ready node; the one that the given order has first where the best does not fit into memory."""
        if held + self.timeline.size[ready[0][2]] <= self.budget:
            return heapq.heappop(ready)[2]
        first = min(ready, key=lambda entry: entry[1])
        ready.remove(first)
        heapq.heapify(ready)
        return first[2]


def _chain(before: dict[fx.Node, set[fx.Node]], given: Sequence[fx.Node], program: Program) -> None:
    """Add the dependences that are not in the data."""
    last: dict[str, fx.Node] = {}
    for node in given:
        for key in _chains(node):
            if key in last:
                before[node].add(last[key])
            last[key] = node
    late = _late(program)
    if late and not late.issuperset(given):
        ends = [n for n in given if n not in late and all(user in late or user.op == "output" for user in n.users)]
        for node in late:
            if not before[node] & late:
                before[node].update(ends)


def _late(program: Program) -> set[fx.Node]:
    """The calls of the second segment: what the tangents reach, and what is not of the forward. Empty for a program in one call."""
    tainted = {program.placeholders[i] for i in program.signature.inputs_of(RoleKind.TANGENT).values()}
    late: set[fx.Node] = set()
    for node in program.nodes if tainted else ():
        if node.op != "call_function":
            continue
        if note(node).phase is not Phase.FORWARD or any(source in tainted or source in late for source in node.all_input_nodes):
            late.add(node)
    return late


def _forward_first(program: Program) -> list[fx.Node]:
    """The calls in the order in which they run: a program with tangents runs in two calls, and nothing of the second comes before
    the end of the first."""
    late = _late(program)
    calls = [node for node in program.nodes if node.op == "call_function"]
    return [*(node for node in calls if node not in late), *(node for node in calls if node in late)]


def _chains(node: fx.Node) -> list[str]:
    """Names of the chains that a node belongs to."""
    if torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ()):
        return ["random"]
    return [f"link {axis_of(node)}"] if is_collective(node) else []


def _reordered(program: Program, order: Sequence[fx.Node]) -> Program:
    """The same nodes in another order."""
    new, mapping = copy_program(program)
    anchor = next(iter(new.graph.graph.nodes))
    placeholders = new.placeholders
    if placeholders:
        anchor = placeholders[-1]
    for old in order:
        if anchor.op == "placeholder" or anchor is not mapping[old]:
            anchor.append(mapping[old])
        anchor = mapping[old]
    new.graph.graph.lint()
    return new
