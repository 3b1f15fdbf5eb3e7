"""A two-layer network and its tensor-parallel lowering written by hand, with one bug switched on at a time."""

from __future__ import annotations

import torch
import torch.fx as fx
from torch import nn

from hocket.compiler.capture import capture
from hocket.compiler.layout import Partial, Replicate, Shard
from hocket.compiler.program import Program, annotate, copy_program, note
from hocket.runtime.mesh import Mesh

aten = torch.ops.aten
c10d = torch.ops._c10d_functional
R, ROWS, COLUMNS, SUM = (Replicate(),), (Shard(0),), (Shard(1),), (Partial("sum"),)


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(6, 8)
        self.down = nn.Linear(8, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(torch.nn.functional.silu(self.up(x)))


def logical() -> Program:
    torch.manual_seed(0)
    return capture(Network(), (torch.randn(4, 6, requires_grad=True),))


LAYOUTS = {"up.weight": ROWS, "up.bias": ROWS, "down.weight": COLUMNS, "down.bias": R}


def tensor_parallel(program: Program, ranks: int, bug: str = "") -> Program:
    """Columns of the first layer and rows of the second on each rank; one all-reduce forward, one backward."""
    lowered, mapping = copy_program(program)
    graph = lowered.graph.graph
    for old, new in mapping.items():
        if new.op != "output":
            annotate(new, origin=old.name)
    for node, role in zip(lowered.placeholders, lowered.signature.inputs, strict=True):
        annotate(node, layouts=(LAYOUTS.get(role.name, R),))
    for node, role in zip(lowered.results, lowered.signature.outputs, strict=True):
        assert node is not None
        annotate(node, layouts=(LAYOUTS.get(role.name, R),))
    for node in list(graph.nodes):
        if node.target is aten.view.default and note(node).layouts == (ROWS,):
            node.args = (node.args[0], [8 // ranks])
    second = [node for node in graph.nodes if node.target is aten.addmm.default][1]
    bias, hidden, weight = second.args
    with graph.inserting_before(second):
        product = graph.call_function(aten.mm.default, (hidden, weight))
        total = product if bug == "no forward all-reduce" else reduced(graph, product, "avg" if bug == "averaged" else "sum")
        if bug == "reduced twice":
            total = reduced(graph, total, "sum")
        added = graph.call_function(aten.add.Tensor, (total, bias))
        if bug == "bias on every rank":
            added = reduced(graph, graph.call_function(aten.add.Tensor, (product, bias)), "sum")
    for new in (product, total, added):
        new.meta = dict(second.meta)
    annotate(product, origin="", added_by="shard")
    annotate(added, layouts=(R,))
    second.replace_all_uses_with(added)
    graph.erase_node(second)
    grad = lowered.results[-1]
    assert grad is not None
    if bug != "no backward all-reduce":
        with graph.inserting_after(grad):
            whole = reduced(graph, grad, "sum", after=grad)
        whole.meta = dict(grad.meta)
        grad.replace_all_uses_with(whole, delete_user_cb=lambda user: user.op == "output")
    return lowered.replace(graph=fx.GraphModule(nn.Module(), graph), mesh=Mesh((("tp", ranks),)))


def reduced(graph: fx.Graph, value: fx.Node, op: str, after: fx.Node | None = None) -> fx.Node:
    started = graph.call_function(c10d.all_reduce.default, (value, op, "tp"))
    started.meta = dict(value.meta)
    if after is not None:
        with graph.inserting_after(started):
            return finished(graph, started)
    return finished(graph, started)


def finished(graph: fx.Graph, started: fx.Node) -> fx.Node:
    waited = graph.call_function(c10d.wait_tensor.default, (started,))
    waited.meta = dict(started.meta)
    return waited


BUGS = ("no forward all-reduce", "averaged", "reduced twice", "bias on every rank", "no backward all-reduce")
