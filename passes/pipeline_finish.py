"""What a stage does once a step, after the last micro-batch: parts S and O, from the nodes of the optimizer's phase.

    O_s   makes the results of the parameters whose gradient stage s holds
    S_t   makes what O of another stage reads of stage t: with clipping by a norm, the squares of its gradients

A node that reads what only one stage holds belongs to that stage. One that reads what several hold (the common norm) is computed by
every stage that needs it, from the values that the others share: scalars travel, gradients stay.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
import torch.fx as fx

from ..compiler.errors import InputError
from ..compiler.program import Phase, Program, Role, RoleKind, note
from ..compiler.stages import PartKind
from .backward_split_choice import base_of
from .pipeline_parts import Draft, is_inlined


def optimizer_nodes(node: fx.Node) -> list[fx.Node]:
    """The calls of the optimizer's phase that a value depends on, inputs first."""
    found: dict[fx.Node, None] = {}

    def visit(one: fx.Node) -> None:
        if one not in found and is_finishing(one):
            for source in one.all_input_nodes:
                visit(source)
            found[one] = None

    visit(node)
    return list(found)


def is_finishing(node: fx.Node) -> bool:
    """Whether a node is a call that runs once a step."""
    return node.op == "call_function" and note(node).phase is Phase.OPTIMIZER


def updated_parameter(program: Program, role: Role) -> str:
    """The parameter that an UPDATE of the optimizer belongs to: ``exp_avg:head.weight`` to ``head.weight``."""
    return role.name if role.name in program.signature.inputs_of(RoleKind.PARAM) else role.name.partition(":")[2]


def draft_finish(program: Program, owners: Mapping[str, int]) -> list[Draft]:
    """Parts S and O of all stages. owners: parameter -> the stage that holds its whole gradient.

    Raises InputError for an optimizer that reads a gradient that another stage holds.
    """
    return _Finish(program, owners).run()


@dataclass
class _Finish:
    program: Program
    owners: Mapping[str, int]
    held_by: dict[fx.Node, frozenset[int]] = field(default_factory=dict)
    """Call of the optimizer's phase -> the stages that hold what it reads."""
    shared: dict[int, dict[fx.Node, None]] = field(default_factory=dict)
    """Stage -> values that others need of it."""

    def run(self) -> list[Draft]:
        for node in self.program.nodes:
            if is_finishing(node):
                self.held_by[node] = frozenset().union(*map(self._holders, node.all_input_nodes))
        updates = [self._update(stage, results) for stage, results in sorted(self._results().items())]
        shares = [self._share(stage, list(values)) for stage, values in sorted(self.shared.items())]
        for share in shares:
            for update in updates:
                if update.stage == share.stage:
                    update.nodes = [node for node in update.nodes if node not in share.nodes]
        return [*shares, *updates]

    def _holders(self, node: fx.Node) -> frozenset[int]:
        role = note(node).role
        if node in self.held_by:
            return self.held_by[node]
        if role is None or role.kind not in (RoleKind.GRADIENT, RoleKind.PARAM, RoleKind.STATE):
            return frozenset()
        name = role.name.partition(":")[2] if role.kind is RoleKind.STATE and role.name.partition(":")[2] else role.name
        return frozenset({self.owners[name]}) if name in self.owners else frozenset()

    def _results(self) -> dict[int, dict[Role, fx.Node]]:
        """Stage -> what its part O gives: new parameters and states, and gradients that are more than sums over micro-batches."""
        found: dict[int, dict[Role, fx.Node]] = {}
        for role, node in zip(self.program.signature.outputs, self.program.results, strict=True):
            if node is None or role.kind not in (RoleKind.UPDATE, RoleKind.GRADIENT) or not is_finishing(base_of(node)):
                continue
            name = role.name if role.kind is RoleKind.GRADIENT else updated_parameter(self.program, role)
            found.setdefault(self.owners.get(name, 0), {})[role] = node
        return found

    def _update(self, stage: int, results: dict[Role, fx.Node]) -> Draft:
        mine: set[fx.Node] = set()
        pending = list(results.values())
        while pending:
            node = pending.pop()
            if node in mine or not is_finishing(node):
                continue
            if len(self.held_by[node]) == 1 and self.held_by[node] != {stage}:
                self._need(base_of(node), stage)
                continue
            mine.add(node)
            for source in node.all_input_nodes:
                self._check(source, stage)
                pending.append(source)
        return Draft(PartKind.OPTIMIZER, stage, 0, self._ordered(mine), results)

    def _need(self, value: fx.Node, stage: int) -> None:
        """Take note that a stage reads a value of another."""
        holder = next(iter(self.held_by[value]))
        if not is_scalar(value):
            raise InputError(
                f"the optimizer's step at stage {stage} reads {value.name}, a tensor that stage {holder} holds (from "
                f"{note(value).source or 'unknown'}); stages of a pipeline share scalars of their gradients, not the gradients"
            )
        self.shared.setdefault(holder, {})[value] = None

    def _check(self, source: fx.Node, stage: int) -> None:
        role = note(source).role
        if role is not None and role.kind is RoleKind.GRADIENT and self.owners[role.name] != stage:
            raise InputError(
                f"the optimizer's step at stage {stage} reads the gradient of {role.name}, which stage {self.owners[role.name]} "
                "holds; stages of a pipeline share scalars of their gradients, not the gradients"
            )

    def _share(self, stage: int, values: list[fx.Node]) -> Draft:
        mine = {node for value in values for node in optimizer_nodes(value)}
        return Draft(PartKind.SHARE, stage, 0, self._ordered(mine))

    def _ordered(self, nodes: set[fx.Node]) -> list[fx.Node]:
        return [node for node in self.program.nodes if node in nodes and not is_inlined(node)]


def is_scalar(node: fx.Node) -> bool:
    """Whether a value has one element."""
    value = node.meta.get("val")
    return isinstance(value, torch.Tensor) and value.numel() == 1
