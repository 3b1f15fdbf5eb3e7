"""Sums of gradients over ranks wait for the last micro-batch, unless somebody needs them before."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from hocket.compiler.capture.front import Example
from hocket.compiler.capture.step import scalar_loss
from hocket.compiler.capture.trace import Aim
from hocket.compiler.contract import Context
from hocket.compiler.cost.cluster import Cluster
from hocket.compiler.passmanager import run_passes
from hocket.compiler.plan.planner import plan
from hocket.compiler.plan.tactics import DataParallel
from hocket.compiler.program import Phase, Program, annotate, copy_program, note
from hocket.compiler.rules.table import RuleTable
from hocket.passes.shard import Shard
from hocket.passes.sum_once import SumOnce
from hocket.runtime.mesh import Mesh

MESH = Mesh.parse("dp=2")


@pytest.fixture(scope="module")
def logical() -> Program:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2))
    aim = Aim(train=True, loss_of=lambda result: scalar_loss(result.square().mean(), None))
    return Example.of(model, (torch.randn(4, 4),), {}).capture(aim)


@pytest.fixture(scope="module")
def context(logical: Program) -> Context:
    rules, cluster = RuleTable(), Cluster.default()
    return Context(MESH, rules, cluster, plan(logical, MESH, rules, cluster, [DataParallel("dp")]))


def sums(program: Program, phase: Phase) -> list[str]:
    return [n.name for n in program.nodes if "all_reduce" in n.name and n.op == "call_function" and note(n).phase is phase]


def test_every_gradient_of_replicas_is_summed_in_the_optimizers_phase(logical: Program, context: Context) -> None:
    lowered, _ = run_passes(logical, (Shard(),), context, level="off")
    after, (record,) = run_passes(lowered, (SumOnce(),), context)
    assert sums(lowered, Phase.OPTIMIZER) == []
    assert len([name for name in sums(after, Phase.OPTIMIZER) if not name.endswith("_wait")]) == 4
    assert record.applied == 4
    assert str(record.verdict.status) == "equal"
    assert [node.name for node in after.nodes] == [node.name for node in lowered.nodes], "nothing but phases changes"


def test_a_sum_that_the_backward_reads_stays_with_a_reason(logical: Program, context: Context) -> None:
    lowered, _ = run_passes(logical, (Shard(),), context, level="off")
    read, _ = copy_program(lowered)
    wait = next(node for node in read.nodes if node.name.endswith("_wait") and note(node).phase is not Phase.FORWARD)
    with read.graph.graph.inserting_after(wait):
        reader = read.graph.graph.call_function(torch.ops.aten.neg.default, (wait,))
    reader.meta.update(wait.meta)
    annotate(reader, phase=Phase.BACKWARD_INPUT)
    after = SumOnce()(read, context)
    kept = [decision for decision in after.decisions if decision.by == "sum-once" and not decision.applied]
    assert len(kept) == 1
    assert "reads the sum" in kept[0].reason


def test_a_program_of_one_rank_has_nothing_to_defer(logical: Program, context: Context) -> None:
    assert SumOnce()(logical, context) is logical
