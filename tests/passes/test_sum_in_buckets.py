"""Small gradients of a stage are summed over its replicas as one, with the same bits; large ones and cut ones stay alone."""

from __future__ import annotations

import copy
import dataclasses
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import hocket
from hocket.compiler.capture.front import Example
from hocket.compiler.capture.step import scalar_loss
from hocket.compiler.capture.trace import Aim
from hocket.compiler.contract import Context
from hocket.compiler.cost.cluster import Cluster, Line
from hocket.compiler.emit import emit
from hocket.compiler.passmanager import run_passes
from hocket.compiler.plan.planner import plan
from hocket.compiler.plan.tactics import DataParallel, TensorParallel
from hocket.compiler.program import Program
from hocket.compiler.rules.table import RuleTable
from hocket.errors import VerificationError
from hocket.passes.shard import Shard
from hocket.passes.sum_in_buckets import SumInBuckets
from hocket.passes.sum_once import SumOnce
from hocket.runtime.mesh import Mesh

aten = torch.ops.aten
c10d = torch.ops._c10d_functional


def lowered(widths: list[int], tactic: object = None) -> tuple[Program, Context]:
    """Linear layers of these widths on two replicas, sums of gradients once a step."""
    torch.manual_seed(0)
    layers = [nn.Linear(a, b) for a, b in itertools.pairwise(widths)]
    mesh, rules, costs = Mesh.parse("dp=2"), RuleTable(), Cluster.default()
    aim = Aim(train=True, loss_of=lambda result: scalar_loss(result.square().mean(), None))
    program = Example.of(nn.Sequential(*layers), (torch.randn(4, widths[0]),), {}).capture(aim)
    context = Context(mesh, rules, costs, plan(program, mesh, rules, costs, [tactic or DataParallel("dp")]))  # type: ignore[list-item]
    after, _ = run_passes(program, (Shard(), SumOnce()), context, level="off")
    return after, context


def reduces(program: Program) -> int:
    return sum(node.target is c10d.all_reduce.default and node.name.find("loss") < 0 for node in program.nodes)


def test_each_stage_sums_its_gradients_as_one_and_that_is_proven() -> None:
    program, context = lowered([4, 6, 2])
    stage_of = {"0.weight": 0, "0.bias": 0, "1.weight": 1, "1.bias": 1}
    after, (record,) = run_passes(program, (SumInBuckets(stage_of),), context, level="full")
    assert reduces(program) - reduces(after) == 2
    assert record.applied == 4
    assert str(record.verdict.status) == "equal"
    joined = [node for node in after.nodes if node.target is aten.cat.default]
    assert sorted(int(node.meta["val"].numel()) for node in joined) == [6 * 2 + 2, 4 * 6 + 6]


def test_what_does_not_pay_or_cannot_be_stays_alone_and_says_why() -> None:
    free = dataclasses.replace(Cluster.default(), collectives=dict.fromkeys(Cluster.default().collectives, Line(0.0, 1e-9)))
    program, context = lowered([4, 6, 2])
    names = ["0.weight", "0.bias", "1.weight", "1.bias"]
    after = SumInBuckets(dict.fromkeys(names, 0))(program, dataclasses.replace(context, cluster=free))
    assert reduces(after) == reduces(program)
    assert sum("stays alone" in decision.reason for decision in after.decisions if decision.by == "sum-in-buckets") == 4
    unknown = SumInBuckets({})(program, context)
    assert reduces(unknown) == reduces(program)
    assert all("no gradient of a single stage" in d.reason for d in unknown.decisions if d.by == "sum-in-buckets")
    cut, context = lowered([4, 6, 2], TensorParallel("dp"))
    assert reduces(SumInBuckets(dict.fromkeys(["0.weight", "1.weight"], 0))(cut, context)) == reduces(cut)


def test_pieces_in_the_wrong_order_are_refused() -> None:
    program, context = lowered([3, 3, 3])

    class Shuffled:
        name, contract = "shuffled", SumInBuckets.contract

        def __call__(self, one: Program, where: Context) -> Program:
            made = SumInBuckets({"0.weight": 0, "1.weight": 0})(one, where)
            cat = next(node for node in made.nodes if node.target is aten.cat.default)
            cat.args = (list(reversed(cat.args[0])),)  # type: ignore[arg-type]
            return made

    with pytest.raises(VerificationError):
        run_passes(program, (Shuffled(),), context, level="ring")


@settings(max_examples=4, deadline=None)
@given(st.lists(st.integers(2, 5), min_size=3, max_size=4))
def test_random_widths_are_proven(widths: list[int]) -> None:
    program, context = lowered(widths)
    names = [f"{layer}.{kind}" for layer in range(len(widths) - 1) for kind in ("weight", "bias")]
    after, (record,) = run_passes(program, (SumInBuckets({name: int(name[0]) // 2 for name in names}),), context)
    assert str(record.verdict.status) == "equal"
    assert record.applied == len(names)
    emit(after)


def test_a_pipeline_with_buckets_has_the_bits_of_one_without() -> None:
    torch.manual_seed(1)
    model = nn.Sequential(*(nn.Sequential(nn.Linear(6, 6), nn.Tanh()) for _ in range(3)))
    x, found = torch.randn(8, 6), []
    for buckets in (True, False):
        twin = copy.deepcopy(model)
        tactic = hocket.PipelineParallel(loss=lambda out: out.square().mean(), microbatches=2, schedule="1f1b-2bp", buckets=buckets)
        with hocket.parallelize(twin, "pp=2,dp=2", tactics=[tactic], engine="sim", verify="types") as stages:
            stages.train_step(x)
        found.append([parameter.grad for parameter in twin.parameters()])
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)
