"""Stage programs compute what the whole step does, to the last bit, in any order a schedule may choose."""

from __future__ import annotations

import dataclasses
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from random_modules import RandomModule, rows
from split_support import PipelineRun, assert_same, context, even_stages, held_by, random_inputs, sequential
from torch import nn

from hocket.compiler.capture import capture, capture_step
from hocket.compiler.errors import InputError, VerificationError
from hocket.compiler.passmanager import run_passes
from hocket.compiler.program import Program, Role, RoleKind
from hocket.compiler.stages import PartKind, Pipeline
from hocket.passes.backward_split import BackwardSplit
from hocket.passes.pipeline import CutStages, cut_stages
from hocket.passes.pipeline_join import join

X = Role(RoleKind.INPUT, "args[0]")


class Tied(nn.Module):
    """A skip connection over all stages, and a weight that the first and the last one read."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(8, 4)
        self.inner = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
        self.skip = nn.Linear(4, 4)

    def forward(self, x):
        first = self.embed(x)
        skipped = h = first
        skipped = self.skip(skipped)
        for layer in self.inner:
            h = torch.tanh(layer(h))
        return ((h + skipped) @ self.embed.weight.t()).square().mean()


def split(module: nn.Module, x: torch.Tensor) -> Program:
    return BackwardSplit(worth=0)(capture(module, (x,)), context())


def tied_pipeline(stages: int = 3) -> Pipeline:
    torch.manual_seed(0)
    program = split(Tied(), torch.arange(8).reshape(2, 4))
    return cut_stages(program, even_stages(program, stages))


def assert_like_sequential(pipeline: Pipeline, module: nn.Module, batches: list[dict[Role, torch.Tensor]], seed: int) -> None:
    held = held_by(pipeline.program, module)
    expected, gradients = sequential(pipeline.program, held, batches)
    found, sums = PipelineRun(pipeline, held, batches).run(random.Random(seed))
    for one, other in zip(found, expected, strict=True):
        assert_same(one, other)
    shared = {group.parameter for group in pipeline.tied}
    assert_same(*({role: v for role, v in each.items() if role.name not in shared} for each in (sums, gradients)))
    for role, value in gradients.items():  # of shared weights, the order of the sum is another
        torch.testing.assert_close(sums[role], value)


@given(st.integers(0, 10**6), st.integers(2, 4), st.integers(1, 3))
@settings(max_examples=7, deadline=None)
def test_random_modules_in_random_schedules_equal_one_micro_batch_after_the_other(seed: int, stages: int, pieces: int) -> None:
    module = RandomModule(seed)
    program = split(module, rows(seed))
    names = {node.name: i % pieces for i, node in enumerate(program.nodes)}
    forward = even_stages(program, stages)
    pipeline = cut_stages(program, forward, names)
    batches = [{X: rows(seed + k), **random_inputs(program, k)} for k in range(3)]
    assert_like_sequential(pipeline, module, batches, seed)
    _, records = run_passes(program, (CutStages(forward, names),), context(), level="ring")
    assert str(records[0].verdict.status) == "equal"


def test_what_passes_between_three_stages() -> None:
    pipeline = tied_pipeline()
    first, middle, last = pipeline.stages
    assert [str(part) for stage in pipeline.stages for part in stage.parts] == [
        "F0", "I0", "W0.0", "F1", "I1", "W1.0", "F2", "I2", "W2.0",
    ]  # fmt: skip
    assert first.sends == middle.receives
    assert middle.sends == last.receives
    assert last.sends_back == middle.receives_back
    assert middle.sends_back == first.receives_back
    carried = {value.name for value in middle.receives} & {value.name for value in middle.sends}
    assert carried, "the skip connection is handed on by the stage in between"
    (group,) = pipeline.tied
    assert (group.parameter, group.stages) == ("embed.weight", (0, 2))
    assert not first.receives
    assert not last.sends
    for stage in pipeline.stages:
        dropped = [name for part in stage.parts for name in part.drops]
        assert sorted(dropped) == sorted(stage.values or {}), "every value is dropped exactly once"


def test_held_values_shrink_from_forward_to_weight_gradients() -> None:
    middle = tied_pipeline().stages[1]
    after_forward = sum(value.bytes for value in middle.held_after(PartKind.FORWARD))
    after_input = sum(value.bytes for value in middle.held_after(PartKind.BACKWARD_INPUT))
    assert after_forward > 0
    assert after_input > 0
    assert not middle.held_after(PartKind.BACKWARD_WEIGHT)


def test_the_optimizer_is_cut_too_and_the_whole_is_proven() -> None:
    torch.manual_seed(0)
    model = Tied()
    step = capture_step(model, torch.optim.AdamW(model.parameters()), (torch.arange(8).reshape(2, 4),))
    whole = BackwardSplit(worth=0)(step, context())
    forward = even_stages(whole, 2)
    joined, records = run_passes(whole, (CutStages(forward),), context(), level="ring")
    assert str(records[0].verdict.status) == "equal"
    pipeline = cut_stages(whole, forward)
    updated = [
        role.name for stage in pipeline.stages for part in stage.of(PartKind.OPTIMIZER) for role in part.program.signature.outputs
    ]
    assert sorted(updated) == sorted(role.name for role in joined.signature.outputs if role.kind is RoleKind.UPDATE)


def test_a_part_that_hands_on_the_wrong_value_is_refused() -> None:
    class Wrong(CutStages):
        def __call__(self, program, context):
            pipeline = cut_stages(program, self.forward)
            last = pipeline.stages[-1]
            part = last.of(PartKind.BACKWARD_WEIGHT)[0]
            outputs = part.program.signature.outputs
            signature = dataclasses.replace(part.program.signature, outputs=(outputs[1], outputs[0], *outputs[2:]))
            bad = dataclasses.replace(part, program=part.program.replace(signature=signature))
            stage = dataclasses.replace(last, parts=tuple(bad if one is part else one for one in last.parts))
            return join(dataclasses.replace(pipeline, stages=(*pipeline.stages[:-1], stage)))

    program = split(
        nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)), torch.randn(2, 4)
    )
    with pytest.raises(VerificationError):
        run_passes(program, (Wrong(even_stages(program, 2)),), context(), level="ring")


def test_a_stage_that_reads_what_a_later_one_makes_is_refused_with_the_line() -> None:
    program = split(nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4)), torch.randn(2, 4))
    backwards = {name: 1 - stage for name, stage in even_stages(program, 2).items()}
    with pytest.raises(InputError, match="may only read what earlier ones make"):
        cut_stages(program, backwards)


def test_a_stage_without_work_is_refused() -> None:
    program = split(nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4)), torch.randn(2, 4))
    with pytest.raises(InputError, match="stage 1 of 3 has no work"):
        cut_stages(program, {name: 2 * stage for name, stage in even_stages(program, 2).items()})


def test_a_model_that_writes_into_its_input_is_refused() -> None:
    class Writes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x):
            x.add_(1)
            return self.linear(x).sum()

    program = split(Writes(), torch.randn(2, 4))
    with pytest.raises(InputError, match=r"writes into its input args\[0\]"):
        cut_stages(program, even_stages(program, 1))
