"""Captured programs of ordinary modules equal eager: outputs, all gradients, all updates."""

from __future__ import annotations

import pytest
import torch
from capture_reference import assert_like_eager
from torch import nn

from hocket.compiler.capture import capture
from hocket.compiler.program import RoleKind


def test_batch_norm_statistics_come_out_as_updates() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
    program = assert_like_eager(model, (torch.randn(4, 3, 8, 8),))
    assert list(program.signature.outputs_of(RoleKind.UPDATE)) == ["1.running_mean", "1.running_var", "1.num_batches_tracked"]


def test_tied_weights_appear_once_and_collect_both_gradients() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(10, 8)
            self.head = nn.Linear(8, 10, bias=False)
            self.head.weight = self.embedding.weight

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.embedding(x))

    program = assert_like_eager(Tied(), (torch.randint(0, 10, (4, 5)),))
    assert list(program.signature.inputs_of(RoleKind.PARAM)) == ["embedding.weight"]
    assert program.signature.tied == {"head.weight": "embedding.weight"}


@pytest.mark.parametrize("train", [True, False])
def test_the_module_is_left_exactly_as_found(train: bool) -> None:
    class Stateful(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(8, 8)
            self.calls = 0
            self.seen: list[torch.Size] = []

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.calls += 1
            self.last = self.linear(x)
            self.seen.append(x.shape)
            return self.last

    model = Stateful()
    weight, x = model.linear.weight, torch.randn(4, 8)
    state = torch.get_rng_state()
    capture(model, (x,), train=train)
    assert model.calls == 0
    assert model.seen == []
    assert not hasattr(model, "last")
    assert model.linear.weight is weight
    assert torch.equal(torch.get_rng_state(), state)


def test_names_that_read_alike_stay_apart() -> None:
    class Alike(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.ParameterDict({"b": nn.Parameter(torch.randn(8))})
            self.a_b = nn.Parameter(torch.randn(8))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * self.a["b"] + self.a_b

    program = assert_like_eager(Alike(), (torch.randn(4, 8),))
    assert set(program.signature.inputs_of(RoleKind.PARAM)) == {"a.b", "a_b"}
    assert len({node.name for node in program.placeholders}) == len(program.signature.inputs)


def test_one_tensor_given_twice_is_two_inputs() -> None:
    x = torch.randn(4, 8, requires_grad=True)
    program = assert_like_eager(lambda a, b: a.sin() + b["x"].cos(), (x, {"x": x}))
    assert list(program.signature.outputs_of(RoleKind.GRADIENT)) == ["args[0]", "args[1]['x']"]


def test_the_generated_code_of_a_program_runs() -> None:
    model, x = nn.Linear(8, 8), torch.randn(4, 8)
    program = capture(model, (x,), train=False)
    assert "addmm" in program.graph.code
    (y,) = program.graph(model.weight, model.bias, x)
    torch.testing.assert_close(y, model(x))
