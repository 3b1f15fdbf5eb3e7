"""Small programs lowered by hand, for the tests of the instruction list and its executors."""

from __future__ import annotations

import operator

import torch
import torch.fx as fx
from torch._subclasses import FakeTensorMode

from hocket.compiler.layout import coordinate, local_offset, local_shape, local_size, parse_placement
from hocket.compiler.program import NOTE, Note, Phase, Program, Role, RoleKind, Signature, note
from hocket.runtime.mesh import Mesh

ATEN, C10D = torch.ops.aten, torch.ops._c10d_functional


class Builder:
    """Builds a lowered graph; values of nodes are the pieces of rank 0."""

    def __init__(self, mesh: str) -> None:
        self.mesh = Mesh.parse(mesh)
        self.graph = fx.Graph()
        self.mode = FakeTensorMode()
        self.inputs: list[Role] = []
        self.outputs: list[Role] = []
        self.results: list[fx.Node | None] = []
        self.line = 0

    def _finish(self, node: fx.Node, value, layout, shape, phase=Phase.FORWARD, role=None) -> fx.Node:
        self.line += 1
        placements = None if layout is None else tuple(map(parse_placement, layout.split(",")))
        node.meta["val"] = value
        node.meta[NOTE] = Note(
            role=role,
            phase=phase,
            source=f"model.py:{self.line} {node.name}",
            layouts=None if layout is None else (placements,),
            global_shapes=None if shape is None else (tuple(shape),),
        )
        return node

    def input(self, kind: str, name: str, shape: tuple[int, ...], layout: str, dtype=torch.float32) -> fx.Node:
        role = Role(RoleKind(kind), name)
        self.inputs.append(role)
        placements = tuple(map(parse_placement, layout.split(",")))
        with self.mode:
            value = torch.empty(local_shape(shape, placements, self.mesh), dtype=dtype)
        return self._finish(self.graph.placeholder(f"in{len(self.inputs)}"), value, layout, shape, role=role)

    def op(self, target, *args, layout: str | None = None, shape=None, phase=Phase.FORWARD, **kwargs) -> fx.Node:
        node = self.graph.call_function(target, args, kwargs)
        where = dict.fromkeys(self.mesh.names, 0)
        values = fx.node.map_arg((args, kwargs), lambda n: n.meta["val"])
        if target is coordinate:
            value = where[args[0]]
        elif target in (local_size, local_offset, operator.add, operator.sub, operator.mod):
            value = target(*values[0])
        else:
            with self.mode:
                value = target(*values[0], **values[1])
        return self._finish(node, value, layout, shape, phase)

    def collective(self, target, *args, layout: str | None = None, shape=None, phase=Phase.FORWARD) -> fx.Node:
        started = self.op(target, *args, phase=phase)
        return self.op(C10D.wait_tensor.default, started, layout=layout, shape=shape, phase=phase)

    def output(self, kind: str, name: str, node: fx.Node | None, layout: str | None = None, shape=None) -> None:
        self.outputs.append(Role(RoleKind(kind), name))
        self.results.append(node)
        if node is not None and layout is not None:
            old = note(node)
            self._finish(node, node.meta["val"], layout, shape, old.phase, old.role)

    def program(self) -> Program:
        self.graph.output(tuple(self.results))
        graph = fx.GraphModule(torch.nn.Module(), self.graph)
        return Program(graph, Signature(tuple(self.inputs), tuple(self.outputs)), self.mesh)


