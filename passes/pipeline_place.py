"""Where every node of a step belongs once its forward is cut into stages.

    forward    as given
    backward   at the latest stage at which all it reads is at hand: gradients come from later stages, a forward value is at
               hand from the stage that makes it to the last one whose forward reads it, a parameter where the forward reads it
    optimizer  at the first stage that reads the parameter

Two kinds of nodes have no place of their own. Views are made anew by whoever reads them, so that what crosses a boundary is the
tensor they show. *Portable* nodes, which depend on no parameter and no activation (masks, positions, random numbers), are
computed by every stage that needs them rather than sent.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.fx as fx

from ..compiler.errors import InputError
from ..compiler.program import Phase, Program, RoleKind, annotate, note
from ..compiler.stages import PartKind
from .backward_split_choice import base_of, is_heavy
from .backward_split_costs import is_alias
from .pipeline_parts import is_inlined

KINDS = {
    Phase.FORWARD: PartKind.FORWARD,
    Phase.BACKWARD_INPUT: PartKind.BACKWARD_INPUT,
    Phase.BACKWARD_WEIGHT: PartKind.BACKWARD_WEIGHT,
    Phase.OPTIMIZER: PartKind.OPTIMIZER,
}


@dataclass(frozen=True)
class Placement:
    """stages: node -> stage, for every call that is neither a view nor portable nor the optimizer's; count: number of stages."""

    stages: Mapping[fx.Node, int]
    portable: frozenset[fx.Node]
    count: int


def kind_of(node: fx.Node) -> PartKind:
    """The part that a call belongs to, from its phase."""
    return KINDS[note(node).phase]


def place(program: Program, forward: Mapping[str, int], gradients: Mapping[str, fx.Node]) -> Placement:
    """Place every node. forward: name of a forward call -> its stage; a call that is not named goes where its inputs are.
    gradients: name of a parameter -> the node of its gradient.

    Raises InputError where a stage reads what a later one makes, or where a stage is left without work.
    """
    portable = portable_nodes(program)
    stages: dict[fx.Node, int] = {}
    for node in program.nodes:
        if node.op != "call_function" or is_inlined(node) or node in portable or note(node).phase is not Phase.FORWARD:
            continue
        before = [stages[base] for base in _bases(node) if base in stages]
        earliest = max(before, default=0)
        is_element = node.target is operator.getitem  # of a call's several results: belongs to the call
        stages[node] = earliest if is_element else forward.get(node.name, earliest)
        if stages[node] < earliest:
            raise InputError(
                f"{node.name} is at stage {stages[node]} but reads a value of stage {earliest}; a forward stage may only read what "
                f"earlier ones make (from {note(node).source or 'unknown'})"
            )
    count = 1 + max(stages.values(), default=0)
    idle = sorted(set(range(count)) - set(stages.values()))
    if idle:
        raise InputError(f"stage {idle[0]} of {count} has no work: every stage needs at least one op of the forward")
    _place_backward(program, stages, portable, gradients)
    return Placement(stages, portable, count)


def portable_nodes(program: Program) -> frozenset[fx.Node]:
    """Calls that need no parameter, no floating-point input and no changing buffer, and no dense product."""
    changed = program.signature.outputs_of(RoleKind.UPDATE)
    found: set[fx.Node] = set()
    for node in program.nodes:
        role = note(node).role
        if node.op == "placeholder" and role is not None:
            value = node.meta["val"]
            fixed = role.kind in (RoleKind.CONSTANT, RoleKind.SEED) or (role.kind is RoleKind.BUFFER and role.name not in changed)
            if fixed or (role.kind is RoleKind.INPUT and not value.is_floating_point()):
                found.add(node)
        elif (
            node.op == "call_function"
            and note(node).phase is not Phase.OPTIMIZER
            and not is_heavy(node)
            and all(source in found for source in node.all_input_nodes)
        ):
            found.add(node)
    return frozenset(node for node in found if node.op == "call_function")


def _bases(node: fx.Node) -> list[fx.Node]:
    return [base_of(source) for source in node.all_input_nodes]


def _place_backward(
    program: Program, stages: dict[fx.Node, int], portable: frozenset[fx.Node], gradients: Mapping[str, fx.Node]
) -> None:
    last_reader: dict[fx.Node, int] = {}
    for node, stage in stages.items():
        for base in (node, *_bases(node)):
            last_reader[base] = max(stage, last_reader.get(base, 0))
    wanted = _near_their_weights(program, last_reader, gradients)
    for node in program.nodes:
        if (
            node.op != "call_function"
            or node in stages
            or is_inlined(node)
            or node in portable
            or note(node).phase is Phase.OPTIMIZER
        ):
            continue
        limits = [
            stages[base] if base in stages and kind_of(base) is not PartKind.FORWARD else last_reader.get(base)
            for base in _bases(node)
        ]
        limits.append(wanted.get(node))
        stages[node] = min((limit for limit in limits if limit is not None), default=max(stages.values()))
        if node.target is operator.getitem:
            stages[node] = stages[node.args[0]]  # type: ignore[index]
    _advance_what_others_need(program, stages, _sums_of(gradients))


def _sums_of(gradients: Mapping[str, fx.Node]) -> set[fx.Node]:
    """The additions at the end of gradients, whose terms each stage keeps to itself."""
    found: set[fx.Node] = set()
    stack = list(gradients.values())
    while stack:
        node = stack.pop()
        if node.target is torch.ops.aten.add.Tensor:
            found.add(node)
            stack.extend(node.all_input_nodes)
    return found


def _advance_what_others_need(program: Program, stages: Mapping[fx.Node, int], sums: set[fx.Node]) -> None:
    """Gradients of weights that another stage still needs (those of a weight computed from others there) belong to part I."""
    urgent: set[fx.Node] = set()
    for node in reversed(program.nodes):
        if node.op != "call_function" or not (is_alias(node) or note(node).phase is Phase.BACKWARD_WEIGHT):
            continue
        users = [user for user in node.users if user.op == "call_function" and user not in sums]
        readers = [user for user in users if note(user).phase is not Phase.OPTIMIZER]
        moved = any(reader in stages and stages.get(base_of(node)) != stages[reader] for reader in readers)
        if moved or any(
            reader in urgent or (reader in stages and kind_of(reader) is PartKind.BACKWARD_INPUT) for reader in readers
        ):
            urgent.add(node)
            if note(node).phase is Phase.BACKWARD_WEIGHT:
                annotate(node, phase=Phase.BACKWARD_INPUT)


def _near_their_weights(
    program: Program, last_reader: Mapping[fx.Node, int], gradients: Mapping[str, fx.Node]
) -> dict[fx.Node, int]:
    """Weight gradients -> the last stage that reads the weight: computed there, their sum stays in one place."""
    roles = {node: note(node).role for node in last_reader if node.op == "placeholder"}
    last = {role.name: last_reader[node] for node, role in roles.items() if role is not None and role.kind is RoleKind.PARAM}
    wanted = {base_of(node): last[name] for name, node in gradients.items() if name in last}
    for node in reversed(program.nodes):
        if node.op == "call_function" and note(node).phase is Phase.BACKWARD_WEIGHT and node not in wanted:
            users = [user for user in node.users if user.op == "call_function" and note(user).phase is Phase.BACKWARD_WEIGHT]
            known = [wanted[user] for user in users if user in wanted]
            if known:
                wanted[node] = max(known)
    return wanted
