"""This rank's own chunk of a value that all ranks of an axis hold whole, made with as little work as the rules allow.

    own(slice)    v                        ->  narrow(v, offset of this rank, length of its chunk)
    own(view)     v = reshape(u), t(u)     ->  the same view of own(u)
    own(gather)   v = all_gather(u)        ->  u: nothing has to travel

A chunk is one step of a loop of as many rows as there are ranks, so its cuts are those of tile loops (``passes.tiles.cuts``).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
import torch.fx as fx

from ...compiler.errors import HocketError
from ...compiler.layout import Shard
from ...compiler.program import NOTE, Note, annotate, note, tensor_inputs
from ...compiler.rules.localise import localise, names_sizes
from ...compiler.rules.views import RESHAPES
from ...compiler.tiles import Cut
from ...runtime.mesh import Mesh
from ..local_graph import LocalGraph
from ..tiles.cuts import Cuts

aten, c10d = torch.ops.aten, torch.ops._c10d_functional

MOVES = RESHAPES | frozenset(
    {
        aten.t.default,
        aten.transpose.int,
        aten.permute.default,
        aten.contiguous.default,
        aten.clone.default,
        aten.alias.default,
    }
)
"""Ops that move the elements of one tensor and change none: linear, and their own on every chunk."""


class OwnChunks:
    """Appends own chunks to a graph, each once. through: further ops that are made of chunks rather than cut afterwards."""

    def __init__(self, graph: fx.Graph, mesh: Mesh, axis: str, cuts: Cuts, through: frozenset[fx.Node] = frozenset()) -> None:
        self.local = LocalGraph(mesh)
        self.local.graph = graph
        self.axis, self.number = axis, mesh.names.index(axis)
        self.cuts, self.through = cuts, through
        self.made: dict[tuple[fx.Node, Cut], fx.Node] = {}

    def own(self, node: fx.Node, cut: Cut) -> fx.Node:
        """The chunk of a value, appended where the graph is being written."""
        if (node, cut) not in self.made:
            self._keep(node, cut, self._operand(node, cut) or self._moved(node, cut) or self._narrowed(node, cut))
        return self.made[node, cut]

    def _operand(self, node: fx.Node, cut: Cut) -> fx.Node | None:
        """What a gather was given, where the cut is that of its pieces."""
        return tensor_inputs(node.all_input_nodes[0])[0] if self.is_gathered_so(node, cut) else None

    def is_gathered_so(self, node: fx.Node, cut: Cut) -> bool:
        """Whether the chunks of a value are the pieces that ranks have sent along this axis."""
        if node.target is not c10d.wait_tensor.default or (cut.dim, cut.outer) != (0, 1):
            return False
        gather = node.all_input_nodes[0]
        return gather.target is c10d.all_gather_into_tensor.default and gather.args[-1] == self.axis

    def moves(self, node: fx.Node) -> bool:
        """Whether a chunk of a value is made of chunks of what its op is given."""
        is_plain = len(tensor_inputs(node)) == len(node.all_input_nodes)
        return is_plain and (node in self.through or node.target in MOVES)

    def remember(self, node: fx.Node, cut: Cut, given: Sequence[fx.Node]) -> None:
        """Append the chunk of a value, made of these."""
        made = self.repeat(node, given, chunk_shape(node, cut))
        if made is None:
            raise HocketError(
                f"{node.name} has no chunk of its own (from {note(node).source or 'an unknown line'}): a rule is wrong"
            )
        self._keep(node, cut, made)

    def _keep(self, node: fx.Node, cut: Cut, made: fx.Node) -> None:
        if cut.outer == 1 and made.op == "call_function" and not note(made).layouts:
            place(made, node, self.number, Shard(cut.dim))
        self.made[node, cut] = made

    def _moved(self, node: fx.Node, cut: Cut) -> fx.Node | None:
        """The op itself on chunks of what it is given."""
        if not self.moves(node):
            return None
        passage = self.cuts.backward(node, 0, cut)
        if passage is None:
            return None
        given = [n if c is None else self.own(n, c) for n, c in zip(tensor_inputs(node), passage.inputs, strict=True)]
        return self.repeat(node, given, chunk_shape(node, cut))

    def repeat(self, node: fx.Node, given: Sequence[fx.Node], shape: Sequence[int] | None) -> fx.Node | None:
        """A call with other tensors. shape: what it must make, None for whatever it makes. None where it makes something else."""
        tensors = iter(given)
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda _: next(tensors))
        op: Any = node.target
        if shape is not None and names_sizes(op):
            op, args, kwargs = localise(op, args, kwargs, shape)
        values, named = fx.node.map_arg((args, kwargs), lambda n: n.meta["val"])
        with given[0].meta["val"].fake_mode:
            val = op(*values, **named)
        if shape is not None and list(val.shape) != list(shape):
            return None
        made = self.local.call(op, tuple(args), val)
        made.kwargs = kwargs
        return made

    def _narrowed(self, node: fx.Node, cut: Cut) -> fx.Node:
        """Cut out of the whole value. A dimension of several runs is opened first and closed afterwards."""
        value, total, dim = node, self.cuts.rows * cut.inner, cut.dim
        shape = list(node.meta["val"].shape)
        if cut.outer > 1:
            dim += 1
            value = self.local.reshape(value, [*shape[: cut.dim], cut.outer, total, *shape[cut.dim + 1 :]])
        found = self.local.narrow(value, dim, self.local.offset(total, self.number), cut.inner, f"{node.name}_own")
        return found if cut.outer == 1 else self.local.reshape(found, chunk_shape(node, cut))


def chunk_shape(node: fx.Node, cut: Cut) -> list[int]:
    """Sizes of a chunk of a node's value."""
    shape = list(node.meta["val"].shape)
    shape[cut.dim] = cut.outer * cut.inner
    return shape


def template_of(node: fx.Node, by: str) -> Note:
    """The note of what a pass appends in place of a node."""
    old = note(node)
    return Note(phase=old.phase, region=old.region, source=old.source, module=old.module, stage=old.stage, added_by=by)


def place(node: fx.Node, like: fx.Node, axis: int, placement: Any) -> None:
    """Say of which value a node holds a piece: that of another node, with another placement along one axis."""
    old = note(like)
    (layout,), shapes = old.layouts or (None,), old.global_shapes
    if layout is not None:
        annotate(node, layouts=((*layout[:axis], placement, *layout[axis + 1 :]),), global_shapes=shapes, carries=old.carries)


def describe(node: fx.Node, like: fx.Node, axis: int, placement: Any) -> None:
    """Give a node the note of the one that it stands for, with another placement along one axis."""
    old = note(like)
    (layout,) = old.layouts or (None,)
    assert layout is not None
    layouts = ((*layout[:axis], placement, *layout[axis + 1 :]),)
    node.meta[NOTE] = dataclasses.replace(old, layouts=layouts, added_by=note(node).added_by or old.added_by)


def erase_unused(graph: fx.Graph, dead: frozenset[fx.Node]) -> None:
    """Erase calls that nobody reads, except those that nobody read before (``dead``)."""
    for node in reversed(list(graph.nodes)):
        if node.op == "call_function" and not node.users and node not in dead:
            graph.erase_node(node)


def unused(graph: fx.Graph) -> frozenset[fx.Node]:
    """Calls that nobody reads."""
    return frozenset(node for node in graph.nodes if node.op == "call_function" and not node.users)
