"""Small lowered programs around one or two collectives: what tensor, sequence, expert and data parallelism make of a layer.

Every rank holds values of its own: an input is cut along dimension 0 over the mesh, whatever it stands for, and so is every output.
So nothing is assumed about layouts, and two programs are equal only if they are equal on every rank for any values.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.fx as fx
from torch._subclasses.fake_tensor import FakeTensorMode

from hocket.compiler.layout import Shard
from hocket.compiler.program import NOTE, Note, Phase, Program, Role, RoleKind, Signature
from hocket.runtime.mesh import Mesh

aten, c10d = torch.ops.aten, torch.ops._c10d_functional


class Lines:
    """Appends calls and collectives, as the shard pass writes them."""

    def __init__(self, parts: int, dtype: torch.dtype = torch.float32) -> None:
        self.parts, self.dtype = parts, dtype
        self.graph, self.mode = fx.Graph(), FakeTensorMode()
        self.phase = Phase.FORWARD

    def input(self, name: str, shape: Sequence[int]) -> fx.Node:
        node = self.graph.placeholder(name)
        with self.mode:
            return self._noted(node, torch.empty(tuple(shape), dtype=self.dtype))

    def _noted(self, node: fx.Node, val: Any) -> fx.Node:
        node.meta["val"] = val
        whole = isinstance(val, torch.Tensor) and val.dim() > 0
        layouts = ((Shard(0),),) if whole else None
        shapes = ((val.shape[0] * self.parts, *val.shape[1:]),) if whole else None
        node.meta[NOTE] = Note(phase=self.phase, source=f"model.py:1 {node.name}", layouts=layouts, global_shapes=shapes)
        return node

    def call(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        node = self.graph.call_function(target, args, kwargs)
        values, named = fx.node.map_arg((args, kwargs), lambda n: n.meta["val"])
        with self.mode:
            return self._noted(node, target(*values, **named))

    def __getattr__(self, name: str) -> Callable[..., fx.Node]:
        packet = getattr(aten, name)
        special = {"permute": "default", "sum": "dim_IntList", "add": "Tensor", "mul": "Tensor", "transpose": "int"}
        return lambda *args, **kw: self.call(getattr(packet, special.get(name, "default")), *args, **kw)

    def _send(self, target: Any, args: tuple[Any, ...], shape: Sequence[int]) -> fx.Node:
        started = self.graph.call_function(target, args)
        with self.mode:
            self._noted(started, torch.empty(tuple(shape), dtype=args[0].meta["val"].dtype))
        waited = self.graph.call_function(c10d.wait_tensor.default, (started,))
        return self._noted(waited, started.meta["val"])

    def size(self, x: fx.Node) -> list[int]:
        return list(x.meta["val"].shape)

    def gather(self, x: fx.Node, dim: int = 0) -> fx.Node:
        x = self.contiguous(x)
        size, p = self.size(x), self.parts
        found = self._send(c10d.all_gather_into_tensor.default, (x, p, "tp"), [p * size[0], *size[1:]])
        if dim == 0:
            return self.contiguous(found)
        order = [*range(1, dim + 1), 0, *range(dim + 1, len(size) + 1)]
        apart = self.permute(self.reshape(found, [p, *size]), order)
        return self.contiguous(self.reshape(apart, [*size[:dim], p * size[dim], *size[dim + 1 :]]))

    def scatter(self, x: fx.Node, dim: int = 0, op: str = "sum") -> fx.Node:
        size, p = self.size(x), self.parts
        if dim:
            split = [*size[:dim], p, size[dim] // p, *size[dim + 1 :]]
            x = self.permute(self.reshape(x, split), [dim, *(d for d in range(len(size) + 1) if d != dim)])
        x = self.contiguous(x)
        size = self.size(x)
        found = self._send(c10d.reduce_scatter_tensor.default, (x, op, p, "tp"), [size[0] // p, *size[1:]])
        return self.call(aten.squeeze.dim, found, 0) if dim else found

    def reduce(self, x: fx.Node, op: str = "sum") -> fx.Node:
        return self._send(c10d.all_reduce.default, (x, op, "tp"), self.size(x))

    def exchange(self, x: fx.Node) -> fx.Node:
        each = [self.size(x)[0] // self.parts] * self.parts
        return self._send(c10d.all_to_all_single.default, (self.contiguous(x), each, each, "tp"), self.size(x))

    def item(self, x: fx.Node, index: int) -> fx.Node:
        node = self.graph.call_function(operator.getitem, (x, index))
        return self._noted(node, x.meta["val"][index])


@dataclass(frozen=True)
class Pattern:
    """body: appends to ``Lines`` and returns the outputs; shapes: of the inputs on a rank; fused: how many loops it becomes."""

    body: Callable[..., Any]
    shapes: tuple[tuple[int, ...], ...]
    fused: int = 1


def program_of(pattern: Pattern, parts: int = 2, dtype: torch.dtype = torch.float32) -> Program:
    """The program of a pattern on a mesh of one axis."""
    lines = Lines(parts, dtype)
    inputs = [lines.input(f"x{i}", shape) for i, shape in enumerate(pattern.shapes)]
    made = pattern.body(lines, *inputs)
    results = list(made) if isinstance(made, (tuple, list)) else [made]
    lines.graph.output(tuple(results))
    roles = tuple(Role(RoleKind.INPUT, f"x{i}") for i in range(len(inputs)))
    outputs = tuple(Role(RoleKind.OUTPUT, f"out[{i}]") for i in range(len(results)))
    return Program(fx.GraphModule(torch.nn.Module(), lines.graph), Signature(roles, outputs), mesh=Mesh((("tp", parts),)))


def linear3(g: Lines, x: fx.Node, w: fx.Node, b: fx.Node | None = None) -> fx.Node:
    """F.linear on [B, S, D], as it is traced."""
    size = g.size(x)
    flat = g.view(x, [size[0] * size[1], size[2]])
    made = g.mm(flat, g.t(w)) if b is None else g.addmm(b, flat, g.t(w))
    return g.view(made, [size[0], size[1], g.size(w)[0]])


def norm(g: Lines, x: fx.Node, w: fx.Node, b: fx.Node) -> fx.Node:
    """Layer norm over the last dimension."""
    return g.item(g.native_layer_norm(x, [g.size(x)[-1]], w, b, 1e-5), 0)


def _mlp(g: Lines, x, gain, shift, w1, b1, w2):
    hidden = g.gelu(linear3(g, norm(g, g.gather(x, 1), gain, shift), w1, b1))
    return g.scatter(linear3(g, hidden, w2), 1)


def _flat_mlp(g: Lines, x, w1, w2):
    return g.scatter(g.mm(g.relu(g.mm(g.gather(x), w1)), w2))


def _gated(g: Lines, x, w1, w3, w2):
    y = g.gather(x)
    return g.scatter(g.mm(g.mul(g.silu(g.mm(y, w1)), g.mm(y, w3)), w2))


def _qkv(g: Lines, x, a, b, c):
    y = g.gather(x)
    return g.mm(y, a), g.mm(y, b), g.mm(y, c)


def _extra_user(g: Lines, x, w):
    y = g.gather(x)
    return g.mm(y, w), g.relu(y)


def _two_users(g: Lines, x, w):
    y = g.mm(x, w)
    return g.scatter(y), g.sum(y, [0])


def _residual_inside(g: Lines, x, w, r):
    return g.scatter(g.add(g.mm(x, w), r))


def _sandwich_backward(g: Lines, dy, w2, h, w1):
    """The backward of the flat MLP: gather of dy, two products and the mask, scattered sum; and both weight gradients."""
    d = g.gather(dy)
    dh = g.threshold_backward(g.mm(d, g.t(w2)), h, 0)
    dw2 = g.mm(g.t(h), d)
    return g.scatter(g.mm(dh, g.t(w1))), dw2


PATTERNS: dict[str, Pattern] = {
    "gather 0 -> mm": Pattern(lambda g, x, w: g.mm(g.gather(x), w), ((4, 6), (6, 5))),
    "gather 0 -> three mm": Pattern(_qkv, ((4, 6), (6, 5), (6, 4), (6, 3))),
    "gather 1 of 3d -> linear": Pattern(lambda g, x, w: linear3(g, g.gather(x, 1), w), ((2, 4, 6), (5, 6))),
    "gather 0 -> linear with bias": Pattern(lambda g, x, w, b: g.addmm(b, g.gather(x), g.t(w)), ((4, 6), (5, 6), (5,))),
    "gather 1 of 3d -> linear with bias": Pattern(lambda g, x, w, b: linear3(g, g.gather(x, 1), w, b), ((2, 4, 6), (5, 6), (5,))),
    "gather last -> mm: contracted": Pattern(lambda g, x, w: g.mm(g.gather(x, 1), w), ((4, 6), (12, 5))),
    "x @ gathered weight": Pattern(lambda g, x, w: g.mm(x, g.gather(w)), ((4, 12), (6, 5))),
    "x @ gathered columns": Pattern(lambda g, x, w: g.mm(x, g.t(g.gather(w))), ((4, 6), (5, 6))),
    "gather -> relu -> mm": Pattern(lambda g, x, w: g.mm(g.relu(g.gather(x)), w), ((4, 6), (6, 5))),
    "gather -> scale -> mm": Pattern(lambda g, x, s, w: g.mm(g.mul(g.gather(x), s), w), ((4, 6), (6,), (6, 5))),
    "gather -> norm -> mm": Pattern(lambda g, x, a, b, w: g.mm(norm(g, g.gather(x), a, b), w), ((4, 6), (6,), (6,), (6, 5))),
    "gather -> softmax -> mm": Pattern(lambda g, x, w: g.mm(g._softmax(g.gather(x), 1, False), w), ((4, 6), (6, 5))),
    "weight gradient of a gathered input": Pattern(lambda g, x, d: g.mm(g.t(g.gather(x)), d), ((4, 6), (8, 5))),
    "weight gradient of gathered outputs": Pattern(lambda g, d, x: g.mm(g.t(x), g.gather(d)), ((4, 6), (8, 5))),
    "gather -> bmm of experts": Pattern(lambda g, x, w: g.bmm(g.gather(x, 1), w), ((4, 3, 6), (4, 6, 5))),
    "gather experts -> bmm": Pattern(lambda g, x, w: g.bmm(g.gather(x), w), ((2, 3, 6), (4, 6, 5))),
    "gather with another reader": Pattern(_extra_user, ((4, 6), (6, 5))),
    "gather -> transposed -> mm": Pattern(lambda g, x, w: g.mm(w, g.t(g.gather(x))), ((4, 6), (5, 6))),
    "mm -> scatter 0": Pattern(lambda g, x, w: g.scatter(g.mm(x, w)), ((8, 6), (6, 5))),
    "mm -> scatter 0, mean": Pattern(lambda g, x, w: g.scatter(g.mm(x, w), op="avg"), ((8, 6), (6, 5))),
    "linear of 3d -> scatter 1": Pattern(lambda g, x, w: g.scatter(linear3(g, x, w), 1), ((2, 8, 6), (5, 6))),
    "linear with bias -> scatter 0": Pattern(lambda g, x, w, b: g.scatter(g.addmm(b, x, g.t(w))), ((8, 6), (5, 6), (5,))),
    "linear of 3d with bias -> scatter 1": Pattern(lambda g, x, w, b: g.scatter(linear3(g, x, w, b), 1), ((2, 8, 6), (5, 6), (5,))),
    "mm -> scatter last": Pattern(lambda g, x, w: g.scatter(g.mm(x, w), 1), ((8, 6), (6, 4))),
    "mm -> scale -> scatter": Pattern(lambda g, x, w: g.scatter(g.mul(g.mm(x, w), 0.5)), ((8, 6), (6, 5))),
    "mm + mm + mm -> scatter": Pattern(
        lambda g, x, y, z, a, b, c: g.scatter(g.add(g.add(g.mm(x, a), g.mm(y, b)), g.mm(z, c))),
        ((8, 6), (8, 6), (8, 6), (6, 5), (6, 5), (6, 5)),
    ),
    "mm with two readers -> scatter": Pattern(_two_users, ((8, 6), (6, 5))),
    "mm + residual -> scatter": Pattern(_residual_inside, ((8, 6), (6, 5), (8, 5))),
    "bmm -> scatter 1": Pattern(lambda g, x, w: g.scatter(g.bmm(x, w), 1), ((4, 8, 6), (4, 6, 5))),
    "bmm -> scatter experts": Pattern(lambda g, x, w: g.scatter(g.bmm(x, w)), ((4, 8, 6), (4, 6, 5))),
    "mm -> gelu -> scatter": Pattern(lambda g, x, w: g.scatter(g.gelu(g.mm(x, w))), ((8, 6), (6, 5))),
    "weight gradient -> scatter": Pattern(lambda g, x, d: g.scatter(g.mm(g.t(x), d)), ((6, 8), (6, 5))),
    "weight gradient -> transposed -> scatter": Pattern(lambda g, x, d: g.scatter(g.t(g.mm(g.t(x), d))), ((6, 5), (6, 8))),
    "mm -> reduce": Pattern(lambda g, x, w: g.reduce(g.mm(x, w)), ((8, 6), (6, 5))),
    "mm -> reduce -> + residual": Pattern(lambda g, x, w, r: g.add(g.reduce(g.mm(x, w)), r), ((8, 6), (6, 5), (8, 5))),
    "linear of 3d -> reduce": Pattern(lambda g, x, w: g.reduce(linear3(g, x, w)), ((4, 3, 6), (5, 6))),
    "linear with bias -> reduce": Pattern(lambda g, x, w, b: g.reduce(g.addmm(b, x, g.t(w))), ((8, 6), (5, 6), (5,))),
    "mm -> reduce, mean": Pattern(lambda g, x, w: g.reduce(g.mm(x, w), "avg"), ((8, 6), (6, 5))),
    "weight gradient -> reduce": Pattern(lambda g, x, d: g.reduce(g.mm(g.t(x), d)), ((6, 8), (6, 5))),
    "input gradients of three -> reduce": Pattern(
        lambda g, x, y, a, b: g.reduce(g.add(g.mm(x, g.t(a)), g.mm(y, g.t(b)))), ((8, 6), (8, 6), (5, 6), (5, 6))
    ),
    "bmm -> reduce": Pattern(lambda g, x, w: g.reduce(g.bmm(x, w)), ((4, 3, 6), (4, 6, 5))),
    "exchange -> mm": Pattern(lambda g, x, w: g.mm(g.exchange(x), w), ((8, 6), (6, 5))),
    "exchange -> relu -> mm": Pattern(lambda g, x, w: g.mm(g.relu(g.exchange(x)), w), ((8, 6), (6, 5))),
    "exchange -> experts": Pattern(lambda g, x, w: g.bmm(g.exchange(x), w), ((4, 3, 6), (4, 6, 5))),
    "mm -> exchange": Pattern(lambda g, x, w: g.exchange(g.mm(x, w)), ((8, 6), (6, 5))),
    "experts -> exchange": Pattern(lambda g, x, w: g.exchange(g.bmm(x, w)), ((4, 3, 6), (4, 6, 5))),
    "dispatch -> mm -> combine": Pattern(lambda g, x, w: g.exchange(g.mm(g.exchange(x), w)), ((8, 6), (6, 5))),
    "dispatch -> expert MLP -> combine": Pattern(
        lambda g, x, a, b: g.exchange(g.mm(g.relu(g.mm(g.exchange(x), a)), b)), ((8, 6), (6, 5), (5, 6))
    ),
    "gather -> mm -> scatter": Pattern(lambda g, x, w: g.scatter(g.mm(g.gather(x), w)), ((4, 6), (6, 5))),
    "gather -> MLP -> scatter": Pattern(_flat_mlp, ((4, 6), (6, 5), (5, 6))),
    "gather -> gated MLP -> scatter": Pattern(_gated, ((4, 6), (6, 5), (6, 5), (5, 6))),
    "gather 1 -> norm -> MLP -> scatter 1": Pattern(_mlp, ((2, 4, 6), (6,), (6,), (5, 6), (5,), (6, 5))),
    "gather -> MLP -> reduce": Pattern(
        lambda g, x, a, b: g.reduce(g.mm(g.relu(g.mm(g.gather(x), a)), b)), ((4, 6), (6, 5), (5, 6))
    ),
    "gather -> gradients -> scatter": Pattern(_sandwich_backward, ((4, 6), (5, 6), (8, 5), (7, 5))),
    "gather, mm, gather, mm": Pattern(
        lambda g, x, w, y, v: (g.mm(g.gather(x), w), g.mm(g.gather(y), v)), ((4, 6), (6, 5), (4, 6), (6, 5)), 2
    ),
    "mm -> scatter, mm -> scatter": Pattern(
        lambda g, x, w, v: g.scatter(g.mm(g.scatter(g.mm(x, w)), v)), ((8, 6), (6, 5), (5, 4)), 2
    ),
    "mm -> reduce -> mm -> reduce": Pattern(
        lambda g, x, w, v: g.reduce(g.mm(g.relu(g.reduce(g.mm(x, w))), v)), ((8, 6), (6, 5), (5, 4)), 2
    ),
    "sum of a gather": Pattern(lambda g, x: g.sum(g.gather(x), [0]), ((4, 6),), 0),
    "scatter of a pointwise": Pattern(lambda g, x: g.scatter(g.relu(x)), ((8, 6),), 0),
    "mm -> softmax over rows -> scatter": Pattern(lambda g, x, w: g.scatter(g._softmax(g.mm(x, w), 0, False)), ((8, 6), (6, 5)), 0),
    "mm -> largest": Pattern(lambda g, x, w: g.reduce(g.mm(x, w), "max"), ((8, 6), (6, 5)), 0),
}
