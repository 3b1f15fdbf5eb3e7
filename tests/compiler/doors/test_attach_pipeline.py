"""Pipelines under a launcher: stages with parameters of their own train as one process does, to the last bit."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from pipeline_support import Language, one_thread, plain_step, tokens
from torch import nn

import hocket
from hocket.compiler.doors.pipeline.attached import OwnStages, check_whole, open_attached
from hocket.compiler.doors.pipeline.batch import Batch
from hocket.compiler.doors.pipeline.compile import compile_pipeline
from hocket.compiler.doors.pipeline.options import pipeline_order
from hocket.compiler.doors.pipeline.units import partition_as_before
from hocket.errors import InputError
from hocket.runtime.engines.attach import AttachEngine
from hocket.runtime.mesh import Mesh
from hocket.runtime.schedule.stage import Port

__all__ = ["one_thread"]

SCRIPT = Path(__file__).with_name("attach_pipeline_script.py")
LAUNCHER_WORDS = ("RANK", "WORLD", "SLURM", "MASTER", "OMPI", "TORCHELASTIC")


def launch(case: str, ranks: int, *, fails: bool = False) -> str:
    """What the ranks print."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), str(SCRIPT), case]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, check=False, env=environment)
    assert (done.returncode != 0) == fails, done.stderr[-4000:]
    return done.stdout + done.stderr


def test_stages_on_launched_ranks_train_like_one_process() -> None:
    assert launch("both", 2).count("equal") == 4


def test_engines_that_make_one_world_after_the_other_find_each_other_every_time() -> None:
    assert launch("worlds", 2).count("equal worlds") == 2


@pytest.mark.slow
@pytest.mark.parametrize(("case", "count"), [("gradients", 6), ("training", 4)])
def test_every_schedule_and_tied_weights_on_launched_ranks(case: str, count: int) -> None:
    assert launch(case, 2).count("equal") == count


@pytest.mark.slow
def test_replicas_of_stages_on_launched_ranks() -> None:
    assert launch("replicas", 4).count("equal") == 4


@pytest.mark.slow
def test_a_stage_that_fails_is_named_on_its_rank_and_on_the_one_that_waits_for_it() -> None:
    said = launch("failure", 2, fails=True)
    assert "rank 0 failed in" in said or "index out of range" in said
    assert "another rank has failed, see what it printed" in said


@pytest.fixture
def no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if any(word in name for word in LAUNCHER_WORDS):
            monkeypatch.delenv(name)


@pytest.mark.usefixtures("no_launcher")
def test_a_world_of_another_size_and_a_model_elsewhere_are_refused_at_the_door() -> None:
    with pytest.raises(InputError, match="mesh pp=2 needs 2 ranks, found this process alone; run: torchrun --nproc-per-node 2"):
        hocket.parallelize(Language(), "pp=2", engine="attach")
    with pytest.raises(InputError, match="runs on CPU ranks, found a model on meta"):
        open_attached(nn.Linear(2, 2, device="meta"), Mesh.parse("pp=2"))


@pytest.mark.usefixtures("no_launcher", "one_thread")
def test_a_pipeline_of_one_launched_rank_is_the_plain_model() -> None:
    torch.manual_seed(0)
    model, twin = Language(), Language()
    twin.load_state_dict(model.state_dict())
    tactic = hocket.PipelineParallel(microbatches=2)
    with hocket.parallelize(model, "pp=1", engine="attach", tactics=[tactic]) as stages:
        assert torch.equal(stages.train_step(*tokens()), plain_step(twin, tokens(), (4, 4)))
    assert model.state_dict().keys() == twin.state_dict().keys()
    for one, other in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(one.grad, other.grad)


def test_later_forms_of_call_leave_every_parameter_where_it_is() -> None:
    model = Language(4, tied=True)
    order = pipeline_order(model, Mesh.parse("pp=3"), [hocket.PipelineParallel(microbatches=2)], "off")
    assert order is not None
    trained = compile_pipeline(order, Batch(tokens(), {}), train=True)
    homes: dict[str, set[int]] = {}
    for stage in trained.pipeline.stages:
        for name in stage.parameters:
            homes.setdefault(name, set()).add(stage.stage)
    settled = {name: tuple(sorted(stages)) for name, stages in homes.items()}
    served = compile_pipeline(order, Batch(tokens()[:1], {}), train=False).forms[0].lowered
    found = partition_as_before(served, settled)
    assert set(found.values()) == {0, 1, 2}
    assert list(found.values()) == sorted(found.values())
    with pytest.raises(InputError, match="needs the stages in another order"):
        partition_as_before(served, {name: (2 - stages[0],) for name, stages in settled.items()})


@pytest.mark.usefixtures("no_launcher")
def test_weights_that_are_cut_within_a_stage_are_refused_by_name() -> None:
    with AttachEngine(Mesh.parse("pp=1"), device="cpu") as engine:
        check_whole({Port("param", "head.weight"): ("R",)}, engine)
        with pytest.raises(InputError, match=r"param head.weight is cut \(S\(0\)\) on mesh pp=1: .* use engine='local'"):
            check_whole({Port("param", "head.weight"): ("S(0)",)}, engine)


@pytest.mark.usefixtures("no_launcher")
def test_what_lives_elsewhere_looks_whole_while_compiling_and_is_not_a_number_afterwards() -> None:
    model = Language(2)
    with AttachEngine(Mesh.parse("pp=1"), device="cpu") as engine:
        own = OwnStages(model, engine)
        own._elsewhere.append((model.head.weight, model.head.weight.stride()))
        with own.whole():
            assert model.head.weight.stride() == (8, 1)
        assert model.head.weight.isnan().all()
        assert model.head.weight.untyped_storage().nbytes() == 4
