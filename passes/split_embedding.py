"""Write a look-up in a table as one in each of its pieces, so that it can be cut by rows (Megatron-LM, arXiv 1909.08053, 3).

    W[i]             =    sum_p  (i lies in piece p  ?  W_p[i - p V/P]  :  0)           p = 0 .. P-1, W_p of V/P rows
    dW_p[r]          =    sum of g[n] over the n whose i[n] lies in piece p, at r

A language model whose head shares the weight of its embedding wants it cut by rows, over the vocabulary: cut by columns the head
would leave partial sums of all logits. With as many pieces as ranks each rank looks up what its piece holds, and the rows are added
up. A table that nothing else reads is better cut by columns: then rows are gathered, half of what adding them up takes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.fx as fx

from ..compiler.contract import Context, Contract, Equal
from ..compiler.program import Decision, Program, annotate, copy_program, note
from .chain.batch import Inserter
from .pieces_of_rows import places_in_pieces

aten = torch.ops.aten

_LOOK_UP, _BACKWARD = aten.embedding.default, aten.embedding_dense_backward.default


@dataclass(frozen=True)
class SplitEmbedding:
    """Split every look-up in a table that other ops read as well, and its gradient, in as many pieces as ``axis`` has ranks."""

    axis: str
    name: ClassVar[str] = "split-embedding"
    contract: ClassVar[Contract] = Equal()

    def __call__(self, program: Program, context: Context) -> Program:
        """The program with a Decision for each look-up. InputError when the mesh has no such axis."""
        parts = context.mesh.axis_size(self.axis)
        new, _ = copy_program(program)
        decisions = [self._decide(node, parts) for node in list(new.nodes) if node.target is _LOOK_UP]
        new.graph.graph.eliminate_dead_code()
        return new.decided(*decisions)

    def _decide(self, node: fx.Node, parts: int) -> Decision:
        table: Any = node.args[0]
        backwards = _gradients(node)
        rows, width = table.meta["val"].shape
        reason = _hindrance(table, backwards, parts)
        applied = not reason
        if applied:
            _look_up(Inserter(node.graph, node, self.name), node, parts)
            for backward in backwards:
                _gradient(Inserter(node.graph, backward, self.name), backward, parts)
            reason = f"a table of {rows} x {width} that other ops read too is looked up in {parts} pieces of rows"
        return Decision(self.name, node.name, applied=applied, reason=reason, source=note(node).source)


def _gradients(look_up: fx.Node) -> list[fx.Node]:
    """The gradients of the table by a look-up: they read the same places."""
    table: Any = look_up.args[0]
    places: Any = look_up.args[1]
    rows = table.meta["val"].shape[0]
    return [user for user in places.users if user.target is _BACKWARD and user.args[1] is places and user.args[2] == rows]


def _hindrance(table: fx.Node, backwards: list[fx.Node], parts: int) -> str:
    rows = table.meta["val"].shape[0]
    if all(user.target is _LOOK_UP for user in table.users):
        return "nothing else reads its table, which is better cut by columns"
    if rows % parts:
        return f"{rows} rows are not divisible by {parts} ranks"
    if any(backward.args[4] for backward in backwards):
        return "its gradient is divided by how often each row was looked up (scale_grad_by_freq)"
    return ""


def _places(insert: Inserter, indices: Any, rows: int, parts: int) -> tuple[fx.Node, fx.Node]:
    """[parts, n]: whether each piece of a table holds each index, and where."""
    flat = insert.call(aten.reshape.default, indices, [1, indices.meta["val"].numel()])
    return places_in_pieces(insert, flat, 0, rows, parts)


def _look_up(insert: Inserter, node: fx.Node, parts: int) -> None:
    table: Any = node.args[0]
    indices: Any = node.args[1]
    total, width = table.meta["val"].shape
    held, place = _places(insert, indices, total, parts)
    count = indices.meta["val"].numel()
    wide = insert.call(aten.expand.default, insert.call(aten.unsqueeze.default, place, 2), [parts, count, width])
    pieces = insert.call(aten.view.default, table, [parts, total // parts, width])
    found = insert.call(aten.gather.default, pieces, 1, wide)
    kept = insert.call(aten.where.self, insert.call(aten.unsqueeze.default, held, 2), found, _zero(insert, table))
    whole = insert.call(aten.sum.dim_IntList, kept, [0])
    _put(insert.call(aten.view.default, whole, [*indices.meta["val"].shape, width]), node)


def _gradient(insert: Inserter, node: fx.Node, parts: int) -> None:
    gradient: Any = node.args[0]
    indices: Any = node.args[1]
    total, padding = node.args[2:4]
    assert isinstance(total, int)
    width, count = gradient.meta["val"].shape[-1], indices.meta["val"].numel()
    held, place = _places(insert, indices, total, parts)
    if isinstance(padding, int) and padding >= 0:
        counts = insert.call(aten.ne.Scalar, insert.call(aten.reshape.default, indices, [1, count]), padding)
        held = insert.call(aten.logical_and.default, held, counts)
    rows = insert.call(aten.reshape.default, gradient, [1, count, width])
    kept = insert.call(aten.where.self, insert.call(aten.unsqueeze.default, held, 2), rows, _zero(insert, gradient))
    wide = insert.call(aten.expand.default, insert.call(aten.unsqueeze.default, place, 2), [parts, count, width])
    known = gradient.meta["val"]
    empty = insert.call(
        aten.zeros.default, [parts, total // parts, width], dtype=known.dtype, device=known.device, pin_memory=False
    )
    added = insert.call(aten.scatter_add.default, empty, 1, wide, kept)
    _put(insert.call(aten.view.default, added, [total, width]), node)


def _put(written: fx.Node, node: fx.Node) -> None:
    """Use what is written out, and say whose value it has: so it can be proven by itself."""
    annotate(written, carries=node.name)
    node.replace_all_uses_with(written)


def _zero(insert: Inserter, like: fx.Node) -> fx.Node:
    known = like.meta["val"]
    return insert.call(aten.scalar_tensor.default, 0, dtype=known.dtype, device=known.device)
