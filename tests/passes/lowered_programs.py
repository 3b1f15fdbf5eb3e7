"""Small programs and plans written by hand, and what the collectives of a lowered one send."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.fx as fx
from torch._subclasses.fake_tensor import FakeTensorMode

from hocket.compiler.contract import Context
from hocket.compiler.cost.cost import Cost
from hocket.compiler.layout import Layout
from hocket.compiler.plan.plan import Certificate, NodePlan, Plan
from hocket.compiler.program import NOTE, Note, Phase, Program, Role, RoleKind, Signature
from hocket.passes.shard import Shard
from hocket.runtime.mesh import Mesh

c10d = torch.ops._c10d_functional


def program_of(function: object, shapes: dict[str, Sequence[int]], dtype: torch.dtype = torch.float64) -> Program:
    """A program of inputs with these shapes: ``function`` appends to the graph and returns the result nodes."""
    graph, mode = fx.Graph(), FakeTensorMode()
    nodes = []
    for name, shape in shapes.items():
        node = graph.placeholder(name)
        with mode:
            node.meta["val"] = torch.empty(tuple(shape), dtype=dtype)
        nodes.append(node)
    results = function(graph, *nodes)  # type: ignore[operator]
    for node in graph.nodes:
        node.meta[NOTE] = Note(phase=Phase.FORWARD, source=f"model.py:1 {node.name}")
        if node.op == "call_function":
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda m: m.meta["val"])
            with mode:
                node.meta["val"] = node.target(*args, **kwargs)
    graph.output(tuple(results))
    signature = Signature(
        tuple(Role(RoleKind.INPUT, name) for name in shapes), tuple(Role(RoleKind.OUTPUT, f"out[{i}]") for i in range(len(results)))
    )
    return Program(fx.GraphModule(torch.nn.Module(), graph), signature)


def plan_of(
    mesh: Mesh, nodes: dict[str, tuple[Sequence[Layout], Sequence[Layout | None]]], results: Sequence[Layout | None]
) -> Plan:
    """A plan from (input layouts, output layouts) per node."""
    entries = {name: NodePlan(tuple(inputs), tuple(outputs)) for name, (inputs, outputs) in nodes.items()}
    return Plan(mesh, entries, tuple(results), Cost(), Certificate(0.0, 0.0, "by hand"))


def lower(program: Program, plan: Plan, mesh: Mesh | None = None) -> Program:
    """Run the shard pass."""
    return Shard()(program, Context(mesh or plan.mesh, rules=None, cluster=None, plan=plan))  # type: ignore[arg-type]


def collectives(program: Program) -> list[fx.Node]:
    """The collectives of a lowered program, waits left out."""
    return [
        node
        for node in program.nodes
        if getattr(node.target, "namespace", "") == "_c10d_functional" and node.target is not c10d.wait_tensor.default
    ]


def bytes_sent(program: Program) -> float:
    """What rank 0 sends, read off the inputs of the collectives of the graph."""
    total = 0.0
    assert program.mesh is not None
    for node in collectives(program):
        value = node.args[0].meta["val"]  # type: ignore[union-attr]
        parts = program.mesh.axis_size(str(node.args[-1]))
        size = value.numel() * value.element_size()
        match node.target:
            case c10d.all_gather_into_tensor.default:
                total += (parts - 1) * size
            case c10d.all_reduce.default:
                total += 2 * (parts - 1) / parts * size
            case _:
                total += (parts - 1) / parts * size
    return total
