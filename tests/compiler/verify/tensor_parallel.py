"""Programs lowered by hand, right and wrong, for the tests of placement types, differential comparison and the pass manager."""

from __future__ import annotations

import operator

import torch
import torch.fx as fx
from torch._subclasses.fake_tensor import FakeTensorMode

from hocket.compiler.layout import local_shape, parse_placement
from hocket.compiler.program import INTEGER_FUNCTIONS, NOTE, Note, Program, Role, RoleKind, Signature
from hocket.runtime.mesh import Mesh

aten = torch.ops.aten
c10d = torch.ops._c10d_functional


class Hand:
    """Appends nodes; values are rank 0's pieces. With ``mesh=None`` it builds a logical program from the same calls."""

    def __init__(self, mesh: str | None) -> None:
        self.mesh = None if mesh is None else Mesh.parse(mesh)
        self.graph = fx.Graph()
        self.mode = FakeTensorMode()
        self.inputs: list[Role] = []
        self.outputs: list[Role] = []
        self.results: list[fx.Node] = []
        self.line = 0
        self.origin = ""

    def _note(self, node: fx.Node, layout: str | None, shape) -> fx.Node:
        self.line += 1
        layouts = None if layout is None or self.mesh is None else (tuple(map(parse_placement, layout.split(","))),)
        origin = node.name if node.op == "placeholder" else self.origin
        node.meta[NOTE] = Note(
            source=f"model.py:{self.line} {node.name}",
            layouts=layouts,
            global_shapes=None if shape is None else (tuple(shape),),
            origin=origin,
            carries=origin,
        )
        return node

    def input(self, name: str, shape, layout: str, kind: str = "input", dtype=torch.float32) -> fx.Node:
        role = Role(RoleKind(kind), name)
        self.inputs.append(role)
        node = self.graph.placeholder(name.replace(".", "_"))
        local = shape if self.mesh is None else local_shape(shape, tuple(map(parse_placement, layout.split(","))), self.mesh)
        with self.mode:
            node.meta["val"] = torch.empty(local, dtype=dtype)
        return self._note(node, layout, shape)

    def call(
        self, target, *args, layout: str | None = None, shape=None, name: str | None = None, origin: str = "", **kwargs
    ) -> fx.Node:
        node = self.graph.create_node("call_function", target, args, kwargs, name)
        self.origin = origin
        values, named = fx.node.map_arg((args, kwargs), lambda n: n.meta["val"])
        if target in INTEGER_FUNCTIONS:
            node.meta["val"] = 0 if isinstance(values[0], str) else target(*values)
        elif target is operator.getitem:
            node.meta["val"] = values[0][values[1]]
        else:
            with self.mode:
                node.meta["val"] = target(*values, **named)
        return self._note(node, layout, shape)

    def reduce(self, value: fx.Node, axis: str = "tp", op: str = "sum", layout: str | None = None, shape=None) -> fx.Node:
        """all_reduce and wait; nothing in a logical program."""
        if self.mesh is None:
            return value
        return self.call(c10d.wait_tensor.default, self.call(c10d.all_reduce.default, value, op, axis), layout=layout, shape=shape)

    def output(self, name: str, node: fx.Node, layout: str | None = None, shape=None, kind: str = "output") -> None:
        self.outputs.append(Role(RoleKind(kind), name))
        self.results.append(node)
        if layout is not None:
            self.line -= 1
            self._note(node, layout, shape)

    def program(self) -> Program:
        self.graph.output(tuple(self.results))
        graph = fx.GraphModule(torch.nn.Module(), self.graph)
        return Program(graph, Signature(tuple(self.inputs), tuple(self.outputs)), self.mesh)


