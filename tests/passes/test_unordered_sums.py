"""Sums without a fixed order are found, said, and in order where torch is asked for it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from split_support import context, even_stages, held_by, random_inputs, run
from torch import Tensor, nn

from hocket.compiler.capture import capture
from hocket.compiler.program import Program
from hocket.passes.backward_split import BackwardSplit
from hocket.passes.pipeline import cut_stages
from hocket.passes.unordered_sums import has_no_order


class Routed(nn.Module):
    """Rows chosen by index from a weight, many times the same: its gradient is a sum over repeated indices."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(3, 64, 64))
        self.out = nn.Linear(64, 4)

    def forward(self, x: Tensor, chosen: Tensor) -> Tensor:
        """x [rows, 64], chosen [rows]."""
        return self.out(torch.einsum("ri,rio->ro", x, self.table[chosen]))


@pytest.fixture
def routed() -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    torch.manual_seed(0)
    return Routed(), (torch.randn(48, 64), torch.randint(0, 3, (48,)))


@pytest.fixture
def two_threads() -> Iterator[None]:
    before, mode = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)
    torch.use_deterministic_algorithms(mode)


def _program(routed: tuple[nn.Module, tuple[Tensor, Tensor]]) -> Program:
    return BackwardSplit(worth=0)(capture(*routed), context())


def test_a_gradient_that_adds_repeated_rows_is_said_to_have_no_order(routed: tuple[nn.Module, tuple[Tensor, Tensor]]) -> None:
    program = _program(routed)
    pipeline = cut_stages(program, even_stages(program, 2))
    said = [decision for decision in pipeline.program.decisions if decision.reason.startswith("reordered_sum")]
    assert [decision.node for decision in said] == [node.name for node in program.nodes if has_no_order(node)]
    assert len(said) == 1
    assert "use_deterministic_algorithms" in said[0].reason
    assert "self.table[chosen]" in said[0].source


def test_writing_rows_and_counting_integers_have_an_order() -> None:
    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    for dtype, accumulate, expected in ((torch.float32, True, True), (torch.float32, False, False), (torch.int64, True, False)):
        node = graph.call_function(torch.ops.aten.index_put.default, (x, [x], x, accumulate))
        node.meta["val"] = torch.empty(2, dtype=dtype)
        assert has_no_order(node) is expected


@pytest.mark.usefixtures("two_threads")
def test_on_several_threads_deterministic_mode_makes_them_equal_to_the_last_bit(
    routed: tuple[nn.Module, tuple[Tensor, Tensor]],
) -> None:
    torch.use_deterministic_algorithms(True)
    model, args = routed
    program = _program(routed)
    given = held_by(program, model) | random_inputs(program, 0)
    given |= {program.signature.inputs[place]: args[i] for i, place in enumerate(program.signature.in_leaves[:2])}
    first = run(program, given)
    for _ in range(5):
        assert all(torch.equal(value, first[role]) for role, value in run(program, given).items())
