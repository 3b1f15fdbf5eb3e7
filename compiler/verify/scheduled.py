"""A pipeline executed in the order of its schedule, in exact integers, beside its micro-batches one after the other.

    schedule    F, I, W, SEND, ... of all ranks, as they stand, with messages, deferred weight gradients, recomputation
    reference   every micro-batch through all parts, then the next; the gradients added up

The parts are the compiled ones with 64-bit integers for floats (``canary``): sums wrap, so their order changes nothing, and a value
that is stale, dropped too early, added twice or taken from another micro-batch changes the result. That the parts in a row compute
the model is what the ring shows of them (``passes.pipeline_join``); this shows that the schedule runs them so.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping, Sequence

import torch

from ...runtime.schedule.instruction import Op, Schedule
from ...runtime.schedule.loopback import LoopbackPipeline
from ...runtime.schedule.stage import HELD, Port
from ..errors import HocketError, RunError
from ..plan.pipeline.stage_code import states_of
from ..program import Program, Role, RoleKind
from ..stages import PartKind, Pipeline, StagePart, Value
from .canary import random_integers, with_integers
from .lockstep import run_ranks
from .report import LevelResult, Outcome, Status
from .samples import sample_inputs

Tensors = dict[Port, torch.Tensor]


def scheduled_level(pipeline: Pipeline, schedule: Schedule, *, seed: int = 0) -> LevelResult:
    """Run the schedule with all its stages in this process; FAILED names the results that are not those of the reference.

    SKIPPED for a schedule that updates weights on the way: its reference is not one sum over all micro-batches.
    """
    start = time.process_time()
    updates = [instr for _, _, instr in schedule if instr.op in (Op.OPT, Op.STASH)]
    if updates:
        return LevelResult("schedule", Outcome.SKIPPED, f"{updates[0]} changes or keeps weights within the step")
    integers = integer_pipeline(pipeline)
    held, given = _drawn(pipeline, integers, schedule.micro_batches, seed)
    run = LoopbackPipeline(schedule, states_of(integers, held))
    try:
        outputs = run.step([{role.name: value for role, value in one.items()} for one in given])
    except (RunError, HocketError) as error:
        return LevelResult("schedule", Outcome.FAILED, f"the schedule cannot be run: {error}", time.process_time() - start)
    expected_outputs, expected = _one_after_the_other(integers, held, given)
    wrong = [
        f"output {name} of micro-batch {m}"
        for m, (found, true) in enumerate(zip(outputs, expected_outputs, strict=True))
        for name in sorted({*found, *true})
        if not _same(found.get(name), true.get(name))
    ]
    gradients = run.gradients()
    wrong += [f"gradient {name}" for name in sorted({*gradients, *expected}) if not _same(gradients.get(name), expected.get(name))]
    seconds = time.process_time() - start
    if wrong:
        detail = f"in the order of the schedule, {len(wrong)} results differ: {', '.join(wrong[:4])}"
        return LevelResult("schedule", Outcome.FAILED, detail, seconds, Status.DIFFERENT, divergence=wrong[0])
    count = sum(1 for _ in schedule)
    detail = f"{count} instructions in the order of the schedule give exactly what {len(given)} micro-batches in a row give"
    return LevelResult("schedule", Outcome.PASSED, detail, seconds)


def integer_pipeline(pipeline: Pipeline) -> Pipeline:
    """The pipeline with integers for floats in every part and message."""

    def message(values: Sequence[Value]) -> tuple[Value, ...]:
        return tuple(dataclasses.replace(value, dtype=_integer(value.dtype)) for value in values)

    stages = tuple(
        dataclasses.replace(
            stage,
            parts=tuple(dataclasses.replace(part, program=with_integers(part.program)) for part in stage.parts),
            receives=message(stage.receives),
            sends=message(stage.sends),
            receives_back=message(stage.receives_back),
            sends_back=message(stage.sends_back),
            values=dict(zip(stage.values or {}, message(tuple((stage.values or {}).values())), strict=True)),
        )
        for stage in pipeline.stages
    )
    return dataclasses.replace(pipeline, stages=stages)


def _integer(dtype: torch.dtype) -> torch.dtype:
    return torch.int64 if dtype.is_floating_point or dtype.is_complex else dtype


def _drawn(pipeline: Pipeline, integers: Pipeline, count: int, seed: int) -> tuple[Tensors, list[dict[Role, torch.Tensor]]]:
    """What the stages hold, and the inputs of every micro-batch; integers that index stay within their range."""
    generator = torch.Generator().manual_seed(seed)
    held: Tensors = {}
    given: list[dict[Role, torch.Tensor]] = [{} for _ in range(count)]
    sampled = [sample_inputs(pipeline.program, seed + m) for m in range(count)]
    parts = [part for stage in integers.stages for part in stage.parts]
    for part in parts:
        for role, node in zip(part.program.signature.inputs, part.program.placeholders, strict=True):
            value, port = node.meta["val"], Port(role.kind.value, role.name)
            if role.kind is RoleKind.CONSTANT:
                held.setdefault(port, part.program.constants[role.name])
            elif port.kind in HELD:
                held.setdefault(
                    port,
                    random_integers(value.shape, generator)
                    if value.dtype is torch.int64
                    else torch.zeros(value.shape, dtype=value.dtype),
                )
            elif role.kind not in (RoleKind.VALUE, RoleKind.GRADIENT):
                for m in range(count):
                    real = sampled[m].get(role)
                    kept = real is not None and not (real.is_floating_point() or real.is_complex())
                    given[m].setdefault(role, real if kept and real is not None else random_integers(value.shape, generator))
    return held, given


def _one_after_the_other(
    pipeline: Pipeline, held: Tensors, given: Sequence[Mapping[Role, torch.Tensor]]
) -> tuple[list[dict[str, torch.Tensor]], dict[str, torch.Tensor]]:
    """(outputs per micro-batch, summed gradients). Buffers that a forward updates are seen by the next micro-batch."""
    outputs: list[dict[str, torch.Tensor]] = []
    gradients: dict[str, torch.Tensor] = {}
    state = dict(held)
    for one in given:
        values: dict[str, torch.Tensor] = {}
        made: dict[str, torch.Tensor] = {}
        for part in _in_a_row(pipeline):
            program: Program = part.program
            inputs = {role: _input(role, values, state, one) for role in program.signature.inputs}
            for role, value in run_ranks(program, inputs).outputs.items():
                if value is None:
                    continue
                if role.kind is RoleKind.VALUE:
                    values[role.name] = value
                elif role.kind is RoleKind.GRADIENT:
                    gradients[role.name] = gradients[role.name] + value if role.name in gradients else value
                elif role.kind is RoleKind.UPDATE:
                    state[Port("buffer", role.name)] = value
                else:
                    made[role.name] = value
        outputs.append(made)
    return outputs, gradients


def _in_a_row(pipeline: Pipeline) -> list[StagePart]:
    back = tuple(reversed(pipeline.stages))
    parts = [part for stage in pipeline.stages for part in stage.of(PartKind.FORWARD)]
    parts += [part for stage in back for part in stage.of(PartKind.BACKWARD_INPUT)]
    return parts + [part for stage in back for part in stage.of(PartKind.BACKWARD_WEIGHT)]


def _input(role: Role, values: Mapping[str, torch.Tensor], held: Tensors, given: Mapping[Role, torch.Tensor]) -> torch.Tensor:
    if role.kind is RoleKind.VALUE:
        return values[role.name]
    port = Port(role.kind.value, role.name)
    return held[port] if port.kind in HELD else given[role]


def _same(a: torch.Tensor | None, b: torch.Tensor | None) -> bool:
    return a is not None and b is not None and a.shape == b.shape and torch.equal(a, b)
