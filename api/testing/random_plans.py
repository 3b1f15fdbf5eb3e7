"""Random valid plans: any rule of the table on any axis for any node, whatever it costs."""

from __future__ import annotations

import operator
import random
from collections.abc import Iterator
from typing import Any

import torch
import torch.fx as fx

from ..compiler.contract import Context
from ..compiler.cost.cost import Cost
from ..compiler.layout import Layout, Partial, Placement, Replicate, Shard, has_empty_piece
from ..compiler.plan.plan import Certificate, NodePlan, Plan
from ..compiler.program import Program, Role, RoleKind, producer, tensor_inputs, tensor_leaves
from ..compiler.rules.rule import Rule
from ..compiler.rules.table import RuleTable
from ..runtime.mesh import Mesh

TABLE = RuleTable(None)
"""Shared by all tests of a run, so that an op is judged once."""


def rules_of(node: fx.Node, parts: int) -> tuple[Rule, ...]:
    """Every rule of a call, the replicate rule included."""
    return TABLE.rules(node, parts)


def any_placement(value: torch.Tensor, choose: random.Random) -> Placement:
    """Whole, or cut along any dimension that is at least two long."""
    return choose.choice([Replicate(), *(Shard(dim) for dim, size in enumerate(value.shape) if size > 1)])


def any_layout(value: torch.Tensor, mesh: Mesh, choose: random.Random) -> Layout:
    """One such placement per axis."""
    return tuple(any_placement(value, choose) for _ in mesh.axes)


def random_plan(program: Program, mesh: Mesh, choose: random.Random, *, boldness: float = 0.85) -> Plan:
    """boldness: how often a rule that cuts something is preferred to replication."""
    nodes: dict[str, NodePlan] = {}
    for node in program.nodes:
        if node.op == "placeholder":
            nodes[node.name] = NodePlan((), (any_layout(node.meta["val"], mesh, choose),))
        elif node.op == "call_function" and node.target is not operator.getitem:
            nodes[node.name] = _any_rules(node, nodes, mesh, choose, boldness)
    results = tuple(_results(program, nodes, mesh, choose))
    return Plan(mesh, nodes, results, Cost(), Certificate(0.0, 0.0, "random"))


def _any_rules(node: fx.Node, nodes: dict[str, NodePlan], mesh: Mesh, choose: random.Random, boldness: float) -> NodePlan:
    chosen: list[Rule] = []
    for axis, parts in enumerate(mesh.shape):
        rules = [
            rule
            for rule in rules_of(node, parts)
            if _reachable(rule, node, nodes, axis) and _feeds_all([*chosen, rule], node, mesh)
        ]
        cutting = [rule for rule in rules if not rule.is_replicate]
        partial = [rule for rule in cutting if any(isinstance(p, Partial) for p in rule.inputs)]
        pool = cutting if cutting and choose.random() < boldness else rules
        chosen.append(choose.choice(partial if partial and choose.random() < 0.5 else pool))
    inputs = tuple(tuple(rule.inputs[i] for rule in chosen) for i in range(len(chosen[0].inputs)))
    outputs: list[Layout | None] = []
    for i, leaf in enumerate(tensor_leaves(node.meta["val"])):
        placements = tuple(rule.outputs[i] for rule in chosen)
        outputs.append(placements if isinstance(leaf, torch.Tensor) else None)  # type: ignore[arg-type]
    return NodePlan(inputs, tuple(outputs), tuple(rule.origin for rule in chosen))


def _feeds_all(chosen: list[Rule], node: fx.Node, mesh: Mesh) -> bool:
    """No rank is left without a piece by the rules of the outermost axes."""
    outer = Mesh(mesh.axes[: len(chosen)])
    pairs: list[tuple[Any, list[Any]]] = []
    for i, argument in enumerate(tensor_inputs(node)):
        pairs.append((argument.meta["val"], [rule.inputs[i] for rule in chosen]))
    for i, leaf in enumerate(tensor_leaves(node.meta["val"])):
        pairs.append((leaf, [rule.outputs[i] for rule in chosen]))
    return not any(isinstance(value, torch.Tensor) and has_empty_piece(value.shape, tuple(row), outer) for value, row in pairs)


def _reachable(rule: Rule, node: fx.Node, nodes: dict[str, NodePlan], axis: int) -> bool:
    """A partial input must have been made partial in the same way."""
    for argument, wanted in zip(tensor_inputs(node), rule.inputs, strict=True):
        source, index = producer(argument)
        made = nodes[source.name].outputs[index]
        if isinstance(wanted, Partial) and (made is None or made[axis] != wanted):
            return False
    return True


def _results(program: Program, nodes: dict[str, NodePlan], mesh: Mesh, choose: random.Random) -> Iterator[Layout | None]:
    """A gradient leaves like its parameter, anything else in any layout."""
    placeholders = dict(zip(program.signature.inputs, program.placeholders, strict=True))
    for role, node in zip(program.signature.outputs, program.results, strict=True):
        parameter = placeholders.get(Role(RoleKind.PARAM, role.name))
        if node is None:
            yield None
        elif role.kind is RoleKind.GRADIENT and parameter is not None:
            yield nodes[parameter.name].outputs[0]
        else:
            yield any_layout(node.meta["val"], mesh, choose)


def context(plan: Plan) -> Context:
    """What the shard pass looks at."""
    return Context(plan.mesh, rules=None, cluster=None, plan=plan)  # type: ignore[arg-type]


def random_inputs(program: Program, seed: int) -> dict[Role, torch.Tensor]:
    """Values of all inputs: small integers in [0, 4) where they are indices, uniform in [0.5, 1.5) otherwise."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for role, node in zip(program.signature.inputs, program.placeholders, strict=True):
        val = node.meta["val"]
        if role.kind is RoleKind.CONSTANT:
            continue
        if val.is_floating_point():
            found[role] = torch.rand(val.shape, generator=generator, dtype=torch.float64) + 0.5
        else:
            found[role] = torch.randint(0, 2 if val.dtype is torch.bool else 4, val.shape, generator=generator).to(val.dtype)
    return found
