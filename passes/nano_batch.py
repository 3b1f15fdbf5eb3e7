"""Run the batch in two halves, so that one half computes while the collectives of the other travel (NanoFlow, arXiv 2408.12757).

    f(x) = cat(f(x[first half]), f(x[second half]))        for whatever acts on the entries of the batch one by one
    x^T d = x[first]^T d[first] + x[second]^T d[second]    where a weight gradient adds them up

Starting from the inputs whose first dimension is the batch, the cut goes through every op that a rule lets it through, and through
collectives, which do not mind that a tensor is shorter. What needs the whole batch gets the halves put together. Then the halves
are put side by side by the list scheduler (``overlap_order``), and the result is kept only if that is predicted to be quicker: two
halves read every weight twice and pay every collective's start-up twice, so with little to hide the batch stays whole.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
import torch.fx as fx
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from ..compiler.contract import Context, Contract, Equal
from ..compiler.program import (
    NOTE,
    Decision,
    Phase,
    Program,
    RoleKind,
    annotate,
    graph_module,
    note,
    producer,
    tensor_inputs,
    tensor_leaves,
)
from ..compiler.rules.localise import localise, names_sizes
from ..compiler.tiles import Cut
from .overlap_order import OverlapOrder
from .remembered import Remembered
from .tiles.cuts import Cuts, Order, Passage
from .timeline import WAIT, Timeline, is_collective

aten, c10d = torch.ops.aten, torch.ops._c10d_functional

HALVES = 2
LEAST_COLLECTIVES = 2


@dataclass(frozen=True)
class NanoBatch:
    """Split the batch in two where at least two collectives then travel behind the other half.

    least_gain: predicted part of the step below which the batch stays whole, negative to split whenever it can be; memory: see
    ``OverlapOrder``; contention: see ``Timeline``.
    """

    name: ClassVar[str] = "nano-batch"
    contract: ClassVar[Contract] = Equal()
    least_gain: float = 0.03
    memory: float = 1.5
    contention: float = 0.0
    known: Remembered[tuple[bool, Decision]] = field(default_factory=Remembered, compare=False, repr=False)

    def __call__(self, program: Program, context: Context) -> Program:
        """The program in halves, or as it was, with the decision and its reason."""
        region = _Region.grown(program, context)
        split, decision = self.known.choose(program, lambda: self._judge(program, context, region))
        if not split:
            return program.decided(decision)
        return _Split(program, region).run().decided(decision)

    def _judge(self, program: Program, context: Context, region: _Region) -> tuple[bool, Decision]:
        found = [node for node in region.members if is_collective(node)]
        if len(found) < LEAST_COLLECTIVES:
            reason = (
                f"the batch reaches {len(found)} collectives, and it takes {LEAST_COLLECTIVES} to hide one behind the other half"
            )
            return False, Decision(self.name, "", applied=False, reason=region.obstacle or reason)
        order = OverlapOrder(memory=self.memory, least_gain=0.0, contention=self.contention)
        halves = order(_Split(program, region).run(), context)
        before, after = (_seconds(p, context, self.contention) for p in (order(program, context), halves))
        gain = before - after
        text = f"{len(found)} collectives in two halves of the batch: predicted {before * 1e3:.3f} -> {after * 1e3:.3f} ms"
        applied = gain > self.least_gain * before
        reason = text if applied else f"{text}, less than {self.least_gain:.0%} to gain"
        return applied, Decision(self.name, found[0].name, applied, reason, gain, note(found[0]).source)


def _seconds(program: Program, context: Context, contention: float) -> float:
    timeline = Timeline(program, context.cluster, contention)
    return timeline.run([node for node in program.nodes if node.op == "call_function"]).seconds


@dataclass
class _Region:
    """What is run in halves. inputs: the batched placeholders; members: nodes with their passages; cuts: of (node, output); sums:
    of these members the halves add up; obstacle: why there is nothing."""

    inputs: list[fx.Node] = field(default_factory=list)
    members: dict[fx.Node, Passage] = field(default_factory=dict)
    cuts: dict[tuple[fx.Node, int], Cut] = field(default_factory=dict)
    sums: set[fx.Node] = field(default_factory=set)
    obstacle: str = ""

    @classmethod
    def grown(cls, program: Program, context: Context) -> _Region:
        """Everything that the cut of the batch reaches."""
        region = cls()
        if program.mesh is None:
            region.obstacle = "the program is not lowered to a mesh"
            return region
        for node, role in zip(program.placeholders, program.signature.inputs, strict=True):
            value = node.meta["val"]
            batched = role.kind in (RoleKind.INPUT, RoleKind.TANGENT) and isinstance(value, torch.Tensor) and value.dim()
            if batched and value.shape[0] % HALVES == 0:
                region.inputs.append(node)
                region.cuts[node, 0] = Cut(0, 1, value.shape[0] // HALVES)
        if not region.inputs:
            region.obstacle = "no input has a first dimension that can be halved"
            return region
        cuts = Cuts(context.rules, HALVES, Order(program.graph.graph))
        for node in program.nodes:
            if node.op == "call_function" and note(node).phase is not Phase.OPTIMIZER:
                region._consider(node, cuts)
        return region

    def cut_of(self, node: fx.Node) -> Cut | None:
        """The cut of a value, through ``getitem``."""
        return self.cuts.get(producer(node))

    def _consider(self, node: fx.Node, cuts: Cuts) -> None:
        inputs = tensor_inputs(node)
        given = [self.cut_of(n) for n in inputs]
        if not any(given) or any(producer(n)[0] in self.sums for n in inputs):
            return
        passage = _through_collective(node, given[0]) if is_collective(node) or node.target is WAIT else cuts.forward(node, given)
        if passage is None:  # an input whose first dimension can be halved need not be batched
            given = [None if n.op == "placeholder" else cut for n, cut in zip(inputs, given, strict=True)]
            passage = cuts.forward(node, given) if any(given) and not is_collective(node) else None
        if passage is None or any(
            want is not None and have is None and producer(source)[0].op != "placeholder"
            for source, have, want in zip(inputs, given, passage.inputs, strict=True)
        ):
            return  # it would read in halves what was computed whole
        self.members[node] = passage
        if passage.sums:
            self.sums.add(node)
        for index, cut in enumerate(passage.outputs):
            if cut is not None:
                self.cuts[node, index] = cut


def _through_collective(node: fx.Node, cut: Cut | None) -> Passage | None:
    """all_reduce and waits keep the cut; an all_gather puts its ranks in front of it, a reduce_scatter takes them away."""
    if cut is None:
        return None
    if node.target is WAIT or node.target is c10d.all_reduce.default:
        return Passage((cut,), (cut,))
    if node.target is c10d.all_gather_into_tensor.default:
        parts = int(node.args[1])  # type: ignore[arg-type]
        return Passage((cut,), (cut._replace(outer=parts * cut.outer) if cut.dim == 0 else cut,))
    if node.target is c10d.reduce_scatter_tensor.default:
        parts = int(node.args[2])  # type: ignore[arg-type]
        if cut.dim:
            return Passage((cut,), (cut,))
        return Passage((cut,), (cut._replace(outer=cut.outer // parts),)) if cut.outer % parts == 0 else None
    return None


class _Split:
    """Writes the program with its region in halves."""

    def __init__(self, program: Program, region: _Region) -> None:
        self.program, self.region = program, region
        self.graph = fx.Graph()
        self.whole: dict[fx.Node, fx.Node] = {}
        self.halves: dict[fx.Node, tuple[fx.Node, ...]] = {}
        self.sliced: dict[tuple[fx.Node, Cut], tuple[fx.Node, ...]] = {}
        self.mode = FakeTensorMode()

    def run(self) -> Program:
        for node in self.program.nodes:
            if isinstance(node.meta.get("val"), FakeTensor):
                self.mode = node.meta["val"].fake_mode
            if producer(node)[0] in self.region.members and node.op == "call_function":
                self._both(node)
            elif node.op == "output":
                results = tuple(None if r is None else self._whole(r) for r in self.program.results)
                self.graph.output(results).meta.update(node.meta)
            else:
                self.whole[node] = self.graph.node_copy(node, self._whole)
        self.graph.lint()
        return self.program.replace(graph=graph_module(self.graph))

    def _both(self, node: fx.Node) -> None:
        """The node once for each half."""
        if node not in self.region.members:  # a getitem
            self.halves[node] = tuple(
                self._call(node, node.target, (half, node.args[1]), {}) for half in self.halves[producer(node)[0]]
            )
            return
        passage = self.region.members[node]
        pairs = []
        for source, cut in zip(tensor_inputs(node), passage.inputs, strict=True):
            pairs.append((source, self._sources(source, cut)))
        made = []
        for half in range(HALVES):
            chosen = {source: found[half] for source, found in pairs}
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), chosen.__getitem__)
            target, cut = node.target, passage.outputs[0]
            if names_sizes(target) and cut is not None:
                size = list(tensor_leaves(node.meta["val"])[0].shape)
                size[cut.dim] //= HALVES
                target, args, kwargs = localise(target, args, kwargs, size)
            made.append(self._call(node, target, tuple(args), dict(kwargs), passage.outputs))
        self.halves[node] = tuple(made)

    def _sources(self, source: fx.Node, cut: Cut | None) -> tuple[fx.Node, ...]:
        """What each half reads of a value."""
        if cut is None:
            return (self._whole(source),) * HALVES
        if source in self.halves:
            return self.halves[source]
        if (source, cut) not in self.sliced:
            whole = self._whole(source)
            self.sliced[source, cut] = tuple(self._slice(source, whole, cut, half) for half in range(HALVES))
        return self.sliced[source, cut]

    def _slice(self, like: fx.Node, value: fx.Node, cut: Cut, half: int) -> fx.Node:
        shape = list(value.meta["val"].shape)
        if cut.outer > 1:
            apart = [*shape[: cut.dim], cut.outer, shape[cut.dim] // cut.outer, *shape[cut.dim + 1 :]]
            value = self._call(like, aten.reshape.default, (value, apart), {})
        dim = cut.dim + (cut.outer > 1)
        piece = self._call(like, aten.slice.Tensor, (value, dim, half * cut.inner, (half + 1) * cut.inner), {})
        if cut.outer > 1:
            shape[cut.dim] //= HALVES
            piece = self._call(like, aten.reshape.default, (piece, shape), {})
        return self._call(like, aten.contiguous.default, (piece,), {})

    def _whole(self, node: fx.Node) -> fx.Node:
        """The whole value of a node, put together where it was computed in halves."""
        if node not in self.whole:
            first, second = self.halves[node]
            if producer(node)[0] in self.region.sums:
                made = self._call(node, aten.add.Tensor, (first, second), {})
            else:
                made = self._joined(node, (first, second))
            made.meta["val"] = node.meta["val"]
            made.meta[NOTE] = note(node)
            self.whole[node] = made
        return self.whole[node]

    def _joined(self, node: fx.Node, halves: Sequence[fx.Node]) -> fx.Node:
        cut = self.region.cut_of(node)
        assert cut is not None
        if cut.outer == 1:
            return self._call(node, aten.cat.default, (list(halves), cut.dim), {})
        shape = list(halves[0].meta["val"].shape)
        apart = [*shape[: cut.dim], cut.outer, shape[cut.dim] // cut.outer, *shape[cut.dim + 1 :]]
        parts = [self._call(node, aten.reshape.default, (half, apart), {}) for half in halves]
        joined = self._call(node, aten.cat.default, (parts, cut.dim + 1), {})
        return self._call(node, aten.reshape.default, (joined, list(node.meta["val"].shape)), {})

    def _call(
        self, like: fx.Node, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any], cuts: Sequence[Cut | None] = ()
    ) -> fx.Node:
        node = self.graph.create_node("call_function", target, args, kwargs)
        if is_collective(like) and target is like.target:
            shape = list(like.meta["val"].shape)
            if cuts and cuts[0] is not None:
                shape[cuts[0].dim] //= HALVES
            with self.mode:
                node.meta["val"] = torch.empty(shape, dtype=like.meta["val"].dtype, device=like.meta["val"].device)
        elif target is WAIT:
            node.meta["val"] = args[0].meta["val"]
        else:
            values, named = fx.node.map_arg((args, kwargs), lambda n: n.meta["val"])
            with self.mode:
                node.meta["val"] = target(*values, **named)
        node.meta[NOTE] = dataclasses.replace(note(like), layouts=None, global_shapes=None)
        annotate(node, added_by=NanoBatch.name)
        return node
