"""What plain tracing cannot do, torch.export or dynamo may; the program says who did it and why."""

from __future__ import annotations

import pytest
import torch
from capture_reference import assert_like_eager, interpret, values_of
from torch import nn

from hocket.compiler.capture import capture
from hocket.compiler.program import RoleKind, note


class ReadsNumpy(nn.Module):
    """Dynamo knows numpy; the others do not."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.calls = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        scale = torch.from_numpy(x.detach().numpy() * 2)
        return self.linear(x) * scale


class ChecksUnlessCompiling(nn.Module):
    """As many libraries do: read a value only when nobody compiles."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.register_buffer("seen", torch.zeros(8))

    def forward(self, x: torch.Tensor, other: torch.Tensor) -> dict[str, torch.Tensor]:
        if not torch.compiler.is_compiling() and x.isnan().any():
            raise ValueError("nan")
        self.seen.add_(1)
        y = self.linear(x).tanh()
        return {"y": y + other * self.seen, "x": x}


def reason(program) -> str:
    (decision,) = (d for d in program.decisions if d.by == "capture" and d.reason.startswith("traced with"))
    return decision.reason


def test_export_takes_over_and_says_why() -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 8)
    program = assert_like_eager(ChecksUnlessCompiling(), (x,), {"other": x})
    assert reason(program).startswith("traced with torch.export; make_fx failed: Python needs the value of a tensor here")
    assert list(program.signature.outputs_of(RoleKind.UPDATE)) == ["seen"]
    (tanh,) = (node for node in program.nodes if node.target is torch.ops.aten.tanh.default)
    (backward,) = (node for node in program.nodes if node.target is torch.ops.aten.tanh_backward.default)
    assert note(tanh).source.endswith("y = self.linear(x).tanh()")
    assert note(backward).source == note(tanh).source
    assert {note(n).module for n in program.nodes if n.target is torch.ops.aten.addmm.default} == {"linear"}


def test_dynamo_takes_over_and_says_why() -> None:
    torch.manual_seed(0)
    model = ReadsNumpy()
    program = assert_like_eager(model, (torch.randn(4, 8),))
    assert reason(program).startswith("traced with dynamo; make_fx failed: ")
    assert "torch.export failed: " in reason(program)
    assert model.calls == 0
    products = [note(n) for n in program.nodes if n.target is torch.ops.aten.mul.Tensor]
    assert any(n.source.endswith("return self.linear(x) * scale") for n in products)


def test_a_plain_function_falls_back_too() -> None:
    def function(x: torch.Tensor) -> torch.Tensor:
        return x.sin() * torch.from_numpy(x.detach().numpy() * 2)

    x = torch.randn(4, 8)
    program = capture(function, (x,), train=False)
    (found,) = interpret(program, values_of(program, None, (x,), {}, {})).values()
    torch.testing.assert_close(found, function(x))


@pytest.mark.parametrize("train", [True, False])
def test_plain_tracing_is_what_is_used_first(train: bool) -> None:
    assert reason(capture(nn.Linear(8, 8), (torch.randn(4, 8),), train=train)) == "traced with make_fx"
