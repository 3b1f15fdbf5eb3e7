"""Which weight gradients to compute later than the gradients of activations, and what that costs.

A *candidate* is a set of backward nodes that nothing but weight gradients needs: the last dense product on the way to the
gradient of a weight with everything after it (sums over uses of the weight, transposes, an all-reduce), or the few cheap ops of
a bias or scale. Weight gradients that share such nodes are one candidate.

    worth = seconds it takes / seconds it takes to read the bytes it keeps alive

A dense product of n x n weights on t rows takes ~ t n^2 for ~ 2 t n held numbers, the gradient of a bias or scale ~ t n for t
n: the first is worth deferring, the second is not, unless everything it reads is held anyway.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.fx as fx

from ..compiler.program import Decision, Phase, Program, RoleKind, note
from .backward_split_costs import Costs, is_alias, stored_bytes, work_of
from .backward_split_normal import is_backward

aten = torch.ops.aten

_HEAVY = frozenset({aten.embedding_dense_backward.default})
"""Besides dense products."""


@dataclass(frozen=True)
class Candidate:
    """results: nodes whose values are weight gradients; nodes: what is computed for them alone, in graph order; seconds: of
    those."""

    results: tuple[fx.Node, ...]
    nodes: tuple[fx.Node, ...]
    seconds: float
    has_product: bool

    def reads(self) -> set[fx.Node]:
        """Values from outside, views replaced by what they are views of."""
        own = set(self.nodes)
        return {base_of(source) for node in self.nodes for source in node.all_input_nodes if source not in own} - own


def base_of(node: fx.Node) -> fx.Node:
    """The node whose memory a view shows."""
    while is_alias(node) and node.all_input_nodes:
        node = node.all_input_nodes[0]
    return node


def is_at_hand(node: fx.Node) -> bool:
    """Whether a value is there throughout a step: an input other than a tangent or a value of another part."""
    role = note(node).role
    return node.op == "placeholder" and role is not None and role.kind not in (RoleKind.TANGENT, RoleKind.VALUE)


def is_heavy(node: fx.Node) -> bool:
    """Whether a backward node does the dense work of a weight gradient."""
    if node.target in _HEAVY:
        return True
    return node.op == "call_function" and isinstance(node.target, torch._ops.OpOverload) and bool(work_of(node).flops)


def weight_results(program: Program) -> dict[fx.Node, str]:
    """Backward nodes that are the gradient of a parameter, as a result or for the optimizer -> its name ("" for the latter)."""
    parameters = program.signature.inputs_of(RoleKind.PARAM)
    found: dict[fx.Node, str] = {}
    for node in program.nodes:
        if note(node).phase is Phase.OPTIMIZER and node.op == "call_function":
            found.update((source, "") for source in node.all_input_nodes if is_backward(source))
    for role, result in zip(program.signature.outputs, program.results, strict=True):
        if result is not None and role.kind is RoleKind.GRADIENT and role.name in parameters and is_backward(result):
            found[result] = role.name
    return found


def candidates(program: Program, costs: Costs) -> list[Candidate]:
    """All candidates, in the order in which the backward reaches them."""
    results = weight_results(program)
    reached = _reached_results(program, results)
    late = _after_last_product(program, reached)
    late |= {node for node in reached if node not in late and len(reached[node]) == 1 and _is_cheap(node, reached)}
    late -= {node for node in late if node.target is operator.getitem and node.args[0] not in late}
    groups = _join([reached[node] for node in program.nodes if node in late])
    order = [node for node in program.nodes if node in late]
    found = []
    for group in groups:
        nodes = tuple(node for node in order if reached[node] <= group)
        if nodes:
            product = any(is_heavy(node) for node in nodes)
            found.append(Candidate(tuple(n for n in order if n in group), nodes, sum(map(costs.seconds, nodes)), product))
    return sorted(found, key=lambda one: order.index(one.nodes[0]))


def _reached_results(program: Program, results: dict[fx.Node, str]) -> dict[fx.Node, frozenset[fx.Node]]:
    """Backward nodes that lead to nothing but weight gradients -> those they lead to."""
    parameters = program.signature.inputs_of(RoleKind.PARAM)
    other = {
        node
        for role, node in zip(program.signature.outputs, program.results, strict=True)
        if not (role.kind is RoleKind.GRADIENT and role.name in parameters)
    }
    reached: dict[fx.Node, frozenset[fx.Node]] = {}
    for node in reversed(program.nodes):
        if not is_backward(node) or node in other:
            continue
        users = [user for user in node.users if user.op != "output" and note(user).phase is not Phase.OPTIMIZER]
        if all(user in reached for user in users) and (users or node in results):
            own = {node} if node in results else set()
            reached[node] = frozenset(own.union(*(reached[user] for user in users)))
    return reached


def _after_last_product(program: Program, reached: dict[fx.Node, frozenset[fx.Node]]) -> set[fx.Node]:
    """The nodes from the last dense product on, on every way to a weight gradient."""
    before_product: set[fx.Node] = set()
    for node in reversed(program.nodes):
        if any(user in before_product or is_heavy(user) for user in node.users):
            before_product.add(node)
    late: set[fx.Node] = set()
    for node in program.nodes:
        if node in reached and node not in before_product and (is_heavy(node) or any(s in late for s in node.all_input_nodes)):
            late.add(node)
    return late


def _is_cheap(node: fx.Node, reached: dict[fx.Node, frozenset[fx.Node]]) -> bool:
    """Whether a node and all that follows it is free of dense products."""
    return not is_heavy(node) and all(user.op == "output" or user not in reached or _is_cheap(user, reached) for user in node.users)


def _join(sets: Iterable[frozenset[fx.Node]]) -> list[set[fx.Node]]:
    """Unite sets that have something in common."""
    groups: list[set[fx.Node]] = []
    for one in sets:
        touching = [group for group in groups if group & one]
        groups = [group for group in groups if not group & one]
        groups.append(set(one).union(*touching))
    return groups


def choose(
    found: list[Candidate], names: dict[fx.Node, str], costs: Costs, worth: float, by: str
) -> tuple[set[fx.Node], list[Decision]]:
    """The nodes to defer and a Decision per candidate. Dense ones are looked at first: what they hold is then free for the
    others."""
    held: set[fx.Node] = set()
    late: set[fx.Node] = set()
    decisions = []
    for candidate in sorted(found, key=lambda one: not one.has_product):
        fresh = {node for node in candidate.reads() if not is_at_hand(node) and node not in held and node not in late}
        size = sum(map(stored_bytes, fresh))
        ratio = candidate.seconds / (size * costs.seconds_per_byte()) if size else float("inf")
        applied = ratio >= worth
        if applied:
            late.update(candidate.nodes)
            held |= fresh
        decisions.append(_decision(candidate, names, size, ratio, applied=applied, by=by))
    return late, decisions


def _decision(candidate: Candidate, names: dict[fx.Node, str], size: int, ratio: float, *, applied: bool, by: str) -> Decision:
    what = ", ".join(names.get(node) or node.name for node in candidate.results)
    cost = (
        f"{candidate.seconds * 1e6:.0f} us for {size:,} bytes held"
        if size
        else f"{candidate.seconds * 1e6:.0f} us, holding nothing more"
    )
    if applied:
        reason = f"gradient of {what} deferred: {cost}"
    else:
        reason = f"gradient of {what} stays with the gradients of activations: {cost}, worth only {ratio:.1f} times reading them"
    first = next((node for node in candidate.nodes if is_heavy(node)), candidate.nodes[0])
    return Decision(by, candidate.results[0].name, applied, reason, None, note(first).source)
