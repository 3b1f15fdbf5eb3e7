"""Passes of a user's own, given among the tactics, run where they say and are proven like ours."""

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from torch import nn

import hocket
from hocket.compiler.contract import Context, Contract, Equal
from hocket.compiler.program import Decision, Program, copy_program
from hocket.errors import InputError, VerificationError

ADD, MUL = torch.ops.aten.add.Tensor, torch.ops.aten.mul.Tensor


@dataclass(frozen=True)
class SwapAddends:
    """a + b -> b + a, and, where ``broken``, a * b instead."""

    broken: bool = False
    name: ClassVar[str] = "swap_addends"
    contract: ClassVar[Contract] = Equal()

    def __call__(self, program: Program, _context: Context) -> Program:
        after, _ = copy_program(program)
        swapped = []
        for node in after.nodes:
            if node.target is ADD and len(node.args) == 2:
                node.args = node.args[::-1]
                node.target = MUL if self.broken else ADD
                swapped.append(Decision(self.name, node.name, applied=True, reason="addition commutes"))
        return after.decided(*swapped)


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(6, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.inner(x).tanh()
        return y + y.exp()


@pytest.mark.parametrize("where", ["before", "after"])
def test_own_passes_run_and_are_proven(where: str) -> None:
    model, x = Twice(), torch.randn(8, 6)
    own = hocket.Rewrites(**{where: (SwapAddends(),)})
    with hocket.parallelize(model, "d=2", (x,), tactics=[hocket.DataParallel("d"), own], engine="sim") as parallel:
        torch.testing.assert_close(parallel(x), model(x))
        text = str(parallel.explain())
    assert "swap_addends" in text


@pytest.mark.parametrize("where", ["before", "after"])
def test_own_passes_that_change_the_meaning_are_refused(where: str) -> None:
    own = hocket.Rewrites(**{where: (SwapAddends(broken=True),)})
    with pytest.raises(VerificationError, match="swap_addends"):
        hocket.parallelize(Twice(), "d=2", (torch.randn(8, 6),), tactics=[own], engine="sim")


def test_something_else_among_the_tactics_is_refused_at_the_door() -> None:
    with pytest.raises(InputError, match="is no tactic"):
        hocket.parallelize(Twice(), "d=2", (torch.randn(8, 6),), tactics=[SwapAddends()], engine="sim")  # type: ignore[list-item]
