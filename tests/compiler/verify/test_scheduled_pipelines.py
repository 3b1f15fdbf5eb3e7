"""Pipelines executed in the order of their schedule give what their micro-batches in a row give, exactly; wrong orders do not."""

from __future__ import annotations

import dataclasses
from functools import cache

import pytest
import torch
from torch import Tensor, nn

from hocket.compiler.capture import capture
from hocket.compiler.contract import Context
from hocket.compiler.cost.cluster import Cluster
from hocket.compiler.plan.pipeline.forms import closed_form
from hocket.compiler.program import Phase, note
from hocket.compiler.rules.table import RuleTable
from hocket.compiler.stages import Pipeline
from hocket.compiler.verify.report import Outcome
from hocket.compiler.verify.scheduled import scheduled_level
from hocket.passes.backward_split import BackwardSplit
from hocket.passes.pipeline import cut_stages
from hocket.runtime.mesh import Mesh
from hocket.runtime.schedule.instruction import Op, Schedule


class Chain(nn.Module):
    def __init__(self, depth: int) -> None:
        super().__init__()
        self.up = nn.ModuleList(nn.Linear(4, 6) for _ in range(depth))
        self.down = nn.ModuleList(nn.Linear(6, 4) for _ in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        for up, down in zip(self.up, self.down, strict=True):
            x = x + down(torch.tanh(up(x)))
        return x.square().mean()


@cache
def pipeline(stages: int) -> Pipeline:
    torch.manual_seed(0)
    program = capture(Chain(stages), (torch.randn(3, 4),))
    split = BackwardSplit()(program, Context(Mesh.parse("d=1"), RuleTable(), Cluster.default()))
    calls = [n for n in split.nodes if n.op == "call_function" and note(n).phase is Phase.FORWARD]
    return cut_stages(split, {node.name: min(place * stages // len(calls), stages - 1) for place, node in enumerate(calls)})


@pytest.mark.parametrize("name", ["1f1b", "zb-h1", "gpipe"])
def test_schedules_with_deferred_weight_gradients_run_their_micro_batches_exactly(name: str) -> None:
    found = scheduled_level(pipeline(3), closed_form(name, 3, 4))
    assert found.outcome is Outcome.PASSED, found.detail
    assert "4 micro-batches" in found.detail


def edited(schedule: Schedule, change: object) -> Schedule:
    ranks = tuple(tuple(change(instr) for instr in rank) for rank in schedule.ranks)  # type: ignore[operator]
    return dataclasses.replace(schedule, ranks=ranks)


def test_a_weight_gradient_that_is_made_twice_for_one_micro_batch_is_seen() -> None:
    schedule = closed_form("zb-h1", 3, 4)
    wrong = edited(schedule, lambda i: i._replace(micro_batch=1) if i.op is Op.W and i.stage == 1 and i.micro_batch == 2 else i)
    found = scheduled_level(pipeline(3), wrong)
    assert found.outcome is Outcome.FAILED


def test_a_weight_gradient_that_is_left_out_is_seen() -> None:
    schedule = closed_form("zb-h1", 3, 4)
    ranks = tuple(tuple(i for i in rank if not (i.op is Op.W and i.stage == 0 and i.micro_batch == 3)) for rank in schedule.ranks)
    found = scheduled_level(pipeline(3), dataclasses.replace(schedule, ranks=ranks))
    assert found.outcome is Outcome.FAILED
    assert "gradient" in found.detail
