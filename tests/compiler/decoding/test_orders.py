"""Groups by locality: every position once, growing, few neighbours together, and drawn exactly by windows."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import hocket
from hocket.compiler.decoding.orders import group_sizes
from hocket.errors import InputError


def neighbours_together(groups: list[list[int]], width: int) -> float:
    """Share of positions with one beside, above or below them in their own group."""
    where = {p: (rank, *divmod(p, width)) for rank, group in enumerate(groups) for p in group}
    taken = set(where.values())
    beside = ((0, 1), (1, 0), (0, -1), (-1, 0))
    return sum(any((r, y + dy, x + dx) in taken for dy, dx in beside) for r, y, x in where.values()) / len(where)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(1, 7), min_size=1, max_size=3), st.data(), st.integers(0, 3))
def test_every_position_is_drawn_once_in_groups_that_grow(sizes: list[int], data: st.DataObject, seed: int) -> None:
    count = torch.Size(sizes).numel()
    steps = data.draw(st.integers(1, count))
    groups = hocket.locality_order(sizes, steps, seed=seed)
    assert len(groups) == steps
    assert sorted(p for group in groups for p in group) == list(range(count))
    lengths = [len(group) for group in groups]
    assert lengths == sorted(lengths) == group_sizes(count, steps)
    assert groups == hocket.locality_order(sizes, steps, seed=seed)


def test_the_golden_order_of_a_small_grid() -> None:
    groups = hocket.locality_order((3, 3), 4)
    assert [len(group) for group in groups] == [1, 2, 3, 3]
    assert neighbours_together(groups, 3) == 0.0


def test_few_neighbours_are_drawn_together_and_most_stand_beside_something_known() -> None:
    groups = hocket.locality_order((16, 16), 20)
    shuffled, ends = torch.randperm(256, generator=torch.Generator().manual_seed(0)).tolist(), [0]
    ends += itertools.accumulate(len(group) for group in groups)
    random = [shuffled[a:b] for a, b in itertools.pairwise(ends)]
    assert neighbours_together(groups, 16) < 0.1 < neighbours_together(random, 16)
    known: set[int] = set()
    lonely = 0
    for group in groups:
        for y, x in (divmod(p, 16) for p in group):
            near = {(y + dy) * 16 + x + dx for dy in (-1, 0, 1) for dx in (-1, 0, 1) if 0 <= y + dy < 16 and 0 <= x + dx < 16}
            lonely += not near & known
        known |= set(group)
    assert lonely < 64


def test_closeness_of_ones_own_keeps_dependent_positions_apart() -> None:
    closeness = torch.zeros(12, 12)
    for a in range(0, 12, 2):  # pairs that tell everything of each other, far apart on the line
        closeness[a, 11 - a] = closeness[11 - a, a] = 1.0
    *groups, _ = hocket.locality_order((12,), 3, closeness=closeness)  # the last one takes what is left
    assert all(11 - p not in group for group in groups for p in group)
    assert {11 - p for p in groups[0]} <= set(groups[1])  # known well


class Grouped(nn.Module):
    """Every position reads those of earlier groups, and no other."""

    def __init__(self, groups: list[list[int]]) -> None:
        super().__init__()
        count = sum(map(len, groups))
        rank = torch.empty(count)
        for i, group in enumerate(groups):
            rank[group] = float(i)
        generator = torch.Generator().manual_seed(1)
        self.weight = nn.Parameter(torch.randn(count, count, generator=generator))
        self.register_buffer("mask", (rank[:, None] > rank[None]).float())

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight * self.mask)


def draw(logits: Tensor, noise: Tensor) -> Tensor:
    return (noise < logits).float()


@pytest.mark.parametrize("window", [5, 36])
def test_groups_are_drawn_exactly_in_no_more_sweeps_than_there_are_groups(window: int) -> None:
    groups = hocket.locality_order((6, 6), 9)
    net, noise = Grouped(groups).eval(), torch.randn(3, 36, generator=torch.Generator().manual_seed(2))
    expected = torch.zeros_like(noise)
    with torch.no_grad():
        for group in groups:
            expected[:, group] = draw(net(expected), noise)[:, group]
    found, report = hocket.sample(net, draw, noise, order=groups, window=window)
    assert torch.equal(found, expected)
    if window == 36:
        assert report.sweeps <= len(groups) + 1
        assert report.accepted >= 36 / 10


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (((), 1), "sizes must be"),
        (((4, 0), 1), "sizes must be"),
        (((4, 4), 17), "from 1 to the 16 positions"),
        (((4, 4), 0), "from 1 to the 16 positions"),
        (((2,), 1, torch.ones(3, 3)), r"closeness must be \[2, 2\]"),
        (((2,), 1, torch.tensor([[0.0, -1.0], [-1.0, 0.0]])), "not negative"),
        (((2,), 1, torch.tensor([[0.0, 1.0], [0.5, 0.0]])), "symmetric"),
    ],
)
def test_what_is_no_grid_is_refused(arguments: tuple[object, ...], message: str) -> None:
    sizes, steps, *rest = arguments
    with pytest.raises(InputError, match=message):
        hocket.locality_order(sizes, steps, closeness=rest[0] if rest else None)  # type: ignore[arg-type]
