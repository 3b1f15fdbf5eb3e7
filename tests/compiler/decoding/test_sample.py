"""Sampling by windows gives what drawing place by place gives, on random masked networks, orders and windows."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import hocket
from hocket.errors import InputError


class Made(nn.Module):
    """Masked layers with random degrees, ``per`` parameters a position, in a given order of generation."""

    def __init__(self, positions: int, hidden: Sequence[int], per: int, seed: int, order: Sequence[int] | None = None) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        place = torch.tensor(order if order is not None else range(positions)).argsort()
        self.per = per
        self.layers = nn.ModuleList()
        degrees = place
        for width in hidden:
            new = torch.randint(0, max(1, positions - 1), (width,), generator=generator)
            self._add(new[:, None] >= degrees[None, :], generator)
            degrees = new
        self._add((place[:, None] > degrees[None, :]).repeat(per, 1), generator)
        self.scale = nn.Parameter(torch.rand(positions, generator=generator) + 0.5)

    def _add(self, mask: Tensor, generator: torch.Generator) -> None:
        layer = nn.Linear(mask.shape[1], mask.shape[0])
        with torch.no_grad():
            layer.weight.normal_(std=1.5, generator=generator)
            layer.bias.normal_(generator=generator)
        layer.register_buffer("mask", mask.float())
        self.layers.append(layer)

    def forward(self, x: Tensor) -> Tensor:
        h = x
        for layer in self.layers[:-1]:
            h = torch.tanh(nn.functional.linear(h, layer.weight * layer.mask, layer.bias))
        last = self.layers[-1]
        out = nn.functional.linear(h, last.weight * last.mask, last.bias)
        return out.view(-1, self.per, x.shape[1]).transpose(1, 2) * self.scale[:, None]


class Causal(nn.Module):
    """A convolution over what came before: not a masked network, so evaluated whole."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(1, 1, 4)

    def forward(self, x: Tensor) -> Tensor:
        shifted = nn.functional.pad(x[:, None, :-1], (4, 0))
        return self.conv(shifted)[:, 0]


def bernoulli(parameters: Tensor, noise: Tensor) -> Tensor:
    return (noise < parameters.reshape(*noise.shape, -1).sum(-1)).float()


def logistic(parameters: Tensor, noise: Tensor) -> Tensor:
    return torch.tanh(0.3 * parameters[..., 0] + torch.exp(0.1 * parameters[..., 1].clamp(-2, 2)) * noise)


def place_by_place(cond: nn.Module, draw: Any, noise: Tensor, groups: Sequence[Sequence[int]]) -> Tensor:
    x = torch.zeros(noise.shape[:2])
    with torch.no_grad():
        for group in groups:
            x[:, list(group)] = draw(cond(x), noise)[:, list(group)]
    return x


@settings(max_examples=40, deadline=None)
@given(
    positions=st.integers(1, 30),
    hidden=st.lists(st.integers(1, 25), max_size=3),
    per=st.integers(1, 2),
    rows=st.integers(1, 4),
    window=st.one_of(st.integers(1, 40), st.just("auto")),
    seed=st.integers(0, 10**6),
    is_shuffled=st.booleans(),
)
def test_masked_networks_are_sampled_as_place_by_place(
    positions: int, hidden: list[int], per: int, rows: int, window: Any, seed: int, is_shuffled: bool
) -> None:
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(positions, generator=generator).tolist() if is_shuffled else None
    cond = Made(positions, hidden, per, seed, order).eval()
    noise = torch.randn(rows, positions, generator=generator)
    expected = place_by_place(cond, bernoulli, noise, [[p] for p in order or range(positions)])
    for _ in range(2):  # "auto" takes another window the second time
        found, report = hocket.sample(cond, bernoulli, noise, order, window)
        assert torch.equal(found, expected), str(report)
        assert report.sweeps <= positions
        assert report.evaluated.startswith("only what")


@pytest.mark.parametrize("tolerance", [0.0, 1e-6])
def test_real_values_agree_to_rounding(tolerance: float) -> None:
    cond, noise = Made(40, (30, 30), 2, seed=1).eval(), torch.randn(3, 40, generator=torch.Generator().manual_seed(2))
    expected = place_by_place(cond, logistic, noise, [[p] for p in range(40)])
    found, report = hocket.sample(cond, logistic, noise, window=16, tolerance=tolerance)
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=0)
    assert report.residual <= tolerance


