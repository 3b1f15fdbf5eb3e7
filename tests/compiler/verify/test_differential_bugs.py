"""The float64 comparison accepts right programs and names the first node of wrong ones; the float32 error growth is judged."""

import json

import pytest
import torch
from tensor_parallel import Hand, aten, mlp

from hocket.compiler.layout import Partial, Replicate, Shard, coordinate, cut, local_offset, local_size
from hocket.compiler.program import Program, Role, RoleKind
from hocket.compiler.verify.differential import compare_programs, float_level, output_error, relation
from hocket.compiler.verify.report import Growth, LevelResult, Outcome, Status, combine
from hocket.compiler.verify.samples import sample_inputs
from hocket.runtime.mesh import Mesh


def layer(mesh: str | None, *, scale_on_last_rank: float = 0.0, reduce: bool = True, shift: int = 0) -> Program:
    """relu((x @ w1) @ w2) + b over the rank's own rows of the hidden layer, with faults on request."""
    hand = Hand(mesh)
    x, b = hand.input("x", (6, 8), "R"), hand.input("b.bias", (4,), "R", "param")
    w1, w2 = hand.input("w1", (8, 10), "S(1)", "param"), hand.input("w2", (10, 4), "R", "param")
    hidden = hand.call(aten.mm.default, x, w1, name="hidden", layout="S(1)", shape=(6, 10), origin="hidden")
    if mesh is not None:
        where = hand.call(coordinate, "tp")
        if scale_on_last_rank:
            ones = hand.call(aten.full.default, [], scale_on_last_rank)
            hidden = hand.call(
                aten.add.Tensor, hidden, hand.call(aten.mul.Tensor, hidden, hand.call(aten.mul.Tensor, ones, where)),
                layout="S(1)", shape=(6, 10), origin="hidden",
            )  # fmt: skip
        offset, length = hand.call(local_offset, 10 - shift, 2, where), hand.call(local_size, 10, 2, where)
        w2 = hand.call(aten.narrow.default, w2, 0, offset, length)
    product = hand.call(aten.mm.default, hidden, w2, name="product", layout="P(sum)", shape=(6, 4), origin="product")
    if reduce:
        product = hand.reduce(product)
    y = hand.call(aten.relu.default, product, name="y", layout="R", shape=(6, 4), origin="y")
    hand.output("out", hand.call(aten.add.Tensor, y, b, origin="out"), "R", (6, 4))
    return hand.program()


def test_a_right_program_agrees_and_its_error_does_not_grow() -> None:
    found = compare_programs(layer(None), layer("tp=2"))
    assert found.differences == ()
    assert found.divergence == ""
    assert max(growth.factor for growth in found.growth) < Growth.WARN


def test_one_percent_on_one_rank_is_found_and_named() -> None:
    found = compare_programs(layer(None), layer("tp=2", scale_on_last_rank=0.01))
    assert [d.role for d in found.differences] == [Role(RoleKind.OUTPUT, "out")]
    assert 1e-4 < found.differences[0].error < 1e-1
    assert "add_tensor" in found.divergence
    assert "no shards, replicas or partial sums" in found.divergence
    assert "model.py" in found.divergence


def test_a_wrong_offset_is_found_at_the_product_that_uses_it() -> None:
    found = compare_programs(layer(None), layer("tp=2", shift=2))
    assert found.differences
    assert found.divergence.startswith("product = aten.mm")


def test_a_missing_reduction_is_found_at_the_op_behind_it() -> None:
    found = compare_programs(layer(None), layer("tp=2", reduce=False))
    assert found.differences
    assert "y = aten.relu" in found.divergence


def test_a_right_value_that_is_declared_wrongly_is_told_which_layout_it_has() -> None:
    def square(mesh: str | None) -> Program:
        hand = Hand(mesh)
        x = hand.input("x", (4, 8), "S(1)")
        y = hand.call(aten.relu.default, x, name="y", layout="S(0)", shape=(4, 8), origin="y")
        hand.output("out", y, "S(0)", (4, 8))
        return hand.program()

    found = compare_programs(square(None), square("tp=2"))
    assert found.differences[0].reason == "has shape [8, 4], expected [4, 8]"
    assert "declared S(0), but its pieces are S(1) of it" in found.divergence


@pytest.mark.parametrize(
    "layout", [(Replicate(),), (Shard(0),), (Shard(1),), (Partial("sum"),), (Shard(0), Shard(1)), (Shard(1), Partial("sum"))]
)
def test_the_relation_of_pieces_to_a_value_is_inferred(layout) -> None:
    mesh = Mesh.parse("a=2" if len(layout) == 1 else "a=2,b=2")
    value = torch.randn(4, 6, dtype=torch.float64)
    assert relation(cut(value, layout, mesh), value, mesh) == layout


