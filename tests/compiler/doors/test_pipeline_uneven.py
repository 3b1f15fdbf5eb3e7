"""Batches of any size, micro-batches of different sizes, and what stays on the ranks when sizes change."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path

import pytest
import torch
from pipeline_support import Language, one_thread, plain_step, tokens
from torch import nn

import hocket
from hocket.compiler.doors.module import session_of
from hocket.compiler.doors.pipeline.options import PipelineOrder, pipeline_order
from hocket.compiler.doors.pipeline.rows import propose_rows
from hocket.compiler.plan.pipeline.costs import PipelineCosts
from hocket.errors import InputError
from hocket.runtime.engines.local import LocalEngine
from hocket.runtime.mesh import Mesh

__all__ = ["one_thread"]

pytestmark = pytest.mark.usefixtures("one_thread")


def test_gradients_of_uneven_micro_batches_weigh_rows_equally_to_the_last_bit() -> None:
    torch.manual_seed(1)
    rows = (2, 3, 3)
    model = Language()
    twin = copy.deepcopy(model)
    batch = tokens(sum(rows))
    with hocket.parallelize(model, "pp=2", engine="sim", tactics=[hocket.PipelineParallel(microbatches=rows)]) as stages:
        assert torch.equal(stages.train_step(*batch), plain_step(twin, batch, rows))
        for (name, one), other in zip(model.named_parameters(), twin.named_parameters(), strict=True):
            assert torch.equal(one.grad, other[1].grad), name
        assert session_of(stages).compiled.rows == rows
        assert {form.rows for form in session_of(stages).compiled.forms} == set(rows)


def test_batches_of_other_sizes_with_micro_batches_of_one_size_are_told_apart() -> None:
    """8 and 6 rows both give micro-batches of 2 rows, but of other numbers and weights."""
    torch.manual_seed(1)
    model = Language()
    with hocket.parallelize(model, "pp=2", engine="sim", verify="off") as stages:
        for rows in (8, 6):
            twin = copy.deepcopy(model).requires_grad_(requires_grad=True)
            twin.zero_grad()
            model.zero_grad()
            loss = stages.train_step(*tokens(rows))
            torch.testing.assert_close(loss, twin(*tokens(rows)).detach())


def test_a_mean_over_uneven_micro_batches_weighs_their_rows() -> None:
    torch.manual_seed(1)
    model = Language()
    tactic = hocket.PipelineParallel(microbatches=(5, 3))
    with hocket.parallelize(model, "pp=2", engine="sim", tactics=[tactic], verify="off") as stages, torch.no_grad():
        torch.testing.assert_close(stages(*tokens()), model(*tokens()))


class Picky(nn.Module):
    """Runs other ops for few rows."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = torch.tanh(self.one(x))
        return self.two(hidden.relu() if len(x) < 3 else hidden).square().mean()


def test_sizes_that_run_other_ops_are_refused_by_the_place() -> None:
    with (
        hocket.parallelize(Picky(), "pp=2", engine="sim", tactics=[hocket.PipelineParallel(microbatches=(2, 4))]) as stages,
        pytest.raises(
            InputError, match=r"micro-batches of 4 and of 2 rows do not run the same ops .*give all micro-batches the same"
        ),
    ):
        stages.train_step(torch.randn(6, 4))


def order_for(schedule: str = "auto", mesh: str = "pp=4") -> PipelineOrder:
    order = pipeline_order(Language(), Mesh.parse(mesh), [hocket.PipelineParallel(schedule=schedule)])
    assert order is not None
    return order


def test_tapers_are_proposed_where_the_simulator_says_that_they_help() -> None:
    """Without fixed costs small micro-batches at both ends fill and drain four stages sooner; with high ones they only cost."""
    free = PipelineCosts.uniform(4, 1.0, 1.0, 1.0)
    rows, reason = propose_rows(free, (8,) * 8, order_for())
    assert sum(rows) == 64
    assert len(set(rows)) > 1
    assert rows[0] < max(rows), "the first one is small"
    assert float(reason.rpartition("save ")[2].partition("%")[0]) > 3
    shared, _ = propose_rows(free, (8,) * 8, order_for(mesh="pp=4,dp=2"))
    assert sum(shared) == 64
    assert all(size % 2 == 0 for size in shared), "replicas share every micro-batch"
    assert propose_rows(dataclasses.replace(free, fixed=3.0), (8,) * 8, order_for()) == ((8,) * 8, "")


def test_a_schedule_asked_for_by_name_gets_equal_micro_batches() -> None:
    assert propose_rows(PipelineCosts.uniform(4, 1.0, 1.0, 1.0), (8,) * 8, order_for("1f1b")) == ((8,) * 8, "")


@pytest.mark.parametrize(("schedule", "message"), [("auto", r"at least|least"), ("gpipe", r"allow [\d,]+, leave the choice")])
def test_a_memory_limit_that_cannot_be_kept_names_the_least_that_would_do(schedule: str, message: str) -> None:
    tactic = hocket.PipelineParallel(microbatches=4, schedule=schedule, memory="100B")
    with (
        hocket.parallelize(Language(), "pp=2", engine="sim", tactics=[tactic], verify="off") as stages,
        pytest.raises(InputError, match=message) as caught,
    ):
        stages.train_step(*tokens())
    words = str(caught.value).replace(",", "").split()
    numbers = [int(word.strip(".:;")) for word in words if word.strip(".:;").isdigit()]
    least = max(numbers)
    enough = hocket.PipelineParallel(microbatches=4, schedule=schedule, memory=least)
    with hocket.parallelize(Language(), "pp=2", engine="sim", tactics=[enough], verify="off") as stages:
        stages.train_step(*tokens())


HOOK = """
from pathlib import Path

def install(worker):
    unload = worker._unload_pipeline

    def counted(packet):
        unload(packet)
        with Path({path!r}).open("a") as file:
            file.write(f"{{worker.rank}} {{len(worker.pipelines)}}\\n")

    worker._unload_pipeline = counted
"""


def test_forms_beyond_the_capacity_leave_the_ranks_and_their_memory(tmp_path: Path) -> None:
    log, hook = tmp_path / "log", tmp_path / "hook.py"
    hook.write_text(HOOK.format(path=str(log)))
    model = Language()
    with hocket.parallelize(model, "pp=2", tactics=[hocket.PipelineParallel(microbatches=2)], verify="off") as stages:
        session = session_of(stages)
        session._made.capacity = 1
        session._open = lambda: LocalEngine(Mesh.parse("pp=2"), rank_hook=hook)
        stages.train_step(*tokens(8))
        arena = session._engine.arena
        blocks = arena.live_blocks()
        for rows in (4, 8):
            stages.train_step(*tokens(rows))
        assert arena.live_blocks() == blocks
    assert sorted(log.read_text().splitlines()) == ["0 1"] * 2 + ["1 1"] * 2, "one pipeline is left after each of two unloads"
