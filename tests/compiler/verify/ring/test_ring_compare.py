"""The verdict on lowered programs: right ones are equal, planted bugs differ and are found where they were planted."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from ring_lowered import BUGS, logical, tensor_parallel
from torch import nn

from hocket.compiler.capture import capture
from hocket.compiler.program import Program, RoleKind, copy_program
from hocket.compiler.verify.ring.compare import compare
from hocket.compiler.verify.ring.inputs import index_ranges
from hocket.compiler.verify.ring.localise import localise
from hocket.compiler.verify.ring.verdict import Status

aten = torch.ops.aten


@pytest.mark.parametrize("ranks", [2, 4])
def test_a_right_lowering_is_equal(ranks: int) -> None:
    program = logical()
    verdict = compare(program, tensor_parallel(program, ranks))
    assert verdict.status is Status.EQUAL, str(verdict)
    assert verdict.bound is not None
    assert not verdict.bound.rigorous
    assert verdict.bound.probability < 1e-12
    assert localise(program, tensor_parallel(program, ranks)) is None


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("bug", BUGS)
def test_a_planted_bug_differs(bug: str, ranks: int) -> None:
    program = logical()
    verdict = compare(program, tensor_parallel(program, ranks, bug))
    assert verdict.status is Status.DIFFERENT
    kinds = {difference.role.kind for difference in verdict.differences}
    assert kinds == ({RoleKind.GRADIENT} if "backward" in bug else {RoleKind.OUTPUT})


@pytest.mark.parametrize(("bug", "culprit"), [("averaged", "addmm_1"), ("bias on every rank", "addmm_1")])
def test_the_first_diverging_node_is_named_with_its_original(bug: str, culprit: str) -> None:
    program = logical()
    found = localise(program, tensor_parallel(program, 2, bug))
    assert found is not None
    assert found.original == culprit
    assert "stands for" in str(found)


def test_replicas_that_disagree_are_reported_with_their_ranks() -> None:
    program = logical()
    verdict = compare(program, tensor_parallel(program, 2, "no forward all-reduce"))
    assert verdict.differences[0].ranks == (0, 1)


def edited(program: Program, op: object, **change: object) -> Program:
    copy, _ = copy_program(program)
    node = next(node for node in copy.nodes if node.target is op)
    for name, value in change.items():
        setattr(node, name, value)
    return copy


class Polynomial(nn.Module):
    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return x * y + x * x


def test_a_rational_program_has_a_rigorous_bound_with_its_degree() -> None:
    program = capture(Polynomial(), (torch.randn(3), torch.randn(3)), train=False)
    verdict = compare(program, program)
    assert verdict.bound is not None
    assert verdict.bound.rigorous
    assert verdict.bound.degree == 2
    assert compare(program, edited(program, aten.add.Tensor, target=aten.sub.Tensor)).status is Status.DIFFERENT


def test_an_op_without_a_meaning_is_unsupported_and_named_with_its_line() -> None:
    class Model(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.special.bessel_j0(x)

    program = capture(Model(), (torch.randn(3),), train=False)
    verdict = compare(program, program)
    assert verdict.status is Status.UNSUPPORTED
    assert "special_bessel_j0" in verdict.reason
    assert "test_ring_compare.py" in verdict.reason


def test_a_program_that_always_divides_by_zero_proves_nothing() -> None:
    class Model(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x / (x - x)

    program = capture(Model(), (torch.randn(3),), train=False)
    assert compare(program, program).status is Status.POISON


def test_missing_outputs_and_foreign_inputs_are_never_equal() -> None:
    joint = capture(nn.Linear(3, 3), (torch.randn(2, 3),))
    forward = capture(nn.Linear(3, 3), (torch.randn(2, 3),), train=False)
    assert compare(joint, forward).status is Status.DIFFERENT
    assert compare(forward, joint).status is Status.DIFFERENT


def test_order_ops_on_computed_values_get_more_draws() -> None:
    class Model(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return F.relu(x)

    program = capture(Model(), (torch.randn(3),), train=False)
    verdict = compare(program, program)
    assert verdict.draws > 4
    assert "order" in verdict.sensitivity


def test_integer_inputs_are_drawn_in_the_range_of_their_use() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.head = nn.Embedding(11, 4), nn.Linear(4, 7)

        def forward(self, ids: torch.Tensor, labels: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
            return F.cross_entropy(self.head(self.table(ids + 1)) * mask[..., None], labels)

    args = (torch.zeros(5, dtype=torch.long), torch.zeros(5, dtype=torch.long), torch.ones(5, dtype=torch.long))
    program = capture(Model(), args)
    found = {node.name: limit for node, limit in index_ranges(program).items()}
    assert found["input_args_0"].limit == 10
    assert (found["input_args_1"].limit, found["input_args_1"].ignored) == (7, -100)
    assert "input_args_2" not in found
    assert compare(program, program).equal


def test_dropout_by_counters_is_exact_and_depends_on_the_seed() -> None:
    program = capture(nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5)), (torch.randn(8, 4),))
    assert compare(program, program).equal
    length = next(node for node in program.nodes if node.target is aten.arange.default).args[0]
    shifted = edited(program, aten.arange.default, target=aten.arange.start, args=(1, length + 1))
    assert compare(program, shifted).status is Status.DIFFERENT


def test_a_program_that_cannot_be_executed_is_not_equal() -> None:
    program = logical()
    lowered = tensor_parallel(program, 2)
    view = next(node for node in lowered.nodes if node.target is aten.view.default)
    view.args = (view.args[0], [5])
    verdict = compare(program, lowered)
    assert verdict.status is Status.DIFFERENT
    assert "cannot be executed" in verdict.reason