def tensor_parallel_mlp(mesh: str = "dp=2,tp=2", rows: int = 8, width: int = 4, hidden: int = 8) -> Program:
    """gelu(x @ w1) @ w2 with every kind of collective; x cut over dp, w1 and w2 over tp. Outputs: y, its column sums, its transpose
    of layouts (rows over tp, then columns over tp), and its largest entries per column."""
    b = Builder(mesh)
    dp, tp = b.mesh.axis_size("dp"), b.mesh.axis_size("tp")
    x = b.input("input", "x", (rows, width), "S(0),R")
    w1 = b.input("param", "w1", (width, hidden), "R,S(1)")
    w2 = b.input("param", "w2", (hidden, width), "R,S(0)")
    h = b.op(ATEN.gelu.default, b.op(ATEN.mm.default, x, w1))
    part = b.op(ATEN.mm.default, h, w2)
    cut = b.collective(C10D.reduce_scatter_tensor.default, part, "sum", tp, "tp")
    whole = b.collective(C10D.all_gather_into_tensor.default, cut, tp, "tp")
    b.output("output", "y", whole, "S(0),R", (rows, width))
    sums = b.op(ATEN.sum.dim_IntList, whole, [0])
    total = b.collective(C10D.all_reduce.default, sums, "sum", "dp")
    spread = b.collective(C10D.broadcast.default, total, 1, "tp")
    b.output("output", "sums", spread, "R,R", (width,))
    local = rows // dp // tp
    tiles = b.op(ATEN.permute.default, b.op(ATEN.view.default, cut, [local, tp, width // tp]), [1, 0, 2])
    flat = b.op(
        ATEN.reshape.default, b.op(ATEN.clone.default, tiles, memory_format=torch.contiguous_format), [tp * local, width // tp]
    )
    columns = b.collective(C10D.all_to_all_single.default, flat, [local] * tp, [local] * tp, "tp")
    b.output("output", "columns", columns, "S(0),S(1)", (rows, width))
    largest = b.collective(C10D.all_reduce.default, b.op(ATEN.amax.default, whole, [0]), "max", "dp")
    b.output("output", "largest", largest, "R,R", (width,))
    return b.program()


def mlp_reference(x: torch.Tensor, w1: torch.Tensor, w2: torch.Tensor) -> list[torch.Tensor]:
    """What ``tensor_parallel_mlp`` computes, on one device."""
    y = torch.nn.functional.gelu(x @ w1) @ w2
    return [y, y.sum(0), y, y.amax(0)]


def data_parallel_training(mesh: str = "dp=2", rows: int = 6, width: int = 4) -> Program:
    """y = relu(x @ w1) @ w2, x cut over dp; a counter buffer, a tangent for y, gradients of w1 and w2, and None for x."""
    b = Builder(mesh)
    back = Phase.BACKWARD_INPUT
    x = b.input("input", "x", (rows, width), "S(0)")
    w1 = b.input("param", "w1", (width, width), "R")
    w2 = b.input("param", "w2", (width, width), "R")
    seen = b.input("buffer", "seen", (), "R")
    t = b.input("tangent", "y", (rows, width), "S(0)")
    h = b.op(ATEN.relu.default, b.op(ATEN.mm.default, x, w1))
    y = b.op(ATEN.mm.default, h, w2)
    more = b.op(ATEN.add.Tensor, seen, 1)
    gw2 = b.op(ATEN.mm.default, b.op(ATEN.t.default, h, phase=back), t, phase=back)
    gw2 = b.collective(C10D.all_reduce.default, gw2, "sum", "dp", phase=back)
    gh = b.op(ATEN.mm.default, t, b.op(ATEN.t.default, w2, phase=back), phase=back)
    gh = b.op(ATEN.threshold_backward.default, gh, h, 0, phase=back)
    gw1 = b.op(ATEN.mm.default, b.op(ATEN.t.default, x, phase=back), gh, phase=back)
    gw1 = b.collective(C10D.all_reduce.default, gw1, "sum", "dp", phase=back)
    b.output("output", "y", y, "S(0)", (rows, width))
    b.output("gradient", "w1", gw1, "R", (width, width))
    b.output("gradient", "w2", gw2, "R", (width, width))
    b.output("gradient", "x", None)
    b.output("update", "seen", more, "R", ())
    return b.program()


def uneven_windows(mesh: str = "tp=4", total: int = 5) -> Program:
    """Every rank takes its chunk of a replicated vector, counts from its offset, and the chunks are gathered again
    by an all_to_all of unequal pieces."""
    b = Builder(mesh)
    tp = b.mesh.axis_size("tp")
    x = b.input("input", "x", (total,), "R")
    where = b.op(coordinate, "tp")
    size, offset = b.op(local_size, total, tp, where), b.op(local_offset, total, tp, where)
    piece = b.op(ATEN.slice.Tensor, x, 0, offset, b.op(operator.add, offset, size))
    count = b.op(ATEN.arange.start, offset, b.op(operator.add, offset, size), dtype=torch.int64)
    doubled = b.op(ATEN.cat.default, [piece, b.op(ATEN.full.default, [size], -0.0, dtype=torch.float32)])
    b.output("output", "piece", piece, "S(0)", (total,))
    b.output("output", "count", count, "S(0)", (total,))
    b.output("output", "length", b.op(ATEN.sum.default, doubled), "P(sum)", ())
    sizes = [b.op(local_size, total, tp, i) for i in range(tp)]
    everywhere = b.op(ATEN.cat.default, [piece] * tp)
    gathered = b.collective(C10D.all_to_all_single.default, everywhere, sizes, [size] * tp, "tp")
    b.output("output", "gathered", gathered, "R", (total,))
    return b.program()