def test_values_that_are_not_finite_are_equal_only_to_themselves() -> None:
    inf, nan = float("inf"), float("nan")
    value = torch.tensor([1.0, inf, nan])
    assert output_error(value, value.clone())[0] == 0
    assert output_error(value, torch.tensor([1.0, -inf, nan]))[0] == inf
    assert output_error(torch.tensor([1.0, 2.0]), torch.tensor([1.0, nan]))[0] == inf


def test_an_output_that_is_not_finite_is_reported_as_such() -> None:
    def logarithm(mesh: str | None) -> Program:
        hand = Hand(mesh)
        hand.output("out", hand.call(aten.log.default, hand.input("x", (8, 8), "S(0)")), "S(0)", (8, 8))
        return hand.program()

    found = float_level(logarithm(None), logarithm("tp=2"))
    assert found.outcome is Outcome.PROVED
    assert "not finite" in found.warnings[0]


def test_an_accurate_variance_may_not_become_an_inaccurate_one() -> None:
    def variance(*, naive: bool) -> Program:
        hand = Hand(None)
        x = hand.call(aten.add.Tensor, hand.input("x", (8, 64), "R"), 300.0)
        if naive:  # E[x^2] - E[x]^2 cancels
            squares = hand.call(aten.mean.dim, hand.call(aten.mul.Tensor, x, x), [1])
            mean = hand.call(aten.mean.dim, x, [1])
            result = hand.call(aten.sub.Tensor, squares, hand.call(aten.mul.Tensor, mean, mean))
        else:
            centred = hand.call(aten.sub.Tensor, x, hand.call(aten.mean.dim, x, [1], True))
            result = hand.call(aten.mean.dim, hand.call(aten.mul.Tensor, centred, centred), [1])
        hand.output("out", result)
        return hand.program()

    found = float_level(variance(naive=False), variance(naive=True))
    assert found.outcome is Outcome.FAILED
    assert "float32 error" in found.detail
    assert float_level(variance(naive=True), variance(naive=True)).outcome is Outcome.PROVED


def test_a_missing_output_is_a_difference() -> None:
    hand = Hand(None)
    x = hand.input("x", (2,), "R")
    hand.output("a", x)
    hand.output("b", x)
    less = Hand(None)
    less.output("a", less.input("x", (2,), "R"))
    assert [str(d) for d in compare_programs(hand.program(), less.program()).differences] == ["output:b is missing"]


def test_sample_inputs_have_biases_and_valid_indices() -> None:
    hand = Hand(None)
    table, ids = hand.input("table", (5, 3), "R", "param"), hand.input("ids", (40,), "R", dtype=torch.int64)
    hand.input("layer.bias", (7,), "R", "param")
    hand.input("running_var", (7,), "R", "buffer")
    hand.output("out", hand.call(aten.embedding.default, table, ids))
    values = {role.name: value for role, value in sample_inputs(hand.program()).items()}
    assert values["layer.bias"].abs().max() > 0.01
    assert values["running_var"].min() > 0
    assert int(values["ids"].min()) >= 0
    assert int(values["ids"].max()) == 4


def test_a_program_that_fails_on_a_rank_is_different() -> None:
    wrong = mlp("tp=2")
    mm = next(node for node in wrong.nodes if node.target is aten.t.default)
    mm.target = aten.relu.default
    found = compare_programs(mlp(None), wrong)
    assert found.differences[0].reason.startswith("could not be computed")


def test_a_verdict_is_equal_only_if_some_level_showed_it() -> None:
    passed = LevelResult("types", Outcome.PASSED, "fine")
    proved = LevelResult("float", Outcome.PROVED, "agrees", bound="sampled")
    failed = LevelResult("float", Outcome.FAILED, "differs", divergence="node x")
    skipped = LevelResult("ring", Outcome.SKIPPED, "too expensive")
    unsupported = LevelResult("ring", Outcome.UNSUPPORTED, "no meaning for op")
    assert combine([passed, skipped]).status is Status.NOT_CHECKED
    assert combine([]).status is Status.NOT_CHECKED
    assert combine([passed, unsupported]).status is Status.UNSUPPORTED
    assert combine([passed, proved]).status is Status.EQUAL
    assert combine([passed, proved]).bound == "sampled"
    assert combine([proved, failed]).status is Status.DIFFERENT
    assert combine([proved, failed]).bound == ""
    assert combine([LevelResult("types", Outcome.FAILED, "bad", failure=Status.ILL_TYPED)]).refused


def test_a_verdict_speaks_json_and_text() -> None:
    from rich.console import Console

    verdict = combine([LevelResult("float", Outcome.FAILED, "w differs", 0.5, divergence="node x", warnings=("odd",))])
    assert json.loads(verdict.to_json())["levels"][0]["detail"] == "w differs"
    console = Console(record=True, width=120)
    console.print(verdict)
    assert "verification: different" in console.export_text()
    assert "first divergence: node x" in str(verdict)
