"""Gathering factors against adding up products: each way round is proven, priced, and turned down for a reason."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import hocket
from hocket.compiler.contract import Context
from hocket.compiler.cost.cluster import Cluster
from hocket.compiler.doors.hall import Compiled, Options, compile_program
from hocket.compiler.errors import VerificationError
from hocket.compiler.layout import Replicate
from hocket.compiler.passmanager import run_passes
from hocket.compiler.program import Decision, Program, copy_program
from hocket.compiler.rules.table import RuleTable
from hocket.compiler.verify.report import Status
from hocket.passes.swaps import partial_product
from hocket.passes.swaps.gathered_factors import Held
from hocket.passes.swaps.swap import SwapProducts
from hocket.passes.swaps.trade import Site
from hocket.runtime.mesh import Mesh
from hocket.runtime.transports.transport import LinkCost

RULES, c10d = RuleTable(None), torch.ops._c10d_functional
SENT = {"all_gather_into_tensor", "all_reduce", "reduce_scatter_tensor", "all_to_all_single"}
COLUMNS = {"a.weight": "tp:S(0)", "a.bias": "tp:S(0)", "b.weight": "tp:R", "b.bias": "tp:R"}


class Pair(nn.Module):
    """Two layers; the first makes columns that the second contracts."""

    def __init__(self, width: int = 16, inner: int = 64, out: int = 24, *, bias: bool = True) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(width, inner, bias=bias), nn.Linear(inner, out, bias=bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(torch.relu(self.a(x)))


class Product(nn.Module):
    """One weight, no bias."""

    def __init__(self, width: int = 16, out: int = 24) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(width, out))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.w


def compiled(
    model: nn.Module,
    x: torch.Tensor,
    *passes: SwapProducts,
    tactic: object = None,
    constraints: Mapping[str, str] | None = None,
    parts: int = 2,
    cluster: Cluster | None = None,
) -> Compiled:
    """A model lowered to ranks, with passes behind ``Shard``. A pass remembers what it chose, so every program gets its own."""
    tactics = [*([] if tactic is None else [tactic]), hocket.Rewrites(after=passes)]
    options = Options(
        Mesh((("tp", parts),)), tactics=tactics, constraints=constraints, rules=RULES, cluster=cluster or Cluster.default()
    )
    return compile_program(hocket.capture(model, (x,)), options)


def sent(program: Program) -> list[str]:
    """The collectives of a program, in order."""
    names = [node.target._schema.name.split("::")[1] for node in program.nodes if hasattr(node.target, "_schema")]
    return [name for name in names if name in SENT]


def decisions(made: Compiled) -> list[Decision]:
    return [d for d in made.lowered.decisions if d.by == "swap-products"]


def always() -> SwapProducts:
    """Swap whatever can be swapped."""
    return SwapProducts(least_gain=-1e9)


def frozen(model: nn.Module) -> nn.Module:
    return model.requires_grad_(requires_grad=False)


def is_proven(made: Compiled) -> bool:
    return all(record.verdict.status is Status.EQUAL for record in made.records)


# --- the gather becomes a sum


def test_a_gather_of_what_a_product_contracts_becomes_a_sum_of_partial_products() -> None:
    model, x = frozen(Pair()), torch.randn(8, 16)
    before, after = (compiled(model, x, *swaps, constraints=COLUMNS) for swaps in ((), (always(),)))
    assert sent(before.lowered) == ["all_gather_into_tensor"]
    assert sent(after.lowered) == ["all_reduce"]
    assert is_proven(after)
    (decision,) = decisions(after)
    assert decision.applied
    assert "1024 -> 768 bytes" in decision.reason  # (p-1) M K/p and 2 (p-1)/p M N, of 4 bytes
    assert "reordered_sum" in decision.reason
    ops = [str(node.target) for node in after.lowered.nodes if node.op == "call_function"]
    assert ops.index("aten.narrow.default") < ops.index("aten.mm.default") < ops.index("_c10d_functional.all_reduce.default")
    assert "aten.add.Tensor" in ops[ops.index("_c10d_functional.wait_tensor.default") :]  # the bias, once


def test_the_product_of_a_rank_is_that_of_its_own_rows_only() -> None:
    after = compiled(frozen(Pair()), torch.randn(8, 16), always(), constraints=COLUMNS).lowered
    (product,) = [n for n in after.nodes if n.target is torch.ops.aten.mm.default]
    assert [list(n.meta["val"].shape) for n in product.all_input_nodes] == [[8, 32], [32, 24]]


def test_a_gathered_weight_that_is_contracted_is_not_gathered_at_all() -> None:
    """x is whole on every rank, the weight is cut along the dimension that is summed: swapped to a sum, and back to the gather."""
    made = compiled(frozen(Product()), torch.randn(4, 16), constraints={"w": "tp:S(0)", "args[0]": "tp:R"})
    assert sent(made.lowered) == ["all_gather_into_tensor"]
    context = Context(Mesh((("tp", 2),)), RULES, Cluster.default())
    added, records = run_passes(made.lowered, (always(),), context)
    assert sent(added) == ["all_reduce"]
    gathered, more = run_passes(added, (always(),), context)
    assert sent(gathered) == ["all_gather_into_tensor"]  # of the weight; x is whole already
    assert all(record.verdict.status is Status.EQUAL for record in (*records, *more))


def test_products_of_one_gather_are_swapped_together_or_not_at_all() -> None:
    class Heads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(16, 32)
            self.q, self.k, self.v = (nn.Linear(32, 8) for _ in range(3))

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
            y = torch.tanh(self.a(x))
            return self.q(y), self.k(y), self.v(y) * 2

    names = [f"{head}.{kind}" for head in "qkv" for kind in ("weight", "bias")]
    where = {"a.weight": "tp:S(0)", "a.bias": "tp:S(0)", **dict.fromkeys(names, "tp:R")}
    made = compiled(frozen(Heads()), torch.randn(2, 4, 16), always(), constraints=where)
    assert sent(made.lowered) == ["all_reduce"] * 3
    assert is_proven(made)
    assert decisions(made)[0].reason.startswith("3 products of what each rank has of")


def test_an_intermediate_that_somebody_else_needs_whole_keeps_its_gather() -> None:
    made = compiled(Pair(), torch.randn(8, 16), always(), constraints=COLUMNS)  # the backward of relu reads it
    assert sent(made.lowered) == ["all_gather_into_tensor"]
    (decision,) = decisions(made)
    assert not decision.applied
    assert decision.reason == "what it gathers is needed whole by threshold_backward"


def test_factors_that_differ_from_rank_to_rank_keep_their_gather() -> None:
    columns = {**COLUMNS, "b.weight": "tp:S(0)", "b.bias": "tp:S(0)"}
    made = compiled(frozen(Pair()), torch.randn(8, 16), always(), constraints=columns)
    kept = [d for d in decisions(made) if not d.applied and "differs from rank to rank" in d.reason]
    assert kept
    assert not any(d.applied for d in decisions(made))


def test_the_proof_refuses_a_sum_over_ranks_that_multiply_by_different_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the test before it keeps from happening."""
    monkeypatch.setattr(partial_product, "placement_of", lambda *_: Replicate())
    columns = {**COLUMNS, "b.weight": "tp:S(0)", "b.bias": "tp:S(0)"}
    with pytest.raises((VerificationError, hocket.errors.HocketError)):
        compiled(frozen(Pair()), torch.randn(8, 16), always(), constraints=columns)


