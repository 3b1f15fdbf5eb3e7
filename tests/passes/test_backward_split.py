"""Weight gradients run after the gradients of activations; every gradient is that of eager PyTorch to the last bit."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from random_modules import RandomModule, rows
from split_support import assert_same, context, held_by, random_inputs, run, sequential
from torch import nn

import hocket
from hocket.compiler.capture import capture
from hocket.compiler.errors import InputError
from hocket.compiler.passmanager import run_passes
from hocket.compiler.program import Phase, Program, Role, RoleKind, note
from hocket.passes.backward_split import BackwardSplit, SplitBackward
from hocket.passes.backward_split_choice import base_of
from hocket.passes.backward_split_normal import is_backward
from hocket.passes.backward_split_saved import RecomputeForward

X = Role(RoleKind.INPUT, "args[0]")


def late(program: Program) -> list[str]:
    """Ops of the deferred weight gradients, in order."""
    found = [node for node in program.nodes if note(node).phase is Phase.BACKWARD_WEIGHT]
    return [str(getattr(node.target, "overloadpacket", "getitem")).removeprefix("aten.") for node in found]


def gradients_of(module: nn.Module, x: torch.Tensor) -> dict[str, torch.Tensor]:
    """Those of eager PyTorch for a tangent of one."""
    module.zero_grad()
    module(x).backward()
    return {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}


def assert_like_eager(module: nn.Module, x: torch.Tensor, split: BackwardSplit) -> Program:
    program = capture(module, (x,))
    after = split(program, context())
    given = {**held_by(program, module), **random_inputs(program, 0), X: x.detach()}
    given[Role(RoleKind.TANGENT, "out")] = torch.ones(())
    results = run(after, given)
    for name, gradient in gradients_of(module, x).items():
        assert torch.equal(results[Role(RoleKind.GRADIENT, name)], gradient), name
    return after


class Block(nn.Module):
    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x):
        return x + self.down(F.gelu(self.up(self.norm(x))))


class Net(nn.Sequential):
    def forward(self, x):
        return super().forward(x).square().sum()


def test_products_are_deferred_layer_by_layer_and_cheap_gradients_are_not() -> None:
    program = capture(Net(Block(64), Block(64)), (torch.randn(512, 64, requires_grad=True),))
    split, records = run_passes(program, (BackwardSplit(),), context())
    assert late(split) == ["mm", "sum", "view"] * 4
    phases = [note(node).phase for node in split.nodes if node.op == "call_function"]
    assert phases == sorted(phases, key=[Phase.FORWARD, Phase.BACKWARD_INPUT, Phase.BACKWARD_WEIGHT].index)
    reasons = {one.reason for one in split.decisions if one.by == "backward-split" and one.applied}
    assert any("gradient of 1.down.weight deferred" in reason for reason in reasons)
    assert any("gradient of 1.down.bias deferred" in reason and "holding nothing more" in reason for reason in reasons)
    assert str(records[0].verdict.status) == "equal"


def test_a_gradient_that_holds_more_than_it_is_worth_stays_and_says_so() -> None:
    program = capture(Net(Block(64)), (torch.randn(512, 64),))
    split = BackwardSplit(worth=1e9)(program, context())
    assert late(split) == []
    kept = [one for one in split.decisions if one.by == "backward-split" and not one.applied]
    assert any("0.up.weight stays with the gradients of activations" in one.reason and one.source for one in kept)


@pytest.mark.parametrize("engine", ["sim", pytest.param("local", marks=pytest.mark.slow)])
def test_it_works_alone_on_any_mesh(engine: str) -> None:
    torch.manual_seed(0)
    module, x = Net(Block(), Block()), torch.randn(4, 3, 8)
    expected = gradients_of(module, x)
    module.zero_grad()
    tactics = [hocket.DataParallel("d"), SplitBackward(worth=0)]
    with hocket.parallelize(module, "d=2", (x,), tactics=tactics, engine=engine) as model:
        model(x).backward()
        assert "backward-split" in model.explain()
    for name, parameter in module.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name])


def test_a_norm_and_linear_reused_three_times_is_split_exactly() -> None:
    """torch's own split stops here: it walks the same autograd node a second time."""

    class Reused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.linear = nn.LayerNorm(8), nn.Linear(8, 8)

        def forward(self, x):
            for _ in range(3):
                x = x + self.linear(self.norm(x))
            return x.square().mean()

    split = assert_like_eager(Reused(), torch.randn(4, 8, requires_grad=True), BackwardSplit(worth=0))
    assert late(split).count("mm") == 3
    assert late(split).count("add") >= 2


