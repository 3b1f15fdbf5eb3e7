"""Run programs and pipelines in this process, node by node, the way any executor must."""

from __future__ import annotations

import operator
import random
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from hocket.compiler.contract import Context
from hocket.compiler.cost.cluster import Cluster
from hocket.compiler.program import Phase, Program, Role, RoleKind, note
from hocket.compiler.rules.table import RuleTable
from hocket.compiler.stages import PartKind, Pipeline, StagePart, Value
from hocket.passes.backward_split_costs import is_alias
from hocket.passes.pipeline_place import portable_nodes
from hocket.runtime.mesh import Mesh

Values = dict[Role, Tensor]

STATEFUL = (RoleKind.PARAM, RoleKind.BUFFER, RoleKind.CONSTANT, RoleKind.STATE)


def context() -> Context:
    """A context with the default prices."""
    return Context(Mesh.parse("d=1"), RuleTable(), Cluster.default())


def held_by(program: Program, model: nn.Module) -> Values:
    """Copies of the parameters, buffers and constants of a program, by role."""
    tensors = {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers(remove_duplicate=False))}
    found: Values = {}
    for role in program.signature.inputs:
        if role.kind is RoleKind.CONSTANT:
            found[role] = program.constants[role.name]
        elif role.kind in STATEFUL:
            found[role] = tensors[role.name].detach().clone()
    return found


def random_inputs(program: Program, seed: int) -> Values:
    """Tangents, and whatever else a call needs besides ``held_by`` and the user's inputs."""
    generator = torch.Generator().manual_seed(seed)
    found: Values = {}
    for role, node in zip(program.signature.inputs, program.placeholders, strict=True):
        value = node.meta["val"]
        if role.kind is RoleKind.SEED:
            found[role] = torch.tensor(1234 + seed)
        elif role.kind is RoleKind.TANGENT:
            found[role] = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype).copy_(
                torch.randn(value.shape, generator=generator)
            )
    return found


def run(program: Program, given: Mapping[Role, Tensor]) -> Values:
    """The results of a program that exist."""
    with torch.no_grad():
        results = torch.fx.Interpreter(program.graph).run(*(given[role] for role in program.signature.inputs))
    return {role: value for role, value in zip(program.signature.outputs, results, strict=True) if value is not None}


def sequential(program: Program, held: Values, batches: Iterable[Values]) -> tuple[list[Values], Values]:
    """One micro-batch after the other: the results of each, and the summed gradients."""
    held, total, each = dict(held), {}, []
    for batch in batches:
        results = run(program, {**held, **batch})
        for role, value in results.items():
            if role.kind is RoleKind.GRADIENT:
                total[role] = value if role not in total else total[role] + value
            elif role.kind is RoleKind.UPDATE:
                held[Role(RoleKind.BUFFER, role.name)] = value
        each.append({role: value for role, value in results.items() if role.kind is not RoleKind.GRADIENT})
    return each, total


class PipelineRun:
    """A pipeline run part by part in any valid order, keeping exactly what the stages say they keep."""

    def __init__(self, pipeline: Pipeline, held: Values, batches: list[Values]) -> None:
        self.pipeline = pipeline
        self.held = dict(held)
        self.batches = batches
        self.values: dict[tuple[int, int], dict[str, Tensor]] = {
            (s.stage, k): {} for s in pipeline.stages for k in range(len(batches))
        }
        self.totals: dict[int, Values] = {stage.stage: {} for stage in pipeline.stages}
        self.results: list[Values] = [{} for _ in batches]

    def run(self, order: random.Random) -> tuple[list[Values], Values]:
        """Everything, in an order drawn from ``order``; then the reduction of shared gradients, the last stage's first."""
        for part, batch in schedule(self.pipeline, len(self.batches), order):
            self.step(part, batch)
        assert not any(self.values.values()), "a value is still held though nobody needs it"
        total: Values = {}
        for stage in reversed(self.pipeline.stages):
            for role, value in self.totals[stage.stage].items():
                total[role] = value if role not in total else total[role] + value
        return self.results, total

    def step(self, part: StagePart, batch: int) -> None:
        """One instruction, with the receives before and the sends after it."""
        stage, here = self.pipeline.stages[part.stage], self.values[part.stage, batch]
        given = {**self.held, **self.batches[batch], **{Role(RoleKind.VALUE, name): here[name] for name in part.takes}}
        for role, value in run(part.program, given).items():
            if role.kind is RoleKind.VALUE:
                here[role.name] = value
            elif role.kind is RoleKind.GRADIENT:
                total = self.totals[part.stage]
                total[role] = value if role not in total else total[role] + value
            else:
                if role.kind is RoleKind.UPDATE:
                    self.held[Role(RoleKind.BUFFER, role.name)] = value
                self.results[batch][role] = value
        message, target = ((), part.stage)
        if part.kind is PartKind.FORWARD:
            message, target = stage.sends, part.stage + 1
        elif part.kind is PartKind.BACKWARD_INPUT:
            message, target = stage.sends_back, part.stage - 1
        for value in message:
            self.values[target, batch][value.name] = over_the_wire(here[value.name], value)
        for name in part.drops:
            del here[name]


def over_the_wire(tensor: Tensor, value: Value) -> Tensor:
    """A copy as the receiver makes it."""
    assert tuple(tensor.shape) == value.shape
    assert tensor.dtype == value.dtype
    return torch.empty_strided(value.shape, value.stride, dtype=value.dtype).copy_(tensor)


def schedule(pipeline: Pipeline, batches: int, order: random.Random) -> list[tuple[StagePart, int]]:
    """A random order that keeps dependencies, and micro-batches in order within every part."""
    last = len(pipeline.stages) - 1
    done: set[tuple[str, int, int, int]] = set()
    todo = [(part, k) for s in pipeline.stages for part in s.parts if part.kind is not PartKind.OPTIMIZER for k in range(batches)]
    found = []

    def ready(part: StagePart, k: int) -> bool:
        before = [(part.kind.value, part.stage, part.piece, k - 1)] if k else []
        if part.kind is PartKind.FORWARD and part.stage:
            before.append(("F", part.stage - 1, 0, k))
        if part.kind is PartKind.BACKWARD_INPUT:
            before += [("F", part.stage, 0, k)] + ([("I", part.stage + 1, 0, k)] if part.stage < last else [])
        if part.kind is PartKind.BACKWARD_WEIGHT:
            before.append(("W", part.stage, part.piece - 1, k) if part.piece else ("I", part.stage, 0, k))
        return all(one in done for one in before)

    while todo:
        part, k = order.choice([one for one in todo if ready(*one)])
        todo.remove((part, k))
        done.add((part.kind.value, part.stage, part.piece, k))
        found.append((part, k))
    return found


def even_stages(program: Program, count: int) -> dict[str, int]:
    """The calls of the forward dealt out to ``count`` stages, or as many as there are calls, in graph order."""
    portable = portable_nodes(program)
    calls = [n for n in program.nodes if n.op == "call_function" and note(n).phase is Phase.FORWARD]
    calls = [n for n in calls if not is_alias(n) and n not in portable and n.target is not operator.getitem]
    count = min(count, len(calls))
    return {node.name: position * count // len(calls) for position, node in enumerate(calls)}


def assert_same(found: Any, expected: Any) -> None:
    """Equal to the last bit (NaN equals NaN)."""
    assert found.keys() == expected.keys()
    for role, value in expected.items():
        same = (found[role] == value) | ((found[role] != found[role]) & (value != value))
        assert found[role].shape == value.shape
        assert bool(same.all()), f"{role} differs by {(found[role] - value).abs().max()}"
