"""From a captured step to a chain of units that stages are made of, and from stages back to nodes.

The forward is cut, in the order in which it was captured, wherever fewer bytes cross than just before or after: between layers,
after residual additions. What lies between two cuts is a unit; its backward is placed by the rules by which stages are
(``passes.pipeline_place``), so a unit's cost is that of a stage made of it alone.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch.fx as fx

from ....passes.backward_split_choice import base_of
from ....passes.backward_split_costs import Costs, is_alias, stored_bytes
from ....passes.joined_micro_batches import products_of_stage
from ....passes.pipeline_drafts import gradients_of
from ....passes.pipeline_parts import groups_of
from ....passes.pipeline_place import place, portable_nodes
from ...errors import InputError
from ...plan.pipeline.chain import balance
from ...plan.pipeline.costs import StageCosts
from ...program import Phase, Program, RoleKind, copy_program, note
from ...stages import PartKind, StageProgram

MOST_UNITS = 200


@dataclass(frozen=True)
class Units:
    """of: forward node -> unit; work: seconds of forward and backward of each; crossing: bytes that pass from each to the next."""

    of: dict[str, int]
    work: tuple[float, ...]
    crossing: tuple[int, ...]


def units_of(program: Program, costs: Costs) -> Units:
    """The units of a step whose backward is split, or of a forward alone."""
    portable = portable_nodes(program)
    calls = [
        node
        for node in program.nodes
        if node.op == "call_function" and note(node).phase is Phase.FORWARD and not is_alias(node) and node not in portable
        if node.target is not operator.getitem  # an element belongs to the call that makes it
    ]
    crossing = _crossing(calls)
    cuts = _narrow_places(crossing)
    of: dict[str, int] = {}
    unit = 0
    for position, node in enumerate(calls):
        of[node.name] = unit
        unit += position in cuts
    work = _work(program, of, unit + 1, costs)
    return Units(of, tuple(work), tuple(crossing[cut] for cut in sorted(cuts)))


def partition(program: Program, stages: int, costs: Costs) -> dict[str, int]:
    """Forward node -> stage: contiguous stages whose slowest, with what it sends, is as fast as can be.

    InputError where the model has fewer units than stages.
    """
    units = units_of(program, costs)
    if len(units.work) < stages:
        raise InputError(
            f"the model falls into {len(units.work)} parts that can be stages (layers, or pieces between them), fewer than the "
            f"{stages} stages asked for: ask for at most {len(units.work)} stages"
        )
    sends = [bytes_ * costs.seconds_per_byte() * 4 for bytes_ in units.crossing]  # copied out and in, on both sides
    bounds = (0, *balance(units.work, sends, stages), len(units.work))
    stage_of = [stage for stage in range(stages) for _ in range(bounds[stage], bounds[stage + 1])]
    return {name: stage_of[unit] for name, unit in units.of.items()}


def partition_as_before(program: Program, homes: Mapping[str, tuple[int, ...]]) -> dict[str, int]:
    """Forward node -> stage, with every parameter where it is. homes: parameter -> stages that may read it.

    InputError where the forward reads a parameter of an earlier stage after one of a later.
    """
    reads: dict[fx.Node, tuple[int, ...]] = {
        node: homes[role.name]
        for role, node in zip(program.signature.inputs, program.placeholders, strict=True)
        if role.kind is RoleKind.PARAM and role.name in homes
    }
    portable = portable_nodes(program)
    found: dict[str, int] = {}
    stage = 0
    for node in program.nodes:
        if node.op != "call_function" or note(node).phase is not Phase.FORWARD:
            continue
        for source in node.all_input_nodes:
            allowed = reads.get(source)
            if allowed is None:
                continue
            later = [home for home in allowed if home >= stage]
            if not later:
                raise InputError(
                    f"{node.name} reads a parameter of stage {allowed[-1]} after stage {stage} has begun (from "
                    f"{note(node).source or 'unknown'}): this form of call needs the stages in another order than the first one"
                )
            if is_alias(node):
                reads[node] = allowed  # a view of a parameter: who computes with it decides
            else:
                stage = min(later)
        if not is_alias(node) and node not in portable and node.target is not operator.getitem:
            found[node.name] = stage
    return found


def weight_pieces(program: Program, forward: Mapping[str, int], count: int, costs: Costs) -> dict[str, int]:
    """Node of a weight gradient -> the piece it belongs to: at most ``count`` pieces a stage, of equal work, in the backward's
    order."""
    copy, _ = copy_program(program)
    placement = place(copy, forward, gradients_of(copy))
    by_stage: dict[int, list[fx.Node]] = {}
    for node in copy.nodes:
        if node in placement.stages and note(node).phase is Phase.BACKWARD_WEIGHT:
            by_stage.setdefault(placement.stages[node], []).append(node)
    found: dict[str, int] = {}
    for nodes in by_stage.values():
        groups = groups_of(nodes)
        work = [sum(map(costs.seconds, group)) for group in groups]
        bounds = (0, *balance(work, [0.0] * len(work), min(count, len(groups))), len(groups))
        for piece, (start, stop) in enumerate(itertools.pairwise(bounds)):
            found.update((node.name, piece) for group in groups[start:stop] for node in group)
    return found


def _crossing(calls: Sequence[fx.Node]) -> list[int]:
    """Bytes made at or before each position and read after it."""
    made = {node: position for position, node in enumerate(calls)}
    last: dict[fx.Node, int] = {}
    for node, position in made.items():
        for source in node.all_input_nodes:
            last[base_of(source)] = position
    change = [0] * (len(calls) + 1)
    for node, position in last.items():
        start = made.get(node.all_input_nodes[0] if node.target is operator.getitem else node, position)
        if position > start:
            change[start] += stored_bytes(node)
            change[position] -= stored_bytes(node)
    total, found = 0, []
    for entry in change[: len(calls)]:
        total += entry
        found.append(total)
    return found


def _narrow_places(crossing: Sequence[int]) -> set[int]:
    """Positions where something crosses, and no more than at both neighbours: in a plain chain of equal layers, all of them."""
    narrow = [
        position
        for position in range(len(crossing) - 1)
        if 0 < crossing[position] <= crossing[position + 1] and (position == 0 or crossing[position] <= crossing[position - 1])
    ]
    return set(sorted(narrow, key=lambda position: (crossing[position], position))[: MOST_UNITS - 1])


def _work(program: Program, of: dict[str, int], count: int, costs: Costs) -> list[float]:
    copy, _ = copy_program(program)
    placement = place(copy, of, gradients_of(copy))
    work = [0.0] * count
    for node, unit in placement.stages.items():
        work[unit] += costs.seconds(node)
    return work


def stage_costs(stage: StageProgram, costs: Costs) -> StageCosts:
    """Predicted costs of a stage, from the nodes of its parts and what it holds."""

    def seconds(kind: PartKind) -> list[float]:
        return [sum(costs.seconds(node) for node in part.program.nodes) for part in stage.of(kind)]

    weights = seconds(PartKind.BACKWARD_WEIGHT) or [0.0]
    made = list(products_of_stage(stage))
    backward = stage.of(PartKind.BACKWARD_INPUT)
    held = sum(value.bytes for value in stage.held_after(PartKind.BACKWARD_INPUT)) if backward else 0
    return StageCosts(
        forward=sum(seconds(PartKind.FORWARD)),
        backward_input=sum(seconds(PartKind.BACKWARD_INPUT)),
        backward_weight=tuple(weights),
        activation=float(sum(value.bytes for value in stage.held_after(PartKind.FORWARD))),
        held=tuple(held / len(weights) for _ in weights),
        boundary=float(sum(value.bytes for value in stage.sends)),
        products=tuple(sum(costs.seconds(one.node) for one in made if one.piece == piece) for piece in range(len(weights))),
        factors=tuple(float(sum(one.held() for one in made if one.piece == piece)) for piece in range(len(weights))),
    )
