"""Graphs of one op, and a judge of rules that shares no code with the one under test: true sizes, ``layout.cut``, ``assemble``."""

from __future__ import annotations

import torch
import torch.fx as fx

from hocket.compiler.layout import Shard, assemble, cut, local_shape
from hocket.compiler.program import tensor_inputs, tensor_leaves
from hocket.compiler.rules.localise import localise
from hocket.compiler.rules.rule import Rule
from hocket.runtime.mesh import Mesh

aten = torch.ops.aten


def op_node(target, *args, **kwargs) -> fx.Node:
    """A ``call_function`` node on placeholders, with real tensors as ``meta["val"]``."""
    graph = fx.Graph()

    def lift(value):
        if isinstance(value, torch.Tensor):
            node = graph.placeholder(f"x{len(graph.nodes)}")
            node.meta["val"] = value
            return node
        if isinstance(value, (list, tuple)):
            return type(value)(lift(item) for item in value)
        return value

    lifted = lift(list(args)), {name: lift(value) for name, value in kwargs.items()}
    node = graph.call_function(target, tuple(lifted[0]), lifted[1])
    node.meta["val"] = target(*args, **kwargs)
    return node


def rule_texts(rules) -> set[str]:
    """``"S(0), R -> S(0)"`` for every rule."""
    return {str(rule).split(" [")[0] for rule in rules}


def pieces_make_the_whole(node: fx.Node, rule: Rule, parts: int) -> bool:
    """Run the op on the pieces of its true operands, rank by rank, and assemble."""
    mesh = Mesh((("t", parts),))
    operands = [n.meta["val"] for n in tensor_inputs(node)]
    pieces = [cut(value, (p,), mesh) for value, p in zip(operands, rule.inputs, strict=True)]
    wholes = tensor_leaves(node.meta["val"])
    per_rank = []
    for rank in range(parts):
        mine = iter([p[rank].contiguous() for p in pieces])
        first = next(k for k, whole in enumerate(wholes) if isinstance(whole, torch.Tensor))
        size = local_shape(wholes[first].shape, (rule.outputs[first],), mesh, rank)
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n, mine=mine: next(mine))
        target, args, kwargs = localise(node.target, args, kwargs, size)
        per_rank.append(tensor_leaves(target(*args, **kwargs)))
    for position, (whole, placement) in enumerate(zip(wholes, rule.outputs, strict=True)):
        if placement is None:
            continue
        found = [outputs[position] for outputs in per_rank]
        if isinstance(placement, Shard):
            assert [tuple(f.shape) for f in found] == [local_shape(whole.shape, (placement,), mesh, r) for r in range(parts)]
        joined = assemble(found, (placement,), mesh)
        if joined.shape != whole.shape or not torch.allclose(joined.double(), whole.double(), rtol=1e-8, atol=1e-8, equal_nan=True):
            return False
    return True
