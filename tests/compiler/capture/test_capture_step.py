"""A captured training step does what model, loss, backward and torch's optimizer do, step after step."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from capture_reference import close, interpret
from torch import nn
from torch.optim import Optimizer

from hocket.compiler.capture import capture_step, initial_state
from hocket.compiler.errors import InputError, UnsupportedError
from hocket.compiler.program import Phase, Program, RoleKind, note


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(8, 8, bias=False)  # a bias before the norm would have a gradient of pure rounding noise
        self.norm = nn.BatchNorm1d(8)
        self.out = nn.Linear(8, 8)
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.unused = nn.Parameter(torch.ones(3))

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        y = self.out(self.norm(self.inner(x)).tanh()) * self.scale
        return {"y": y, "loss": y.square().mean()}


def run(program: Program, values: dict[str, torch.Tensor], x: torch.Tensor) -> dict[str, torch.Tensor]:
    flat = [x if role.kind is RoleKind.INPUT else values[role.name] for role in program.signature.inputs]
    found = interpret(program, [value.detach().clone() for value in flat])
    updates = {role.name: value for role, value in found.items() if role.kind is RoleKind.UPDATE}
    (loss,) = (value for role, value in found.items() if role.kind is RoleKind.OUTPUT)
    return {**values, **updates, "loss": loss}


OPTIMIZERS: dict[str, Callable[..., Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1),
    "sgd momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.01),
    "sgd nesterov": lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9, nesterov=True, maximize=True),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01, weight_decay=0.1),
    "adam amsgrad": lambda p: torch.optim.Adam(p, lr=0.01, amsgrad=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01),
    "adamw fused": lambda p: torch.optim.AdamW(p, lr=0.01, fused=True),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.01),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.5, centered=True),
    "adamax": lambda p: torch.optim.Adamax(p, lr=0.01),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_five_steps_equal_eager_with_a_changing_learning_rate(name: str) -> None:
    torch.manual_seed(0)
    model, x = Model(), torch.randn(4, 8)
    optimizer = OPTIMIZERS[name](model.parameters())
    program = capture_step(model, optimizer, (x,))
    values = {**dict(model.named_buffers()), **dict(model.named_parameters()), **initial_state(model, optimizer)}
    reference = copy.deepcopy(model)
    stepper = OPTIMIZERS[name](reference.parameters())
    scheduler = torch.optim.lr_scheduler.ExponentialLR(stepper, 0.5)
    for _ in range(5):
        values["lr:0"] = torch.tensor(stepper.param_groups[0]["lr"], dtype=torch.float64)
        values = run(program, values, x)
        stepper.zero_grad()
        loss = reference(x)["loss"]
        loss.backward()
        stepper.step()
        scheduler.step()
        close(values["loss"], loss.detach(), "loss")
    for key, expected in {**dict(reference.named_buffers()), **dict(reference.named_parameters())}.items():
        close(values[key], expected.detach(), key)
    for key, expected in initial_state(reference, stepper).items():
        if not key.startswith("lr:") and not key.endswith("unused"):
            close(values[key], expected, key)


def test_state_inputs_are_named_and_updates_are_in_the_optimizer_phase() -> None:
    model = Model()
    program = capture_step(model, torch.optim.AdamW(model.parameters()), (torch.randn(4, 8),))
    states = program.signature.inputs_of(RoleKind.STATE)
    assert {"lr:0", "exp_avg:inner.weight", "exp_avg_sq:inner.weight", "step:inner.weight"} <= set(states)
    assert "exp_avg:unused" not in states
    updated = program.signature.outputs_of(RoleKind.UPDATE)
    assert note(program.results[updated["inner.weight"]]).phase is Phase.OPTIMIZER
    assert not program.signature.inputs_of(RoleKind.TANGENT)
    assert not program.signature.outputs_of(RoleKind.GRADIENT)


def test_parameter_groups_have_learning_rates_of_their_own() -> None:
    torch.manual_seed(0)
    model, x = Model(), torch.randn(4, 8)
    groups = [{"params": model.inner.parameters(), "lr": 0.5}, {"params": [model.scale], "weight_decay": 0.1}]
    optimizer = torch.optim.SGD(groups, lr=0.1)
    program = capture_step(model, optimizer, (x,))
    values = run(program, {**dict(model.named_buffers()), **dict(model.named_parameters()), **initial_state(model, optimizer)}, x)
    model(x)["loss"].backward()
    optimizer.step()
    for name in ("inner.weight", "scale", "out.weight"):
        close(values[name], model.get_parameter(name).detach(), name)


def test_a_loss_function_outside_the_model() -> None:
    model, x = nn.Linear(8, 8), torch.randn(4, 8)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    program = capture_step(model, optimizer, (x,), loss=lambda y: y.abs().sum())
    values = run(program, {**dict(model.named_parameters()), **initial_state(model, optimizer)}, x)
    close(values["loss"], model(x).abs().sum().detach(), "loss")


def test_a_live_optimizer_goes_on_from_its_state() -> None:
    torch.manual_seed(0)
    model, x = Model(), torch.randn(4, 8)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, dampening=0.5)
    program = capture_step(model, optimizer, (x,))
    with pytest.raises(UnsupportedError, match="dampening"):
        initial_state(model, optimizer)
    model(x)["loss"].backward()
    model.unused.grad = torch.zeros(3)
    optimizer.step()
    values = {**dict(model.named_buffers()), **dict(model.named_parameters()), **initial_state(model, optimizer)}
    values = run(program, values, x)
    optimizer.zero_grad()
    model(x)["loss"].backward()
    optimizer.step()
    close(values["inner.weight"], model.inner.weight.detach(), "inner.weight")


def test_the_optimizer_is_left_as_found() -> None:
    model = Model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    groups = [dict(group) for group in optimizer.param_groups]
    capture_step(model, optimizer, (torch.randn(4, 8),))
    initial_state(model, optimizer)
    assert optimizer.param_groups == groups
    assert not optimizer.state
    assert all(parameter.grad is None for parameter in model.parameters())


def test_what_cannot_step_is_refused() -> None:
    model, x = nn.Linear(8, 8), torch.randn(4, 8)
    with pytest.raises(UnsupportedError, match="LBFGS"):
        capture_step(model, torch.optim.LBFGS(model.parameters()), (x,))
    with pytest.raises(UnsupportedError, match="RAdam takes decisions by the values of its state"):
        capture_step(model, torch.optim.RAdam(model.parameters()), (x,), loss=torch.sum)
    with pytest.raises(InputError, match="not in the model"):
        capture_step(model, torch.optim.SGD(nn.Linear(2, 2).parameters(), lr=0.1), (x,))
    with pytest.raises(InputError, match="scalar loss"):
        capture_step(model, torch.optim.SGD(model.parameters(), lr=0.1), (x,))
