"""What passes between parts: values saved within a stage, messages between neighbours, and when each value may be dropped."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

import torch.fx as fx

from ..compiler.errors import HocketError
from ..compiler.program import Program, Role, RoleKind, note
from ..compiler.stages import ONCE, PartKind, Pipeline, StagePart, StageProgram, TiedGroup, Value
from .pipeline_parts import Draft, build, value_of


def assemble(program: Program, drafts: list[Draft], count: int) -> Pipeline:
    """The stages from the drafts of all parts, in the order of stages and, within one, of running."""
    producer = {node: draft for draft in drafts for node in draft.nodes}
    order = {node: place for place, node in enumerate(program.nodes)}
    readers: dict[fx.Node, list[Draft]] = {}
    for draft in drafts:
        for node in draft.reads():
            if node.op != "placeholder":
                readers.setdefault(node, []).append(draft)
    values = sorted(readers, key=order.__getitem__)
    for node in values:
        _check(node, producer[node], readers[node])
        producer[node].results[Role(RoleKind.VALUE, node.name)] = node
    onward = [[node for node in values if _goes_on(producer[node], readers[node], edge)] for edge in range(count - 1)]
    back = [[node for node in values if _goes_back(producer[node], readers[node], edge)] for edge in range(count - 1)]
    parts = [build(draft, program, _role_of) for draft in drafts]
    known = {node.name: value_of(node) for node in values}
    stages = []
    for stage in range(count):
        messages = (
            onward[stage - 1] if stage else [],
            onward[stage] if stage < count - 1 else [],
            back[stage] if stage < count - 1 else [],
            back[stage - 1] if stage else [],
        )
        own = tuple(part for part in parts if part.stage == stage)
        stages.append(_stage(stage, own, [tuple(known[node.name] for node in message) for message in messages], known))
    return Pipeline(program, tuple(stages), _tied(parts))


def _role_of(node: fx.Node) -> Role:
    role = note(node).role
    return role if node.op == "placeholder" and role is not None else Role(RoleKind.VALUE, node.name)


def _check(node: fx.Node, maker: Draft, readers: Iterable[Draft]) -> None:
    for reader in readers:
        late = maker.kind is PartKind.BACKWARD_WEIGHT and (reader.kind is not maker.kind or reader.stage != maker.stage)
        forward = reader.kind is PartKind.FORWARD and (maker.kind is not PartKind.FORWARD or maker.stage > reader.stage)
        upstream = maker.kind is PartKind.BACKWARD_INPUT and reader.stage > maker.stage
        if late or forward or upstream:
            raise HocketError(
                f"{node.name} is made by part {maker.kind}{maker.stage} and read by {reader.kind}{reader.stage}, which runs before "
                f"it (from {note(node).source or 'unknown'})"
            )


def _goes_on(maker: Draft, readers: Iterable[Draft], edge: int) -> bool:
    """Whether a value is in the message from stage ``edge`` to the next."""
    return maker.kind is PartKind.FORWARD and maker.stage <= edge and any(reader.stage > edge for reader in readers)


def _goes_back(maker: Draft, readers: Iterable[Draft], edge: int) -> bool:
    """Whether a value is in the message from stage ``edge + 1`` back to ``edge``."""
    return maker.kind not in ONCE and maker.stage > edge and any(reader.stage <= edge for reader in readers)


def _stage(stage: int, parts: tuple[StagePart, ...], messages: list[tuple[Value, ...]], known: dict[str, Value]) -> StageProgram:
    receives, sends, receives_back, sends_back = messages
    last: dict[str, int] = {}
    place = {PartKind.FORWARD: 0, PartKind.BACKWARD_INPUT: 1}
    times = [place.get(part.kind, 2 + part.piece) for part in parts]
    for part, when in zip(parts, times, strict=True):
        if part.kind in ONCE:
            continue
        for name in (*part.takes, *part.gives):
            last[name] = max(when, last.get(name, 0))
    for when, message in ((0, receives), (0, sends), (1, receives_back), (1, sends_back)):
        for value in message:
            last[value.name] = max(when, last.get(value.name, 0))
    done = tuple(
        part if part.kind in ONCE else dataclasses.replace(part, drops=tuple(name for name, end in last.items() if end == when))
        for part, when in zip(parts, times, strict=True)
    )
    parameters = {
        role.name
        for part in parts
        for role in part.program.signature.inputs
        if role.kind is RoleKind.PARAM and part.kind not in ONCE
    }
    held = {name: known[name] for name in last}
    return StageProgram(stage, done, receives, sends, receives_back, sends_back, tuple(sorted(parameters)), held)


def _tied(parts: Iterable[StagePart]) -> tuple[TiedGroup, ...]:
    """Parameters that several stages read, or to whose gradient several contribute."""
    where: dict[str, set[int]] = {}
    givers: dict[str, set[int]] = {}
    for part in parts:
        if part.kind not in ONCE:
            read = [role.name for role in part.program.signature.inputs if role.kind is RoleKind.PARAM]
            for name in (*read, *part.gradients):
                where.setdefault(name, set()).add(part.stage)
            for name in part.gradients:
                givers.setdefault(name, set()).add(part.stage)
    return tuple(
        TiedGroup(name, tuple(sorted(stages)), tuple(sorted(givers.get(name, ()))))
        for name, stages in where.items()
        if len(stages) > 1
    )
