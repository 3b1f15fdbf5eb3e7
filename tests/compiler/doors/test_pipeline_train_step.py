"""Stages that hold the optimizer: every step is that of torch's own optimizer on gradients added up over micro-batches."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from pipeline_support import Language, one_thread, plain_step, tokens
from torch import Tensor, nn
from torch.optim import Optimizer

import hocket
from hocket.errors import InputError
from hocket.runtime.schedule.verify import verify_schedule

__all__ = ["one_thread"]

pytestmark = pytest.mark.usefixtures("one_thread")

OPTIMIZERS: dict[str, Callable[[Iterable[nn.Parameter]], Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, 0.1, foreach=False),
    "momentum": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, nesterov=True, weight_decay=0.01, foreach=False),
    "adamw": lambda p: torch.optim.AdamW(p, 0.01, foreach=False),
}


def pair(kind: str, *, tied: bool = False) -> tuple[nn.Module, nn.Module, Optimizer, Optimizer]:
    """A model and its twin, each with an optimizer."""
    torch.manual_seed(1)
    model = Language(2, tied=tied)
    twin = copy.deepcopy(model)
    return model, twin, OPTIMIZERS[kind](model.parameters()), OPTIMIZERS[kind](twin.parameters())


def states(optimizer: Optimizer) -> list[Tensor]:
    return [value for state in optimizer.state_dict()["state"].values() for value in state.values() if isinstance(value, Tensor)]


def assert_same(found: nn.Module, expected: nn.Module, check: Callable[[Tensor, Tensor], Any]) -> None:
    for (name, one), other in zip(found.named_parameters(), expected.parameters(), strict=True):
        assert check(one.detach(), other.detach()) is not False, name


@pytest.mark.parametrize(
    ("kind", "rows", "schedule"), [("sgd", (2, 2, 2, 2), "auto"), ("momentum", (2, 2, 2, 2), "1f1b"), ("adamw", (2, 3, 3), "auto")]
)
def test_steps_on_the_stages_are_those_of_torch_to_the_last_bit(kind: str, rows: tuple[int, ...], schedule: str) -> None:
    model, twin, ours, theirs = pair(kind)
    tactic = hocket.PipelineParallel(microbatches=rows, schedule=schedule)
    schedulers = [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5) for optimizer in (ours, theirs)]
    with hocket.train_step(model, "pp=2", ours, engine="sim", tactics=[tactic]) as step:
        for _ in range(3):
            loss = step(*tokens())
            theirs.zero_grad()
            assert torch.equal(loss, plain_step(twin, tokens(), rows))
            theirs.step()
            for scheduler in schedulers:
                scheduler.step()
        assert str(step.verify("ring").status) == "equal"
        verify_schedule(step.compiled.schedule)
        assert "O once a step" in " ".join(step.explain().split())
    assert_same(model, twin, torch.equal)
    assert all(torch.equal(one, other) for one, other in zip(states(ours), states(theirs), strict=True))


@pytest.mark.parametrize("engine", ["sim", "local"])
def test_tied_weights_and_clipping_reach_every_stage(engine: str) -> None:
    """Sums over stages are ordered otherwise than those of one process, so equality is up to rounding here."""
    model, twin, ours, theirs = pair("adamw", tied=True)
    tactic = hocket.PipelineParallel(microbatches=4, schedule="zb-v" if engine == "sim" else "auto")
    with hocket.train_step(model, "pp=2", ours, engine=engine, tactics=[tactic], clip_norm=0.3) as step:
        for _ in range(2):
            loss = step(*tokens())
            theirs.zero_grad()
            torch.testing.assert_close(loss, plain_step(twin, tokens(), (2, 2, 2, 2)))
            assert torch.nn.utils.clip_grad_norm_(twin.parameters(), 0.3) > 0.3, "or nothing is clipped"
            theirs.step()
        kinds = {str(part)[0] for stage in step.compiled.pipeline.stages for part in stage.parts}
        assert {"S", "O"} <= kinds
        assert "is read by stages" in step.explain()
    assert_same(model, twin, torch.testing.assert_close)
    for one, other in zip(states(ours), states(theirs), strict=True):
        torch.testing.assert_close(one, other)


def test_clipping_on_stages_is_that_of_one_process_to_the_last_bit() -> None:
    """Scalars are added up in the order of the parameters on every stage, whoever computed them."""
    results = []
    for mesh, options in (("pp=2", [hocket.PipelineParallel(microbatches=1)]), ("d=1", "auto")):
        model, _, optimizer, _ = pair("momentum")
        with hocket.train_step(model, mesh, optimizer, engine="sim", tactics=options, clip_norm=0.1) as step:
            step(*tokens())
        results.append(model)
    assert_same(*results, torch.equal)


def test_training_goes_on_from_a_checkpoint_of_model_and_optimizer() -> None:
    tactic = hocket.PipelineParallel(microbatches=2)
    model, _, optimizer, _ = pair("adamw")
    with hocket.train_step(model, "pp=2", optimizer, engine="sim", tactics=[tactic], verify="off") as step:
        step(*tokens())
        saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
        step(*tokens())
        expected = copy.deepcopy(model)
        model.load_state_dict(saved[0])
        optimizer.load_state_dict(saved[1])
        step(*tokens())
        assert_same(model, expected, torch.equal)
    fresh, _, other, _ = pair("adamw")
    fresh.load_state_dict(saved[0])
    other.load_state_dict(saved[1])
    with hocket.train_step(fresh, "pp=2", other, engine="sim", tactics=[tactic], verify="off") as step:
        step(*tokens())
    assert_same(fresh, expected, torch.equal)


def test_a_loss_beside_the_model_and_a_frozen_parameter() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 2))
    model[2].weight.requires_grad_(False)
    before = model[2].weight.clone()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    x = torch.randn(6, 4)
    with hocket.train_step(model, "pp=2", optimizer, (x,), loss=lambda out: out.square().mean(), engine="sim") as step:
        losses = [float(step(x)) for _ in range(3)]
    assert losses[0] > losses[1] > losses[2]
    assert torch.equal(model[2].weight, before)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"clip_norm": -1.0}, "clip_norm must be a positive number"),
        ({"clip_norm": True}, "clip_norm must be a positive number"),
        ({"inductor": True}, "a pipeline takes no inductor"),
        ({"window": 3}, "a pipeline has no option 'window'"),
        ({"engine": "cloud"}, 'a pipeline runs on engine "local"'),
    ],
)
def test_senseless_arguments_are_refused(options: dict[str, Any], message: str) -> None:
    model = Language()
    with pytest.raises(InputError, match=message):
        hocket.train_step(model, "pp=2", torch.optim.SGD(model.parameters()), **{"engine": "sim", **options})


def test_a_coupled_step_without_stages_clips_as_torch_does() -> None:
    model, twin, ours, theirs = pair("adamw")
    data = [hocket.DataParallel("dp")]
    with hocket.train_step(model, "dp=2", ours, engine="sim", tactics=data, clip_norm=0.3, verify="types") as step:
        step(*tokens())
    plain_step(twin, tokens(), (8,))
    torch.nn.utils.clip_grad_norm_(twin.parameters(), 0.3)
    theirs.step()
    assert_same(model, twin, torch.testing.assert_close)