def mlp(mesh: str | None, rows: int = 6, width: int = 8, hidden: int = 24) -> Program:
    """Forward and backward of a Megatron MLP on axis tp; the first layer is cut by column, the second by row."""
    hand = Hand(mesh)
    parts = 1 if mesh is None else Mesh.parse(mesh).axis_size("tp")
    other = "" if mesh is None or "dp" not in mesh else "R,"
    x = hand.input("x", (rows, width), other + "R")
    w1 = hand.input("w1", (width, hidden), other + "S(1)", "param")
    b1 = hand.input("b1.bias", (hidden,), other + "S(0)", "param")
    w2 = hand.input("w2", (hidden, width), other + "S(0)", "param")
    b2 = hand.input("b2.bias", (width,), other + "R", "param")
    dy = hand.input("out", (rows, width), other + "R", "tangent")
    before = hand.call(aten.addmm.default, b1, x, w1)
    after = hand.call(aten.gelu.default, before)
    product = hand.reduce(hand.call(aten.mm.default, after, w2, name="product"))
    y = hand.call(aten.add.Tensor, product, b2)
    hand.output("out", y, other + "R", (rows, width))
    hand.output("b2.bias", hand.call(aten.sum.dim_IntList, dy, [0]), other + "R", (width,), "gradient")
    dw2 = hand.call(aten.mm.default, hand.call(aten.t.default, after), dy)
    hand.output("w2", dw2, other + "S(0)", (hidden, width), "gradient")
    dafter = hand.call(aten.mm.default, dy, hand.call(aten.t.default, w2))
    dbefore = hand.call(aten.gelu_backward.default, dafter, before)
    hand.output(
        "w1", hand.call(aten.mm.default, hand.call(aten.t.default, x), dbefore), other + "S(1)", (width, hidden), "gradient"
    )
    hand.output("b1.bias", hand.call(aten.sum.dim_IntList, dbefore, [0]), other + "S(0)", (hidden,), "gradient")
    dx = hand.reduce(hand.call(aten.mm.default, dbefore, hand.call(aten.t.default, w1)))
    hand.output("x", dx, other + "R", (rows, width), "gradient")
    assert parts >= 1
    return hand.program()


def attention(mesh: str | None, batch: int = 2, sequence: int = 4, heads: int = 4, size: int = 3) -> Program:
    """Self-attention with heads cut over tp, batch over dp when the mesh has it; merging batch and heads makes strided shards."""
    hand = Hand(mesh)
    sizes = {} if mesh is None else dict(Mesh.parse(mesh).axes)
    b, h = batch // sizes.get("dp", 1), heads // sizes.get("tp", 1)
    rows = "S(0)," if "dp" in sizes else ""
    whole = "R," if "dp" in sizes else ""
    width = heads * size
    x = hand.input("x", (batch, sequence, width), rows + "R")
    weights = [hand.input(n, (width, width), whole + "S(1)", "param") for n in ("wq", "wk", "wv")]
    wo = hand.input("wo", (width, width), whole + "S(0)", "param")
    flat = hand.call(aten.view.default, x, [b * sequence, width])

    def project(weight: fx.Node) -> fx.Node:
        made = hand.call(aten.view.default, hand.call(aten.mm.default, flat, weight), [b, sequence, h, size])
        turned = hand.call(aten.clone.default, hand.call(aten.transpose.int, made, 1, 2), memory_format=torch.contiguous_format)
        return hand.call(aten.view.default, turned, [b * h, sequence, size])

    q, k, v = map(project, weights)
    scores = hand.call(aten.mul.Tensor, hand.call(aten.bmm.default, q, hand.call(aten.transpose.int, k, 1, 2)), 0.5)
    mixed = hand.call(aten.bmm.default, hand.call(aten._softmax.default, scores, -1, False), v)
    back = hand.call(aten.transpose.int, hand.call(aten.view.default, mixed, [b, h, sequence, size]), 1, 2)
    back = hand.call(aten.clone.default, back, memory_format=torch.contiguous_format)
    out = hand.reduce(hand.call(aten.mm.default, hand.call(aten.view.default, back, [b * sequence, h * size]), wo))
    hand.output("out", hand.call(aten.view.default, out, [b, sequence, width]), rows + "R", (batch, sequence, width))
    return hand.program()
