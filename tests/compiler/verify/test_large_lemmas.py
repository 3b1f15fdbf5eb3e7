"""Programs too large to be compared as a whole are still proven where a pass says whose value each of its results has."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hocket.compiler.capture import capture
from hocket.compiler.contract import Context, Contract, Equal
from hocket.compiler.cost.cluster import Cluster
from hocket.compiler.errors import VerificationError
from hocket.compiler.passmanager import run_passes
from hocket.compiler.program import Program, note
from hocket.compiler.rules.table import RuleTable
from hocket.compiler.verify import levels
from hocket.compiler.verify.report import Status
from hocket.passes.split_softmax import SplitSoftmax
from hocket.runtime.mesh import Mesh

aten = torch.ops.aten
CONTEXT = Context(Mesh.parse("d=1"), RuleTable(), Cluster.default())


class Head(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(4, 8192, bias=False)

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(self.head(x), target)


@dataclass(frozen=True)
class Careless(SplitSoftmax):
    """Forgets the maximum of one of the two places where it counts."""

    name: ClassVar[str] = "careless"
    contract: ClassVar[Contract] = Equal()

    def __call__(self, program: Program, context: Context) -> Program:
        new = super().__call__(program, context)
        (log,) = (node for node in new.nodes if node.target is aten.log.default)
        (entry,) = (user for user in log.users if note(user).carries)
        entry.args = (log, entry.args[0])
        return new


@pytest.fixture
def program(monkeypatch: pytest.MonkeyPatch) -> Program:
    """Larger than what a lemma, or a comparison of whole programs, may take at first."""
    monkeypatch.setattr(levels, "BUDGET", 10.0)
    return capture(Head(), (torch.randn(4, 4), torch.randint(8192, (4,))), {}, train=True)


def test_a_claim_is_proven_by_itself(program: Program) -> None:
    _, (record,) = run_passes(program, (SplitSoftmax(),), CONTEXT, level="ring")
    assert record.verdict.status is Status.EQUAL
    (ring,) = (level for level in record.verdict.levels if level.level == "ring")
    assert "by 2 lemmas and the others op for op" in ring.detail


def test_a_wrong_claim_is_not_accepted(program: Program) -> None:
    with pytest.raises(VerificationError, match="more than 10 multiply-adds"):
        run_passes(program, (Careless(),), CONTEXT, level="ring")


def test_large_lemmas_are_not_tried_where_programs_can_be_compared() -> None:
    small = capture(Head(), (torch.randn(4, 4), torch.randint(8192, (4,))), {}, train=True)
    with pytest.raises(VerificationError, match="does not compute the same function"):
        run_passes(small, (Careless(),), CONTEXT, level="ring")
