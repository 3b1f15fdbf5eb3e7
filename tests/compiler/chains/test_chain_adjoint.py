"""Gradients through chains are those of autograd through the loop, in float64 to 1e-10, whatever the step and the solver."""

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import hocket
from hocket.compiler.contract import Context
from hocket.compiler.cost.cluster import Cluster
from hocket.compiler.program import RoleKind
from hocket.compiler.rules.table import RuleTable
from hocket.compiler.verify.lockstep import run_global
from hocket.passes.chain.jacobi import JacobiFeedforward
from hocket.runtime.mesh import Mesh

STEPS, ROWS, WIDTH = 9, 2, 3


class RandomCell(nn.Module):
    """A smooth step of a few random ops on two states, with weights and an output of its own."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        draw = random.Random(seed)
        torch.manual_seed(seed)
        self.weights = nn.ParameterList([nn.Parameter(torch.randn(WIDTH, WIDTH, dtype=torch.float64) / WIDTH) for _ in range(2)])
        self.bias = nn.Parameter(torch.randn(WIDTH, dtype=torch.float64))
        self.plan = [
            (draw.choice("mmasgd"), draw.randrange(8), draw.randrange(8), draw.randrange(2)) for _ in range(draw.randint(2, 6))
        ]

    def step(self, state: tuple[torch.Tensor, torch.Tensor], x: torch.Tensor) -> tuple[tuple[torch.Tensor, ...], torch.Tensor]:
        values = [*state, x]
        for kind, i, j, k in self.plan:
            a, b = values[i % len(values)], values[j % len(values)]
            match kind:
                case "m":
                    new = torch.tanh(a @ self.weights[k] + b)
                case "a":
                    new = 0.5 * (a + b)
                case "s":
                    new = torch.sigmoid(a + self.bias) * b
                case "g":
                    new = torch.tanh(a) * torch.sigmoid(b)
                case _:
                    new = 0.7 * a - 0.2 * b
            values.append(new)
        first = values[-1] + 0.1 * torch.tanh(state[1] @ self.weights[0] + self.bias)  # every result depends on every weight
        return (first, 0.5 * state[0] + 0.3 * torch.tanh(values[-2] @ self.weights[1])), first * x

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        zero = x.new_zeros(ROWS, WIDTH)
        (last, _), given_out = hocket.sequential(self.step)((zero, zero + 0.1), x)
        return last, given_out


def check(seed: int, solvers: tuple[str, ...]) -> None:
    model, x = RandomCell(seed), torch.randn(STEPS, ROWS, WIDTH, dtype=torch.float64)
    tangents = [torch.randn(ROWS, WIDTH, dtype=torch.float64), torch.randn(STEPS, ROWS, WIDTH, dtype=torch.float64)]
    parameters = dict(model.named_parameters())
    found = torch.autograd.grad(model(x), list(parameters.values()), tangents, allow_unused=True)
    expected = dict(zip(parameters, found, strict=True))
    captured = hocket.capture(model, (x,))
    context = Context(Mesh.parse("one=1"), RuleTable(None), Cluster.current())
    left = iter(tangents)
    values = {}
    for role in captured.signature.inputs:
        if role.kind is RoleKind.PARAM:
            values[role] = parameters[role.name].detach()
        elif role.kind is RoleKind.TANGENT:
            values[role] = next(left)
        elif role.kind is RoleKind.INPUT:
            values[role] = x
    for program in (captured, *(JacobiFeedforward(solver)(captured, context) for solver in solvers)):
        outputs = run_global(program, values, torch.float64).outputs
        for role, value in outputs.items():
            if role.kind is RoleKind.GRADIENT and role.name in expected:
                wanted = expected[role.name]
                zero = torch.zeros(()) if value is None else torch.zeros_like(value)
                torch.testing.assert_close(
                    zero if value is None else value, zero if wanted is None else wanted, rtol=1e-10, atol=1e-10, msg=str(seed)
                )


@settings(max_examples=3, deadline=None)
@given(st.integers(0, 1 << 20))
def test_gradients_of_random_cells_are_those_of_autograd(seed: int) -> None:
    check(seed, ("blocks:4",))


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_gradients_of_many_random_cells_are_those_of_autograd_with_every_solver() -> None:
    for seed in range(150):
        check(seed, ("blocks:4", "jacobi", "windows:3", "sequential", "auto"))
