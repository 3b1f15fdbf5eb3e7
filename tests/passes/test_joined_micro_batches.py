"""Weight gradients of several micro-batches by one product: only where asked for, within the bound stated, its bytes counted."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from split_support import context
from torch import Tensor, nn

import hocket
from hocket.compiler.doors.module import session_of
from hocket.compiler.passmanager import run_passes
from hocket.errors import InputError
from hocket.passes.joined_micro_batches import NAME, SMALL, accumulation, joining
from hocket.runtime.schedule.stage import Part, Port, StageCode, StageState
from hocket.runtime.schedule.verify import peak_memory

aten = torch.ops.aten


def mlp(width: int, depth: int, *, bias: bool) -> nn.Sequential:
    return nn.Sequential(*(nn.Sequential(nn.Linear(width, width, bias=bias), nn.LayerNorm(width), nn.Tanh()) for _ in range(depth)))


def trained(
    model: nn.Module, x: Tensor, *, joined: int, engine: str = "sim", **options: object
) -> tuple[nn.Module, list[str], float]:
    """A copy with the gradients of a step, what was decided of its products, and the most bytes that a rank is said to hold."""
    twin = copy.deepcopy(model)
    tactic = hocket.PipelineParallel(loss=lambda out: out.square().mean(), joined=joined, **options)  # type: ignore[arg-type]
    with hocket.parallelize(twin, "pp=2", tactics=[tactic], engine=engine, verify="ring") as stages:
        stages.train_step(x)
        compiled = session_of(stages).compiled
    said = [decision.reason for decision in compiled.joined.decisions if decision.by == NAME]
    return twin, said, max(peak_memory(compiled.costs.applied(compiled.schedule)))


def test_an_accumulation_becomes_one_product_over_all_rows_and_is_proven() -> None:
    """Golden: n products and n - 1 sums before, two joins and a product after."""
    program = accumulation("w", SMALL, 3)
    joined, (record,) = run_passes(program, (joining(),), context(), level="full")
    before, after = ([node.target for node in one.nodes if node.op == "call_function"] for one in (program, joined))
    assert before == [aten.mm.default] * 2 + [aten.add.Tensor, aten.mm.default, aten.add.Tensor]
    assert after == [aten.cat.default, aten.cat.default, aten.mm.default]
    assert str(record.verdict.status) == "equal"


def test_a_join_that_pairs_the_factors_wrongly_is_refused() -> None:
    """The proof is one: the factors of the second micro-batch the other way round are not the same sum."""
    program = accumulation("w", SMALL, 2)

    class Swapped:
        name, contract = "swapped", joining().contract

        def __call__(self, one: object, where: object) -> object:
            made = joining()(one, where)  # type: ignore[arg-type]
            cat = next(node for node in made.nodes if node.target is aten.cat.default)
            cat.args = (list(reversed(cat.args[0])), *cat.args[1:])
            return made

    with pytest.raises(hocket.errors.VerificationError):
        run_passes(program, (Swapped(),), context(), level="ring")  # type: ignore[arg-type]


def test_nothing_is_joined_unless_asked_for() -> None:
    torch.manual_seed(0)
    model, x = mlp(6, 2, bias=True), torch.randn(8, 6)
    plain, said, bytes_ = trained(model, x, joined=1, microbatches=4)
    assert not said
    for rows in x.chunk(4):
        (model(rows).square().mean() / 4).backward()
    for one, other in zip(plain.parameters(), model.parameters(), strict=True):
        assert torch.equal(one.grad, other.grad)
    _, said, more = trained(model, x, joined=4, microbatches=4)
    assert sum(reason.endswith("are kept until 4 are there") for reason in said) == 2
    assert sum(reason.endswith("added up micro-batch by micro-batch") for reason in said) == 2, "a shift is no product"
    assert more > bytes_, "factors are kept for longer, and that is counted"
    with pytest.raises(InputError, match="joined is the number of micro-batches"):
        hocket.PipelineParallel(joined=0)


@settings(max_examples=20, deadline=None)
@given(
    rows=st.lists(st.integers(1, 6), min_size=1, max_size=7),
    joined=st.integers(1, 5),
    width=st.integers(1, 6),
    seed=st.integers(0, 99),
)
def test_a_stage_adds_up_groups_within_the_bound(rows: list[int], joined: int, width: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    pairs = [(torch.randn(width, k, generator=generator), torch.randn(k, width + 1, generator=generator)) for k in rows]
    part = Part(lambda given: given, (), (Port("left", "w"), Port("right", "w")))
    state = StageState(StageCode(0, part), {}, joined=joined)
    state.begin([{}] * len(rows))
    for m, pair in enumerate(pairs):
        state.take(part, m, pair)
        assert len(state.factors.get("w", ())) == (0 if m + 1 == len(rows) else (m + 1) % joined)
    one, truth = state.gradients["w"], sum(left.double() @ right.double() for left, right in pairs)
    terms, roundoff = sum(left.abs().double() @ right.abs().double() for left, right in pairs), torch.finfo(torch.float32).eps / 2
    columns = sum(rows) + len(rows)
    assert ((one - truth).abs() <= columns * roundoff / (1 - columns * roundoff) * terms).all()


@pytest.mark.slow
@settings(max_examples=8, deadline=None)
@given(
    width=st.integers(3, 9),
    rows=st.lists(st.integers(2, 4), min_size=2, max_size=5),
    joined=st.integers(2, 5),
    schedule=st.sampled_from(["1f1b", "1f1b-2bp", "gpipe-2bp", "zb-h1"]),
    bias=st.booleans(),
)
def test_gradients_of_random_pipelines_differ_by_rounding_only(
    width: int, rows: list[int], joined: int, schedule: str, bias: bool
) -> None:
    torch.manual_seed(sum(rows) + width)
    model, x = mlp(width, 2, bias=bias).double(), torch.randn(sum(rows), width, dtype=torch.float64)
    ours, said, _ = trained(model, x, joined=joined, microbatches=rows, schedule=schedule)
    apart, _, _ = trained(model, x, joined=1, microbatches=rows, schedule=schedule)
    assert any(reason.startswith("reordered_sum") for reason in said)
    for one, other in zip(ours.parameters(), apart.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("engine", ["sim", pytest.param("local", marks=pytest.mark.slow)])
def test_uneven_groups_and_both_engines_agree(engine: str) -> None:
    torch.manual_seed(3)
    model, x = mlp(5, 2, bias=False), torch.randn(10, 5)
    ours, _, _ = trained(model, x, joined=2, engine=engine, microbatches=[3, 3, 4])
    model(x).square().mean().backward()
    for one, other in zip(ours.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad)


@pytest.mark.slow
def test_replicas_join_their_products_too() -> None:
    torch.manual_seed(4)
    model, x = mlp(6, 2, bias=False), torch.randn(8, 6)
    twin = copy.deepcopy(model)
    tactic = hocket.PipelineParallel(loss=lambda out: out.square().mean(), joined=2, microbatches=4)
    with hocket.parallelize(twin, "pp=2,dp=2", tactics=[tactic], engine="sim") as stages:
        stages.train_step(x)
    model(x).square().mean().backward()
    for one, other in zip(twin.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad)