# --- the sum becomes gathers


def test_the_gradients_of_few_rows_travel_as_their_factors() -> None:
    model, x = Pair(bias=False), torch.randn(8, 16)
    before, after = (compiled(model, x, *swaps, tactic=hocket.DataParallel("tp")) for swaps in ((), (always(),)))
    assert sent(before.lowered) == ["all_reduce"] * 2
    assert set(sent(after.lowered)) == {"all_gather_into_tensor"}
    assert is_proven(after)
    assert all("reordered_sum" in d.reason for d in decisions(after) if d.applied)


def test_a_factor_that_is_whole_already_is_not_sent() -> None:
    """The gradient of the outputs is given whole to every rank, which takes its rows of it: only the other factors travel."""
    after = compiled(Pair(), torch.randn(8, 16), always(), tactic=hocket.DataParallel("tp"))
    bytes_of = {d.node: int(d.reason.split(" -> ")[2].split(" bytes")[0]) for d in decisions(after) if d.applied}
    assert sorted(bytes_of.values()) == [4 * 4 * 64, 4 * 4 * 64 + 4 * 4 * 16]  # relu; its gradient and x


def test_a_gather_serves_a_product_only_if_it_comes_before_it() -> None:
    """A product that stands earlier, but whose sum comes later, gathers for itself."""
    made = compiled(Pair(bias=False), torch.randn(8, 16), tactic=hocket.DataParallel("tp"))
    program, _ = copy_program(made.lowered)
    held = Held(program)
    source = next(n for n in program.nodes if n.name == "relu")
    late = program.nodes[-2]
    site = Site("tp", 0, 2, Cluster.default(), {})
    held.gathered[source, 0] = late
    assert held.whole(source, site, program.nodes[-1]) is late
    assert held.whole(source, site, source.next) is None


def test_scattered_gradients_make_their_own_rows_only() -> None:
    model, x = Pair(64, 64, 64, bias=False), torch.randn(8, 64)
    before, after = (compiled(model, x, *swaps, tactic=hocket.Zero("tp")) for swaps in ((), (always(),)))
    assert "reduce_scatter_tensor" in sent(before.lowered)
    assert "reduce_scatter_tensor" not in sent(after.lowered)
    assert is_proven(after)


