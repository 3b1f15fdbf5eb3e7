"""Cut a chain in time: n segments, all at once, and n sweeps that hand their ends on (time-parallel integration, Lions, Maday and
Turinici 2001; block Jacobi of Song et al., ICML 2021, arXiv 2002.03629).

    x[t] for t = s L .. (s + 1) L - 1  is segment s;  the n segments are rows of one chain of L steps
    sweep 1:   chain(starts = init, 0, .., 0)
    sweep k:   resume(starts = init, ends of the segments before)           exact on the first k segments, from any start

After as many sweeps as segments the result is the loop's own, whatever the chain does; where it forgets its start, each sweep but
the first does only the steps that it takes to forget. The segments lie along a dimension of their own, so planning cuts them over
the ranks like any batch: a sweep then costs every rank one message, its end to the others, and the number of sweeps is the same
constant on all of them. Nothing is to be agreed on while it runs, and nobody can wait for a message that is never sent.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import cast

import torch
import torch.fx as fx

from ...compiler.chains.bodies import BodyGraph, How, chain_op, resume_op
from ...compiler.program import output_node
from .batch import Inserter
from .lanes import lane_body
from .split import Split

aten = torch.ops.aten


@dataclass(frozen=True)
class Segments:
    """The rewrite of one chain node. body: one whose rows are independent; count: its steps; parts: the segments; has_rows: whether
    the chain itself has these rows, or each segment is to be one row."""

    body: BodyGraph
    count: int
    parts: int
    inserter: Inserter
    has_rows: bool = True

    @property
    def length(self) -> int:
        """Steps of a segment; the last one may be shorter, and is filled up with copies of the last step's inputs."""
        return -(-self.count // self.parts)

    def write(self, node: fx.Node, how: How) -> dict[int, fx.Node]:
        """Write the sweeps behind ``node``'s inputs. Returns, for each result of the node, what stands for it."""
        call = self.inserter.call
        init, shared, streams = cast(tuple[list[fx.Node], ...], node.args[:3])
        if not self.has_rows:
            init = [call(aten.unsqueeze.default, first, 0) for first in init]
            streams = [call(aten.unsqueeze.default, stream, 1) for stream in streams]
        body = with_states(self.body)
        text = body.data().to_json()
        cut = [self._cut(stream) for stream in streams]
        starts = [self._first_starts(first) for first in init]
        sweep = call(chain_op(), starts, shared, cut, self.length, text, how.to_json())
        carries, emits = len(starts), len(body.emits)
        for _ in range(1, self.parts):
            ends = [call(operator.getitem, sweep, i) for i in range(carries)]
            known = [call(operator.getitem, sweep, carries + i) for i in range(emits)]
            starts = [self._handed_on(first, end) for first, end in zip(init, ends, strict=True)]
            sweep = call(resume_op(), starts, shared, [*cut, *known], self.length, text, how.to_json())
        return self._results(sweep, body)

    def _results(self, sweep: fx.Node, body: BodyGraph) -> dict[int, fx.Node]:
        call, carries = self.inserter.call, self.body.carries
        found: dict[int, fx.Node] = {}
        for i in range(len(self.body.emits)):
            found[carries + i] = self._joined(call(operator.getitem, sweep, carries + i))
        for i, after in enumerate(body.following):
            if self.length * self.parts == self.count:
                ends = self._apart(call(operator.getitem, sweep, i), 0)
                found[i] = call(aten.select.int, ends, 0, self.parts - 1)
            else:  # the last segment goes on beyond the last step
                place = carries + body.emits.index(after)
                states = found.get(place) or self._joined(call(operator.getitem, sweep, place))
                found[i] = call(aten.select.int, states, 0, self.count - 1)
        if self.has_rows:
            return found
        return {i: call(aten.squeeze.dim, value, 0 if i < carries else 1) for i, value in found.items()}

    def _first_starts(self, first: fx.Node) -> fx.Node:
        """[n rows, ...]: the start of the chain, and zeros."""
        call, sizes = self.inserter.call, list(first.meta["val"].shape)
        ahead = call(aten.unsqueeze.default, first, 0)
        rest = call(aten.new_zeros.default, first, [self.parts - 1, *sizes])
        return self._together(call(aten.cat.default, [ahead, rest]), 0)

    def _handed_on(self, first: fx.Node, ends: fx.Node) -> fx.Node:
        """[n rows, ...]: the start of the chain, and the end of each segment but the last."""
        call = self.inserter.call
        ahead = call(aten.unsqueeze.default, first, 0)
        before = call(aten.slice.Tensor, self._apart(ends, 0), 0, 0, self.parts - 1)
        return self._together(call(aten.cat.default, [ahead, before]), 0)

    def _cut(self, stream: fx.Node) -> fx.Node:
        """[T, rows, ...] -> [L, n rows, ...]."""
        call, sizes = self.inserter.call, list(stream.meta["val"].shape[1:])
        missing = self.length * self.parts - self.count
        if missing:
            last = call(aten.slice.Tensor, stream, 0, self.count - 1, self.count)
            stream = call(aten.cat.default, [stream, call(aten.expand.default, last, [missing, *sizes])])
        apart = call(aten.reshape.default, stream, [self.parts, self.length, *sizes])
        return self._together(call(aten.transpose.int, apart, 0, 1), 1)

    def _joined(self, by_segment: fx.Node) -> fx.Node:
        """[L, n rows, ...] -> [T, rows, ...]."""
        call = self.inserter.call
        ordered = call(aten.transpose.int, self._apart(by_segment, 1), 0, 1)
        sizes = list(ordered.meta["val"].shape)
        whole = call(aten.reshape.default, ordered, [sizes[0] * sizes[1], *sizes[2:]])
        return whole if sizes[0] * sizes[1] == self.count else call(aten.slice.Tensor, whole, 0, 0, self.count)

    def _together(self, value: fx.Node, dim: int) -> fx.Node:
        """Dimensions dim and dim + 1 as one."""
        sizes = list(value.meta["val"].shape)
        return self.inserter.call(aten.reshape.default, value, [*sizes[:dim], sizes[dim] * sizes[dim + 1], *sizes[dim + 2 :]])

    def _apart(self, value: fx.Node, dim: int) -> fx.Node:
        """Dimension dim as (segments, rows)."""
        sizes = list(value.meta["val"].shape)
        return self.inserter.call(
            aten.reshape.default, value, [*sizes[:dim], self.parts, sizes[dim] // self.parts, *sizes[dim + 1 :]]
        )


def with_states(body: BodyGraph) -> BodyGraph:
    """The same body, giving out all its next carries as well."""
    found = body.copy()
    after, emits = found.following, found.emits
    missing = [state for state in dict.fromkeys(after) if state not in emits]
    output_node(found.graph).args = ((tuple(after), (*emits, *missing)),)
    return found


def cut_in_time(graph: fx.Graph, made: Split, sizes: tuple[int, int], how: How, by: str) -> tuple[str, str]:
    """Replace a chain by its sweeps. sizes: its steps, and segments. What was done, or why nothing was (one of the two is "")."""
    count, parts = sizes
    if count < parts:
        return "", f"{count} steps are too few for {parts} segments"
    body = made.body if made.body.rows else lane_body(made.body)
    if body is None:
        return "", "its steps cannot be put side by side as rows"
    segments = Segments(body, count, parts, Inserter(graph, made.node, by), made.body.rows)
    results = segments.write(made.node, how)
    for user in list(made.node.users):
        user.replace_all_uses_with(results[int(cast(int, user.args[1]))])
        graph.erase_node(user)
    graph.erase_node(made.node)
    return f"{parts} segments of {segments.length} steps, exact after {parts} sweeps", ""
