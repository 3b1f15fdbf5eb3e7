"""Small programs, a small rule table and a brute-force planner for the tests of planning."""

from __future__ import annotations

import itertools

import torch
from torch.fx.experimental.proxy_tensor import make_fx

from hocket.compiler.cost.cluster import COLLECTIVES, Cluster, Line
from hocket.compiler.cost.estimate import redistributions
from hocket.compiler.cost.ops import LocalTensor, work
from hocket.compiler.layout import Partial, Replicate, Shard, local_shape
from hocket.compiler.plan.constraints import possible_placements
from hocket.compiler.plan.plan import NodePlan
from hocket.compiler.plan.view import view_program
from hocket.compiler.program import Note, Program, Role, RoleKind, Signature, annotate
from hocket.compiler.rules.rule import Rule

aten = torch.ops.aten
R, P = Replicate(), Partial("sum")

# compute and wire on the same scale, so that plans are mixed
CLUSTER = Cluster("cpu", {"float32": 1e9}, 1e9, 1e-7, {kind: Line(2e-7, (2 + i) * 1e-9) for i, kind in enumerate(COLLECTIVES)})


class TinyRules:
    """Rules of a few ops on matrices, with torch's semantics."""

    def rules(self, node, parts):
        cuts = []
        match node.target:
            case aten.mm.default:
                cuts = [((Shard(0), R), Shard(0)), ((R, Shard(1)), Shard(1)), ((Shard(1), Shard(0)), P)]
            case aten.add.Tensor:
                cuts = [((p, p), p) for p in (Shard(0), Shard(1), P)]
            case aten.mul.Tensor:
                cuts = [((p, p), p) for p in (Shard(0), Shard(1))] + [((P, R), P), ((R, P), P)]
            case aten.t.default:
                cuts = [((Shard(0),), Shard(1)), ((Shard(1),), Shard(0)), ((P,), P)]
            case aten.relu.default:
                cuts = [((p,), p) for p in (Shard(0), Shard(1))]
        inputs = 2 if node.target in (aten.mm.default, aten.add.Tensor, aten.mul.Tensor) else 1
        return (Rule((R,) * inputs, (R,), "whole"), *(Rule(i, (o,), "tiny") for i, o in cuts))

    def explain(self, node, parts):
        return f"no rule for {node.target}" if len(self.rules(node, parts)) == 1 else ""


def program_of(function, inputs, outputs, sizes=None):
    """A Program of a function of tensors. inputs: (Role, tensor) pairs; outputs: roles of what it returns (a tuple)."""
    graph = make_fx(function)(*(tensor for _, tensor in inputs))
    roles = [role for role, _ in inputs]
    placeholders = iter(roles)
    for node in graph.graph.nodes:
        node.meta["hocket"] = Note()
        if node.op == "placeholder":
            annotate(node, role=next(placeholders))
    return Program(graph, Signature(tuple(roles), tuple(outputs)), sizes=sizes or {})


def role(kind, name):
    """``role("param", "w")``."""
    return Role(RoleKind(kind), name)


def seconds_of(view, nodes, results, prices):
    """The cost model, written down once more: every op once, every distinct (value, layout) once."""
    total = 0.0
    for site in view.sites:
        if not site.is_op:
            continue
        planned = nodes[site.name]

        def local(value, layout):
            tensor = view.values[value].type
            return LocalTensor(local_shape(tensor.shape, layout, prices.mesh), tensor.itemsize)

        done = work(
            site.node.target,
            [local(v, x) for v, x in zip(site.uses, planned.inputs, strict=True)],
            [local(v, x) for v, x in zip(site.makes, planned.outputs, strict=True)],
        )
        total += 0.0 if done.is_view else prices.cluster.op_seconds(done.flops, done.bytes_moved)
    for move in redistributions(view, nodes, results):
        tensor = view.values[move.value].type
        found = prices.price(move.source, move.target, tensor.shape, tensor.itemsize)
        if found is None:
            return float("inf")
        total += found.seconds
    return total


def brute_force(program, rules, prices, *, gradients="any"):
    """The least seconds over all assignments on one axis."""
    view = view_program(program, gradients_like_parameters=gradients == "like-params")
    parts = prices.mesh.size
    choices = []
    for site in view.sites:
        if site.is_op:
            choices.append(
                [NodePlan(tuple((p,) for p in r.inputs), tuple((p,) for p in r.outputs)) for r in rules.rules(site.node, parts)]
            )
        else:
            value = site.makes[0] if site.is_input else site.uses[0]
            choices.append(
                [NodePlan((), ((p,),)) for p in possible_placements(site.role.kind, view.values[value].type.shape, parts)]
            )
    best = float("inf")
    for combination in itertools.product(*choices):
        nodes = {site.name: planned for site, planned in zip(view.sites, combination, strict=True) if site.node is not None}
        results = [None] * len(program.signature.outputs)
        for position, use in enumerate(view.results):
            if use is not None:
                results[position] = combination[use[0]].outputs[0]
        best = min(best, seconds_of(view, nodes, results, prices))
    return best