@pytest.mark.parametrize(("rows", "swapped"), [(16, True), (4096, False)])
def test_bytes_decide(rows: int, swapped: bool) -> None:
    """Over a slow link: 16 rows of a 512 x 512 gradient are less than the gradient, 4096 are more."""
    link = Cluster.default().over(LinkCost(2e-5, 1e-8))
    made = compiled(Product(512, 512), torch.randn(rows, 512), SwapProducts(), tactic=hocket.DataParallel("tp"), cluster=link)
    (decision,) = [d for d in decisions(made) if "factors" in d.reason]
    assert decision.applied is swapped
    assert decision.gain is not None
    assert (decision.gain > 0) is swapped
    assert decision.reason.startswith("not worth") is not swapped


def test_a_sum_that_is_read_before_it_is_added_up_is_kept() -> None:
    made = compiled(Pair(bias=False), torch.randn(8, 16), tactic=hocket.DataParallel("tp"))
    program, _ = copy_program(made.lowered)
    product = next(n for n in program.nodes if n.target is c10d.all_reduce.default).all_input_nodes[0]
    while product.target is not torch.ops.aten.mm.default:
        product = product.all_input_nodes[0]
    with program.graph.graph.inserting_after(product):
        other = program.graph.graph.call_function(torch.ops.aten.neg.default, (product,))
    other.meta.update(product.meta)
    after = always()(program, Context(Mesh((("tp", 2),)), RULES, Cluster.default()))
    kept = [d.reason for d in after.decisions if d.by == "swap-products" and not d.applied]
    assert kept == [f"{product.name} is also read before it is added up"]


def test_sums_of_other_kinds_are_kept_for_a_reason() -> None:
    """The gradient of a bias is no product; the mean of a loss is none either."""
    made = compiled(Pair(), torch.randn(8, 16), always(), tactic=hocket.DataParallel("tp"))
    assert "what it adds up is no product" in [d.reason for d in decisions(made) if not d.applied]


# --- through the doors


@pytest.mark.parametrize("tactic", [hocket.DataParallel, hocket.Zero])
def test_a_swapped_step_equals_eager(tactic: Callable[[str], object]) -> None:
    torch.manual_seed(0)
    model, x = Pair(), torch.randn(8, 16)
    plain = model(x)
    plain.square().sum().backward()
    wanted = [p.grad.clone() for p in model.parameters()]  # type: ignore[union-attr]
    model.zero_grad()
    tactics = [tactic("tp"), hocket.Rewrites(after=(always(),))]
    with hocket.parallelize(model, "tp=2", (x,), tactics=tactics, engine="sim") as parallel:
        out = parallel(x)
        out.square().sum().backward()
        torch.testing.assert_close(out, plain)
        for mine, theirs in zip((p.grad for p in parallel.parameters()), wanted, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)
        assert "the factors of" in " ".join(str(parallel.explain()).split())


def test_overlap_tiles_swaps_unless_told_not_to() -> None:
    names = lambda tactic: [one.name for one in tactic.rewrites_after()]  # noqa: E731
    assert names(hocket.OverlapTiles()) == ["swap-products", "tiles", "overlap-order"]
    assert names(hocket.OverlapTiles(swaps=False)) == ["tiles", "overlap-order"]


@given(
    sizes=st.tuples(st.integers(1, 6), st.integers(1, 6), st.integers(1, 9)),
    parts=st.sampled_from([2, 3, 4]),
    whole=st.booleans(),
)
@settings(max_examples=12, deadline=None)
def test_there_and_back_is_proven_at_any_size(sizes: tuple[int, int, int], parts: int, whole: bool) -> None:
    """Columns gathered, or gradients added up: swapped and proven, swapped back and proven, with the bytes of the formulas."""
    rows, inner, out = sizes[0] * parts, sizes[1] * parts, sizes[2] * parts
    if whole:
        made = compiled(frozen(Pair(2, inner, out)), torch.randn(rows, 2), always(), constraints=COLUMNS, parts=parts)
    else:
        made = compiled(
            Pair(2, inner, out, bias=False), torch.randn(rows, 2), always(), tactic=hocket.DataParallel("tp"), parts=parts
        )
    assert is_proven(made)
    applied = [d for d in decisions(made) if d.applied]
    assert applied
    if whole:
        before, after = applied[0].reason.split("us, ")[1].split(" bytes")[0].split(" -> ")
        assert int(before) == (parts - 1) * rows * inner // parts * 4
        assert int(after) == round(2 * (parts - 1) / parts * rows * out * 4)
    context = Context(Mesh((("tp", parts),)), RULES, Cluster.default())
    program, records = run_passes(made.lowered, (always(),), context)
    assert all(record.verdict.status is Status.EQUAL for record in records)
    assert sent(program) != sent(made.lowered)
