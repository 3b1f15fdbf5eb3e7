"""Look-ups in pieces of a table: equal to the look-up in the whole, proven, and left alone where they do not pay or cannot be."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from split_support import held_by, random_inputs, run
from torch import Tensor, nn

from hocket.compiler.capture import capture
from hocket.compiler.contract import Context
from hocket.compiler.cost.cluster import Cluster
from hocket.compiler.errors import InputError
from hocket.compiler.passmanager import run_passes
from hocket.compiler.program import Program, RoleKind, note
from hocket.compiler.rules.table import RuleTable
from hocket.compiler.verify.report import Status
from hocket.passes.split_embedding import SplitEmbedding
from hocket.runtime.mesh import Mesh

aten = torch.ops.aten


class Tied(nn.Module):
    """A head that shares the table of its embedding."""

    def __init__(self, rows: int, width: int, *, tied: bool = True, **options: object) -> None:
        super().__init__()
        self.table = nn.Embedding(rows, width, **options)
        self.head = self.table if tied else nn.Embedding(rows, width)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.table(tokens) @ self.head.weight.t()


def context(parts: int) -> Context:
    return Context(Mesh.parse(f"d={parts}"), RuleTable(), Cluster.default())


def captured(model: nn.Module, tokens: Tensor) -> Program:
    return capture(model, (tokens,), {}, train=True)


def same(program: Program, after: Program, model: nn.Module, tokens: Tensor) -> None:
    given_ = held_by(program, model) | random_inputs(program, 1)
    (role,) = (role for role in program.signature.inputs if role.kind is RoleKind.INPUT)
    given_[role] = tokens
    before = run(program, given_)
    for output, value in run(after, given_).items():
        torch.testing.assert_close(value, before[output])


def test_golden_each_piece_is_looked_up_and_the_pieces_are_added() -> None:
    program = captured(Tied(6, 3), torch.randint(6, (2, 4)))
    after = SplitEmbedding("d")(program, context(2))
    names = [str(node.target).removeprefix("aten.") for node in after.nodes if note(node).added_by == "split-embedding"]
    places = ["reshape.default", "arange.start_step", "view.default", "sub.Tensor", "clamp.default", "eq.Tensor"]
    assert names == [
        *places,
        *("unsqueeze.default", "expand.default", "view.default", "gather.default", "unsqueeze.default", "scalar_tensor.default"),
        *("where.self", "sum.dim_IntList", "view.default"),
        *places,
        *("reshape.default", "unsqueeze.default", "scalar_tensor.default", "where.self", "unsqueeze.default", "expand.default"),
        *("zeros.default", "scatter_add.default", "view.default"),
    ]
    assert not {aten.embedding.default, aten.embedding_dense_backward.default} & {node.target for node in after.nodes}


@pytest.mark.parametrize("padding", [None, 0, 5])
def test_it_is_proven_with_and_without_a_padding_row(padding: int | None) -> None:
    torch.manual_seed(0)
    model, tokens = Tied(6, 3, padding_idx=padding), torch.tensor([[0, 5, 2, 2], [1, 3, 4, 5]])
    program = captured(model, tokens)
    after, (record,) = run_passes(program, (SplitEmbedding("d"),), context(3))
    assert record.applied == 1
    assert record.verdict.status is Status.EQUAL
    same(program, after, model, tokens)


@settings(max_examples=20, deadline=None)
@given(
    parts=st.integers(1, 4),
    rows=st.integers(1, 3),
    width=st.integers(1, 4),
    shape=st.sampled_from([(), (1,), (7,), (2, 3)]),
    padded=st.booleans(),
    seed=st.integers(0, 99),
)
def test_any_table_gives_the_same_rows_and_gradients(parts, rows, width, shape, padded, seed) -> None:
    torch.manual_seed(seed)
    total = parts * rows
    model, tokens = Tied(total, width, padding_idx=seed % total if padded else None), torch.randint(total, shape)
    program = captured(model, tokens)
    after = SplitEmbedding("d")(program, context(parts))
    assert [decision.applied for decision in after.decisions if decision.by == "split-embedding"] == [True]
    same(program, after, model, tokens)


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (Tied(6, 3, tied=False), "nothing else reads its table"),
        (Tied(7, 3), "7 rows are not divisible by 2 ranks"),
        (Tied(6, 3, scale_grad_by_freq=True), "scale_grad_by_freq"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_other_tables_are_left_alone_and_said_so(model: nn.Module, words: str) -> None:
    program = captured(model, torch.randint(6, (2, 4)))
    kept = SplitEmbedding("d")(program, context(2))
    assert [node.target for node in kept.nodes] == [node.target for node in program.nodes]
    said = [decision for decision in kept.decisions if decision.by == "split-embedding"]
    assert said
    assert all(not decision.applied for decision in said)
    assert any(words in decision.reason for decision in said)


def test_an_axis_that_does_not_exist_is_named() -> None:
    with pytest.raises(InputError, match="tp"):
        SplitEmbedding("tp")(captured(Tied(6, 3), torch.randint(6, (2, 4))), context(2))