def test_the_weight_gradient_of_a_convolution_is_split_off() -> None:
    """torch's own split leaves it with the gradient of the input: autograd has one node for both."""
    module = Net(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3))
    split = assert_like_eager(module, torch.randn(2, 3, 8, 8), BackwardSplit(worth=0))
    assert late(split).count("convolution_backward") == 2
    early = [n for n in split.nodes if is_backward(n) and n.name.startswith("convolution_backward") and n.name.endswith("_input")]
    assert len(early) == 1  # nothing needs the gradient of the picture


@given(st.integers(0, 10**6), st.sampled_from([{}, {"worth": 0.0}, {"worth": 0.0, "extra": 0.3}, {"split_norms": True}]))
@settings(max_examples=7, deadline=None)
def test_random_modules_are_split_without_changing_a_bit(seed: int, options: dict[str, float]) -> None:
    module, x = RandomModule(seed), rows(seed)
    program = capture(module, (x,))
    after, records = run_passes(program, (BackwardSplit(**options),), context(), level="types")
    batches = [{X: rows(seed + k), **random_inputs(program, k)} for k in range(2)]
    found, expected = (sequential(one, held_by(program, module), batches) for one in (after, program))
    assert_same(found[1], expected[1])
    for one, other in zip(found[0], expected[0], strict=True):
        assert_same(one, other)
    assert records[0].decisions > 0


@pytest.mark.parametrize("seed", range(3))
def test_random_modules_without_random_numbers_are_those_of_eager(seed: int) -> None:
    kinds = ("linear", "reuse", "norm", "batch", "conv", "chunk", "gelu", "residual")
    assert_like_eager(RandomModule(seed, kinds=kinds), rows(seed), BackwardSplit(worth=0))


def test_values_are_computed_again_within_the_budget_and_less_is_held() -> None:
    def held(split: Program) -> int:
        weights = [n for n in split.nodes if note(n).phase is Phase.BACKWARD_WEIGHT]
        read = {base_of(source) for node in weights for source in node.all_input_nodes} - set(weights)
        return sum(node.meta["val"].numel() for node in read if node.op != "placeholder")

    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = (nn.Linear(32, 96, bias=False), nn.Linear(32, 96, bias=False), nn.Linear(96, 32, bias=False))

        def forward(self, x):
            return self.c(F.silu(self.a(x)) * self.b(x)).square().mean()

    module, x = nn.Sequential(Gated()), torch.randn(256, 32)
    plain = assert_like_eager(module, x, BackwardSplit(worth=0))
    again = assert_like_eager(module, x, BackwardSplit(worth=0, extra=5.0))
    assert held(again) < held(plain)
    assert any("computed again for the weight gradients" in one.reason for one in again.decisions)


@given(st.integers(0, 10**6))
@settings(max_examples=3, deadline=None)
def test_forward_values_computed_again_change_no_bit(seed: int) -> None:
    module, x = RandomModule(seed), rows(seed)
    program = capture(module, (x,))
    after, records = run_passes(program, (RecomputeForward(extra=0.5), BackwardSplit(worth=0)), context(), level="ring")
    batch = {X: x, **random_inputs(program, 0)}
    assert_same(run(after, {**held_by(program, module), **batch}), run(program, {**held_by(program, module), **batch}))
    assert all(str(record.verdict.status) == "equal" for record in records)


def test_cheap_forward_values_are_computed_again_rather_than_saved() -> None:
    def saved(program: Program) -> int:
        read = {base_of(s) for n in program.nodes if is_backward(n) for s in n.all_input_nodes}
        return sum(n.meta["val"].numel() for n in read if n.op != "placeholder" and note(n).phase is Phase.FORWARD)

    class Chain(nn.Module):
        def forward(self, x):
            return torch.sigmoid(torch.tanh(x.exp() * 2) * 3).square().mean()

    program = capture(nn.Sequential(nn.Linear(8, 8), Chain()), (torch.randn(64, 8),))
    again = RecomputeForward(extra=2.0)(program, context())
    assert saved(again) < saved(program)
    assert any("computed again in the backward" in one.reason and one.source for one in again.decisions)
    assert saved(RecomputeForward(extra=0.0)(program, context())) == saved(program)


@pytest.mark.parametrize("options", [{"worth": -1.0}, {"extra": -0.1}])
def test_senseless_options_are_refused(options: dict[str, float]) -> None:
    with pytest.raises(InputError, match="must not be negative"):
        BackwardSplit(**options)
