"""Sizes at which proofs run: small, whole pieces for every rank, and different from each other and from the sizes that stay."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from hocket.compiler.capture import capture_step
from hocket.compiler.doors.hall import Options, compile_program
from hocket.compiler.plan.tactics import TensorParallel
from hocket.compiler.retrace import Retrace, smaller_program
from hocket.compiler.verify.report import Status
from hocket.runtime.mesh import Mesh


class Score(nn.Module):
    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x))).square().mean()


def small_sizes(shape: tuple[int, ...]) -> dict[str, int]:
    model = Score()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def step(args: tuple[object, ...], kwargs: dict[str, object]):
        return capture_step(model, optimizer, args, kwargs)

    inputs = (torch.zeros(shape),)
    small = smaller_program(step(inputs, {}), Retrace(model, inputs, {}, step=step), Mesh.parse("d=2"))
    return {} if small is None else dict(small.sizes)


@pytest.mark.parametrize("shape", [(4, 64, 8), (64, 4, 8), (32, 64, 8), (12, 10, 8)])
def test_small_sizes_are_whole_pieces_and_pairwise_different(shape: tuple[int, ...]) -> None:
    sizes = small_sizes(shape)
    varied = list(sizes.values())
    assert len(set(varied)) == len(varied)
    assert all(size % 2 == 0 and size >= 4 for size in varied)
    assert any(size < before for size, before in zip(varied, shape, strict=False))


def test_a_whole_step_is_proven_at_small_sizes_where_the_large_ones_are_out_of_reach() -> None:
    model = Score(256)
    optimizer = torch.optim.AdamW(model.parameters())

    def step(args: tuple[object, ...], kwargs: dict[str, object]):
        return capture_step(model, optimizer, args, kwargs)

    inputs = (torch.empty(256, 256, 256),)
    options = Options(Mesh.parse("d=2"), tactics=[TensorParallel("d")], level="ring")
    compiled = compile_program(step(inputs, {}), options, retrace=Retrace(model, inputs, {}, step=step))
    assert compiled.records[-1].verdict.status is Status.EQUAL