def test_groups_are_generated_together() -> None:
    """Places of a group may not see each other: the masks say by group when a place is known."""
    groups = [[3], [0, 5], [1, 2, 7], [4, 6]]
    rank = torch.tensor([next(r for r, group in enumerate(groups) if p in group) for p in range(8)])

    class Grouped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(8, 8, generator=torch.Generator().manual_seed(4)))
            self.register_buffer("mask", (rank[:, None] > rank[None, :]).float())

        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.linear(x, self.weight * self.mask)

    cond, noise = Grouped().eval(), torch.randn(5, 8, generator=torch.Generator().manual_seed(5))
    found, report = hocket.sample(cond, bernoulli, noise, groups, window=8)
    assert torch.equal(found, place_by_place(cond, bernoulli, noise, groups))
    assert report.sweeps <= len(groups) + 1
    with pytest.raises(InputError, match="depend on position"):
        hocket.sample(cond, bernoulli, noise, [[3, 0], [5], [1, 2, 7], [4, 6]])


def test_other_networks_are_evaluated_whole_and_the_report_says_why() -> None:
    cond, noise = Causal().eval(), torch.randn(2, 20, generator=torch.Generator().manual_seed(0))
    found, report = hocket.sample(cond, bernoulli, noise)
    assert torch.equal(found, place_by_place(cond, bernoulli, noise, [[p] for p in range(20)]))
    assert "reads positions that are no pixels of one image" in report.evaluated
    assert report.sweeps < 20


def test_a_window_computes_a_part_of_the_network() -> None:
    """Counted by multiplications: slicing is what makes small windows worth their while."""
    from hocket.compiler.capture import capture
    from hocket.compiler.decoding.units import find_units

    cond = Made(64, (64,), 1, seed=3).eval()
    program = capture(cond, (torch.zeros(2, 64),), train=False)
    tensors = {**dict(cond.named_parameters()), **dict(cond.named_buffers())}
    whole = 2 * 64 * 64
    sizes = [high - low for low, high in find_units(program, tensors, torch.arange(64)).cut(32, 40).slices]
    assert sizes[0] * sizes[1] + sizes[1] * sizes[2] < whole / 20


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"noise": torch.randn(3)}, "noise must be"),
        ({"window": 0}, "from 1 up"),
        ({"window": "large"}, "window must be"),
        ({"order": [0, 1, 1, 3]}, "each of the 4 positions once"),
        ({"order": [3, 2, 1, 0]}, "depend on position"),
        ({"tolerance": -1.0}, "tolerance must be"),
        ({"draw": lambda parameters, _: parameters}, "one value per row and position"),
        ({"cond": lambda x: x}, "must be an nn.Module"),
        ({"cond": nn.Linear(4, 3).eval()}, "cond must return"),
        ({"cond": nn.Linear(4, 4).eval()}, "depend on position"),
        ({"cond": Made(4, (3,), 1, 0).train()}, "training mode"),
    ],
)
def test_what_can_not_be_sampled_is_refused_with_the_reason(change: dict[str, Any], message: str) -> None:
    call = {"cond": Made(4, (6,), 1, 0).eval(), "draw": bernoulli, "noise": torch.randn(2, 4), **change}
    with pytest.raises(InputError, match=message):
        hocket.sample(**call)


def test_what_was_prepared_for_a_window_serves_the_next_call() -> None:
    cond = Made(24, (16, 16), 1, seed=1).eval()
    for seed in range(4):
        noise = torch.randn(9, 24, generator=torch.Generator().manual_seed(seed))
        found = hocket.sample(cond, bernoulli, noise, window=5).x
        assert torch.equal(found, place_by_place(cond, bernoulli, noise, [[p] for p in range(24)]))


def test_a_network_evaluated_whole_that_looks_ahead_is_refused() -> None:
    class Ahead(Causal):
        def forward(self, x: Tensor) -> Tensor:
            return self.conv(nn.functional.pad(x[:, None], (3, 0)))[:, 0]

    with pytest.raises(InputError, match="depend on position"):
        hocket.sample(Ahead().eval(), bernoulli, torch.randn(2, 20))


def test_weights_that_were_replaced_are_seen() -> None:
    made, noise = Made(12, [16], 1, seed=0).eval(), torch.randn(4, 12, 1, generator=torch.Generator().manual_seed(0))
    draw = lambda parameters, given: (given[..., 0] < parameters[..., 0]).float()  # noqa: E731
    before = hocket.sample(made, draw, noise).x
    other = Made(12, [16], 1, seed=0)
    for layer, new in zip(made.layers, other.layers, strict=True):
        layer.weight = nn.Parameter(-new.weight.detach())  # as many changes as the old one has seen: none
    after = hocket.sample(made, draw, noise).x
    expected = torch.zeros(4, 12)
    with torch.no_grad():
        for position in range(12):
            expected[:, position] = draw(made(expected), noise)[:, position]
    assert torch.equal(after, expected)
    assert not torch.equal(after, before)


def test_noise_on_another_device_than_the_network_is_refused() -> None:
    with pytest.raises(InputError, match="noise must be where cond is, on meta"):
        hocket.sample(Made(12, [16], 1, seed=0).eval().to("meta"), lambda p, _: p, torch.randn(4, 12, 1))
