"""A model that is changed between two calls is noticed: results are those of the plain model with the same change."""

from __future__ import annotations

import contextlib
import copy
import logging
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import hocket
from hocket.compiler.doors.module import session_of
from hocket.compiler.doors.watch import StateWatch
from hocket.errors import InputError, UnsupportedError
from hocket.runtime.engines.sim import SimEngine
from hocket.runtime.mesh import Mesh

X = torch.linspace(-1, 1, 32).reshape(4, 8)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(8, 8)
        self.act: nn.Module = nn.ReLU()
        self.scale = 2
        self.offset = torch.ones(8)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.up(x)) * self.scale + self.offset


def _new_layer(model: nn.Module) -> None:
    torch.manual_seed(3)
    model.up = nn.Linear(8, 8)


CHANGES: dict[str, Callable[[nn.Module], object]] = {
    "a number": lambda model: setattr(model, "scale", 3),
    "a tensor that is no buffer": lambda model: setattr(model, "offset", torch.zeros(8)),
    "a submodule": lambda model: setattr(model, "act", nn.Tanh()),
    "a submodule with parameters": _new_layer,
    "a submodule's setting": lambda model: setattr(model.act, "inplace", True),
}


@pytest.mark.parametrize("what", CHANGES)
def test_a_change_compiles_again_and_the_result_is_the_plain_models(what: str, caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)
    plain = Net()
    with hocket.parallelize(copy.deepcopy(plain), "d=2", (X,), engine="sim", verify="types") as model:
        torch.testing.assert_close(model(X), plain(X))
        for one in (plain, model):
            CHANGES[what](one)
        with caplog.at_level(logging.WARNING, "hocket"):
            torch.testing.assert_close(model(X), plain(X))
            assert "was changed since the last call" in caplog.text
            caplog.clear()
            torch.testing.assert_close(model(X), plain(X))
            assert caplog.text == ""


def test_nothing_changed_is_no_change_and_modes_are_not_a_change() -> None:
    model = Net()
    model.act.limit = float("nan")
    watch = StateWatch(model)
    model.eval()
    model.up.weight.data.add_(1)
    model.scale = 1 + 1
    assert watch.changed() == ""
    del model.scale
    assert watch.changed() == "scale"


def test_a_decorated_class_is_an_ordinary_module_until_its_first_call() -> None:
    decorated = hocket.parallel(mesh="d=2", engine="sim", verify="types")(Net)
    model = decorated()
    twin = copy.deepcopy(model)
    assert twin.up.weight is not model.up.weight
    torch.testing.assert_close(twin(X), model(X))
    twin.scale = 5
    torch.testing.assert_close(twin(X) - 1, (model(X) - 1) * 2.5)
    for one in (model, twin):
        one.close()
        with pytest.raises(InputError, match="cannot be copied"):
            copy.deepcopy(one)


def test_a_gradient_penalty_is_refused_instead_of_losing_its_gradient() -> None:
    with hocket.parallelize(Net(), "d=2", engine="sim", verify="types") as model:
        x = X.clone().requires_grad_()
        loss = model(x).sum()
        (gradient,) = torch.autograd.grad(loss, x, create_graph=True)
        assert gradient.shape == x.shape
        with pytest.raises(UnsupportedError, match="only first derivatives"):
            (loss.detach() + gradient.norm()).backward()


def _pair(make: Callable[..., torch.optim.Optimizer]) -> tuple[nn.Module, torch.optim.Optimizer, nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    plain = nn.Linear(8, 8)
    other = copy.deepcopy(plain)
    return plain, make(plain.parameters()), other, make(other.parameters())


def _mean_square(result: Tensor) -> Tensor:
    return result.square().mean()


def test_a_scheduler_that_changes_the_momentum_is_followed() -> None:
    plain, optimizer, model, own = _pair(lambda parameters: torch.optim.SGD(parameters, lr=0.01, momentum=0.9))
    schedulers = [torch.optim.lr_scheduler.OneCycleLR(one, 0.1, total_steps=4) for one in (optimizer, own)]
    with hocket.train_step(model, "d=2", own, loss=_mean_square, engine="sim", verify="types") as step:
        for _ in range(3):
            optimizer.zero_grad()
            _mean_square(plain(X)).backward()
            optimizer.step()
            step(X)
            for scheduler in schedulers:
                scheduler.step()
    torch.testing.assert_close(model.weight, plain.weight)


def test_weights_and_settings_loaded_between_steps_are_used() -> None:
    plain, optimizer, model, own = _pair(lambda parameters: torch.optim.AdamW(parameters, lr=0.01))
    with hocket.train_step(model, "d=2", own, loss=_mean_square, engine="sim", verify="types") as step:

        def both() -> None:
            optimizer.zero_grad()
            _mean_square(plain(X)).backward()
            optimizer.step()
            step(X)

        both()
        state = copy.deepcopy(optimizer.state_dict())
        state["param_groups"][0]["weight_decay"] = 0.5
        fresh = nn.Linear(8, 8).state_dict()
        for one, its in ((plain, optimizer), (model, own)):
            one.load_state_dict(fresh)
            its.load_state_dict(copy.deepcopy(state))
        both()
        torch.testing.assert_close(model.weight, plain.weight)
        own.add_param_group({"params": [nn.Parameter(torch.ones(1))]})
        with pytest.raises(InputError, match="add_param_group"):
            step(X)


def test_forms_that_are_forgotten_leave_the_ranks_once_their_last_backward_is_done() -> None:
    with hocket.parallelize(nn.Linear(8, 8), "d=2", verify="off") as model:
        session = session_of(model)
        pending = model(X).sum()
        for rows in range(1, 14):
            model(X.repeat(rows, 1)[: rows + 4]).sum()
        loaded = session.engine._crew.programs
        assert len(loaded) <= session._specialisations.capacity + 2
        pending.backward()
        del pending
        model(X[:3])
        model(X[:2])
        assert len(loaded) <= session._specialisations.capacity + 1


def test_an_engine_of_the_users_own_outlives_the_modules_on_it() -> None:
    with contextlib.closing(SimEngine(Mesh.parse("d=2"))) as engine:
        first, second = (hocket.parallelize(nn.Linear(8, 8), "d=2", (X,), engine=engine, verify="off") for _ in range(2))
        first.close()
        with pytest.raises(InputError, match="was closed"):
            first(X)
        assert second(X).shape == (4, 8)


def test_a_pipeline_refuses_a_hyper_parameter_that_its_stages_hold() -> None:
    model = nn.Sequential(*(nn.Linear(8, 8) for _ in range(4)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    with hocket.train_step(model, "pp=2", optimizer, loss=_mean_square, engine="sim", verify="off") as step:
        step(X)
        optimizer.param_groups[0]["lr"] = 0.1
        step(X)
        optimizer.param_groups[0]["momentum"] = 0.5
        with pytest.raises(InputError, match="make a new train_step"):
            step(X)
