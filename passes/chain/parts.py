"""What of a step must be done in order, and what may wait.

sum          c' = c + v, where nothing else reads c: v is given out, and added up after the chain
delayed sum  the same where v = g(b) of a carry b that holds what the step before has made, b' = w, and that only sums read:
                 sum over t < T of g(b[t])  =  g(b[0]) + sum over t < T - 1 of g(w[t])
             autograd adds up the gradient of a weight so, one step late
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.fx as fx

from ...compiler.chains.bodies import BodyGraph
from ...compiler.program import ancestors
from .batch import depends_on

aten = torch.ops.aten


@dataclass(frozen=True)
class DelayedSum:
    """carry: the carry that is read late; start: nodes of g, for its first value; value: g of it; added: g of what replaces it."""

    carry: int
    start: tuple[fx.Node, ...]
    value: fx.Node
    added: fx.Node


class Parts:
    """The nodes of a body by where they go.

    real: carries that stay; summed: carry -> what each step adds to it; late: carry -> its delayed sum; delayed: carries that only
    those read. step: nodes done in order; after: from the states, for all steps at once; fixed: the same in every step; ahead: seen
    by no carry, ``ahead_wanted`` of them read by the others.
    """

    def __init__(self, body: BodyGraph, read: Sequence[int]) -> None:
        """read: the emits that somebody reads."""
        self.read = list(read)
        emits = [body.emits[i] for i in self.read]
        sums = find_sums(body, emits)
        self.late = find_delayed_sums(body, sums, emits)
        self.summed = {i: value for i, value in sums.items() if i not in self.late}
        self.delayed = sorted({late.carry for late in self.late.values()})
        self.real = [i for i in range(body.carries) if i not in sums and i not in self.delayed]
        self.lasts = [body.following[i] for i in self.delayed]
        self.ends = [*emits, *self.summed.values(), *[late.added for late in self.late.values()], *self.lasts]
        self._place(body)

    def _place(self, body: BodyGraph) -> None:
        calls = body.calls
        carried = depends_on(calls, body.carry_inputs)
        following = [body.following[i] for i in self.real]
        step = ancestors(following) & carried
        step |= {n for n in calls if n.target is operator.getitem and n.args[0] in step}
        needed = ancestors([*following, *self.ends]) | step
        starts = {n for late in self.late.values() for n in late.start}
        self.step = [n for n in calls if n in step]
        self.after = [n for n in calls if n in needed and n in carried and n not in step and n not in starts]
        varying = depends_on(calls, body.stream_inputs)
        loose = [n for n in calls if n in needed and n not in carried]
        self.fixed = [n for n in loose if n not in varying]
        self.ahead = [n for n in loose if n in varying]
        read = {source for n in (*self.step, *self.after) for source in n.all_input_nodes} | {*self.ends, *following}
        self.ahead_wanted = [n for n in self.ahead if n in read and isinstance(n.meta["val"], torch.Tensor)]


def find_sums(body: BodyGraph, emits: Sequence[fx.Node]) -> dict[int, fx.Node]:
    """Carries with c' = c + v that nothing else reads, and their v. A body of sums only keeps them: something must be the state."""
    found: dict[int, fx.Node] = {}
    for i, (carry, after) in enumerate(zip(body.carry_inputs, body.following, strict=True)):
        if after.target is not aten.add.Tensor or len(after.args) != 2 or after.kwargs or set(carry.users) != {after}:
            continue
        others = [a for a in after.args if a is not carry]
        is_read = [u for u in after.users if u.op != "output"] or after in emits or body.following.count(after) != 1
        if len(others) == 1 and isinstance(others[0], fx.Node) and not is_read:
            value, state = others[0].meta["val"], carry.meta["val"]
            if value.shape == state.shape and value.dtype == state.dtype:
                found[i] = others[0]
    return found if len(found) < body.carries else {}


def find_delayed_sums(body: BodyGraph, sums: dict[int, fx.Node], emits: Sequence[fx.Node]) -> dict[int, DelayedSum]:
    """Sums of something that a carry brings from the step before, where nothing else reads that carry."""
    inputs = body.carry_inputs
    place = {node: i for i, node in enumerate(inputs)}
    streams = set(body.stream_inputs)
    wanted: dict[int, int] = {}
    for i, value in sums.items():
        roots = ancestors([value])
        carries = [place[n] for n in roots if n in place]
        if len(carries) == 1 and not roots & streams and carries[0] not in sums:
            wanted[i] = carries[0]
    others = [n for i, n in enumerate(body.following) if i not in wanted]
    elsewhere = ancestors([*others, *emits])
    found: dict[int, DelayedSum] = {}
    for i, carry in wanted.items():
        if inputs[carry] not in elsewhere:
            found[i] = _moved(body, carry, sums[i])
    real = [i for i in range(body.carries) if i not in sums and i not in {late.carry for late in found.values()}]
    return found if real else {}


def _moved(body: BodyGraph, carry: int, value: fx.Node) -> DelayedSum:
    """g, written once more for the value that the carry takes next."""
    source = body.carry_inputs[carry]
    reached = depends_on(body.calls, [source]) & ancestors([value])
    start = tuple(n for n in body.calls if n in reached)
    copies: dict[fx.Node, fx.Node] = {source: body.following[carry]}
    anchor = next(n for n in reversed(body.graph.nodes) if n.op == "output")
    with body.graph.inserting_before(anchor):
        for node in start:
            copies[node] = body.graph.node_copy(node, lambda n: copies.get(n, n))
    return DelayedSum(carry, start, value, copies[value])
