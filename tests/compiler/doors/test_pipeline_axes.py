"""Pipelines whose stages are shared by ranks of other axes: replicas, pieces of weights, or both."""

from __future__ import annotations

import copy

import pytest
import torch
from pipeline_support import Language, one_thread, plain_step, tokens

import hocket
from hocket.compiler.plan.tactics import Tactic
from hocket.compiler.program import Phase, note
from hocket.compiler.stages import ONCE, Pipeline
from hocket.errors import InputError

__all__ = ["one_thread"]

pytestmark = pytest.mark.usefixtures("one_thread")


def collectives(pipeline: Pipeline, *, once: bool) -> list[str]:
    """Collectives of the parts that run once a step, or of those that run for every micro-batch."""
    parts = [part for stage in pipeline.stages for part in stage.parts if (part.kind in ONCE) == once]
    return [
        node.name
        for part in parts
        for node in part.program.nodes
        if node.op == "call_function" and ("all_reduce" in str(node.target) or "reduce_scatter" in str(node.target))
    ]


def train(
    mesh: str, engine: str, *, rows: tuple[int, ...] = (2, 2, 2, 2), tactics: tuple[Tactic, ...] = (), steps: int = 2
) -> Pipeline:
    """Train with everything at once (tied weights, clipping, AdamW) and compare with torch; the stages."""
    torch.manual_seed(1)
    model = Language(tied=True)
    twin = copy.deepcopy(model)
    ours, theirs = (torch.optim.AdamW(one.parameters(), 0.01) for one in (model, twin))
    pipeline = hocket.PipelineParallel(microbatches=rows)
    with hocket.train_step(model, mesh, ours, engine=engine, tactics=[pipeline, *tactics], clip_norm=0.3) as step:
        for _ in range(steps):
            loss = step(*tokens())
            theirs.zero_grad()
            torch.testing.assert_close(loss, plain_step(twin, tokens(), rows))
            torch.nn.utils.clip_grad_norm_(twin.parameters(), 0.3)
            theirs.step()
        compiled = step.compiled
        assert {record.name: str(record.verdict.status) for record in compiled.records}["pipeline"] == "equal"
    for (name, one), other in zip(model.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(one, other, msg=name)
    return compiled.pipeline


def test_replicas_of_stages_sum_their_gradients_once_a_step() -> None:
    stages = train("pp=2,dp=2", "sim", steps=1)
    per_micro_batch = collectives(stages, once=False)
    assert len(per_micro_batch) == 1, f"only the loss is summed for every micro-batch, found {per_micro_batch}"
    assert len(collectives(stages, once=True)) == 1, "all parameters of this model are updated by the first stage"


def test_gradients_of_replicas_are_those_of_the_plain_model() -> None:
    torch.manual_seed(1)
    model = Language()
    twin = copy.deepcopy(model)
    with hocket.parallelize(model, "dp=2,pp=2", engine="sim", tactics=[hocket.PipelineParallel(microbatches=2)]) as stages:
        for _ in range(2):  # the second adds to the first
            stages.train_step(*tokens())
            plain_step(twin, tokens(), (4, 4))
        assert "sum-once" in stages.explain()
        for (name, one), other in zip(model.named_parameters(), twin.named_parameters(), strict=True):
            torch.testing.assert_close(one.grad, other[1].grad, msg=name)
        with torch.no_grad():
            torch.testing.assert_close(stages(tokens()[0]), twin(tokens()[0]))


def test_weights_of_stages_are_cut_and_nothing_of_the_backward_moves_to_the_end_that_does_not_belong_there() -> None:
    stages = train("pp=2,tp=2", "sim", steps=1)
    assert collectives(stages, once=False), "partial sums are all-reduced within a stage"
    for stage in stages.stages:
        for part in stage.parts:
            if part.kind in ONCE:
                assert all(note(n).phase is Phase.OPTIMIZER for n in part.program.nodes if "all_reduce" in str(n.target))


@pytest.mark.slow
@pytest.mark.parametrize("mesh", ["pp=2,dp=2,tp=2", "dp=2,pp=4"])
def test_eight_ranks(mesh: str) -> None:
    train(mesh, "sim", rows=(2, 4, 2))


@pytest.mark.slow
@pytest.mark.parametrize("mesh", ["pp=2,dp=2", "pp=2,tp=2"])
def test_four_processes(mesh: str) -> None:
    train(mesh, "local", rows=(2, 4, 2))


@pytest.mark.slow
def test_optimizer_state_of_replicas_may_be_cut() -> None:
    stages = train("pp=2,dp=2", "sim", tactics=(hocket.Zero("dp", 1),), steps=1)
    assert collectives(stages, once=True)


def test_a_batch_that_replicas_cannot_share_is_refused() -> None:
    with (
        hocket.parallelize(Language(), "pp=2,dp=2", engine="sim") as stages,
        pytest.raises(InputError, match="a batch of 7 rows cannot be shared by 2 replicas of each stage: use a batch of 8 rows"),
    ):
        stages.train_step(*tokens(7))


def test_pieces_of_different_shapes_may_not_leave_a_stage() -> None:
    """Four positions over three ranks: 2, 1 and 1 of them would pass to the next stage."""
    tactics = [hocket.PipelineParallel(microbatches=1), hocket.SequenceParallel("sp")]
    with (
        hocket.parallelize(Language(layers=2), "pp=2,sp=3", engine="sim", tactics=tactics, verify="off") as stages,
        pytest.raises(InputError, match="leaves stage 0 in pieces of different shapes"),
    ):
        stages.train_step(*tokens(2))
