"""Timing collectives on the ranks of an engine, for calibration: programs of nothing but one collective, repeated."""

from __future__ import annotations

import math
import time
from typing import Any

import torch
import torch.fx as fx
from torch._subclasses import FakeTensorMode

from ...runtime.engines.base import Engine
from ..emit import emit
from ..layout import Layout, Replicate, Shard
from ..program import Program, Role, RoleKind, Signature, annotate
from ..redistribute import StepKind
from .fit import quiet

_FEW, _MANY = 1, 9
_REPEATS = 9


class CollectiveTimer:
    """``timer(kind, nbytes)``: undisturbed seconds of one collective over all ranks of a one-axis engine (see ``TimeCollective``).

    The time of a program with one collective is taken off that of a program with many, so that what a step costs by itself drops
    out; the two take turns, so that both see the same machine.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def __call__(self, kind: StepKind, nbytes: int) -> float:
        """nbytes: size of the whole tensor, float32, rounded up to whole pieces."""
        ranks = self._engine.mesh.size
        rows = ranks * ranks * math.ceil(nbytes / 4 / ranks / ranks)
        value = torch.ones(rows)
        handles = {n: self._engine.load(emit(repeated_collective(kind, rows, n, self._engine)), {}) for n in (_FEW, _MANY)}
        times: dict[int, list[float]] = {n: [] for n in handles}
        for _ in range(_REPEATS):
            for count, handle in handles.items():
                start = time.perf_counter()
                ticket, _results = self._engine.forward(handle, [value])
                times[count].append(time.perf_counter() - start)
                self._engine.release(ticket)
        few, many = (quiet(times[n][1:]) for n in (_FEW, _MANY))
        return max(many - few, 1e-9) / (_MANY - _FEW)


def repeated_collective(kind: StepKind, rows: int, count: int, engine: Engine) -> Program:
    """A lowered program that runs one collective ``count`` times on a vector of ``rows`` float32 numbers. What it computes is of no
    use (partial sums are whole tensors here), only how long it takes."""
    mesh = engine.mesh
    ((axis, ranks),) = mesh.axes
    cut: Layout = (Shard(0),)
    whole: Layout = (Replicate(),)
    source = whole if kind in (StepKind.ALL_REDUCE, StepKind.REDUCE_SCATTER) else cut
    target = cut if kind in (StepKind.REDUCE_SCATTER, StepKind.ALL_TO_ALL) else whole
    ops = torch.ops._c10d_functional
    graph = fx.Graph()
    with FakeTensorMode():
        pieces = {source: torch.empty(rows if source == whole else rows // ranks)}
        pieces[target] = torch.empty(rows if target == whole else rows // ranks)

    def described(node: fx.Node, layout: Layout) -> fx.Node:
        node.meta["val"] = pieces[layout]
        annotate(node, layouts=(layout,), global_shapes=((rows,),))
        return node

    def call(op: Any, *args: Any) -> fx.Node:
        return graph.call_function(op, args)

    first = described(graph.placeholder("value"), source)
    annotate(first, role=Role(RoleKind.INPUT, "args[0]"))
    value = result = first
    for _ in range(count):
        match kind:
            case StepKind.ALL_REDUCE:
                made = call(ops.all_reduce.default, value, "sum", axis)
            case StepKind.ALL_GATHER:
                made = call(ops.all_gather_into_tensor.default, value, ranks, axis)
            case StepKind.REDUCE_SCATTER:
                made = call(ops.reduce_scatter_tensor.default, value, "sum", ranks, axis)
            case _:
                splits = [rows // ranks // ranks] * ranks
                made = call(ops.all_to_all_single.default, value, splits, splits, axis)
        value = result = described(call(ops.wait_tensor.default, described(made, target)), target)
        if kind is StepKind.ALL_GATHER:  # each needs the one before it, so that none can be left out
            value = described(call(torch.ops.aten.slice.Tensor, result, 0, 0, rows // ranks), source)
        elif kind is StepKind.REDUCE_SCATTER:
            value = described(call(torch.ops.aten.repeat.default, result, [ranks]), source)
    graph.output((result,))
    signature = Signature((Role(RoleKind.INPUT, "args[0]"),), (Role(RoleKind.OUTPUT, "out"),))
    return Program(fx.GraphModule(torch.nn.Module(), graph), signature, mesh=mesh)
