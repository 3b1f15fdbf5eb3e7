"""Every planted bug of a hand-lowered program is called by its name, with the line it stands on."""

import dataclasses
import operator
import re

import pytest
import torch
from tensor_parallel import Hand, aten, c10d

from hocket.compiler.layout import coordinate, local_offset, local_size
from hocket.compiler.verify.types import check_types

BUGS = {}


def bug(words: str, mesh: str = "tp=2"):
    def keep(build):
        BUGS[build.__name__] = (words, mesh, build)
        return build

    return keep


def layer(hand: Hand):
    """x @ w1 cut by column, @ w2 cut by row: the product is a partial sum."""
    x = hand.input("x", (6, 8), "R")
    w1 = hand.input("w1", (8, 24), "S(1)")
    w2 = hand.input("w2", (24, 8), "S(0)")
    hidden = hand.call(aten.mm.default, x, w1)
    return x, w1, w2, hidden, hand.call(aten.mm.default, hidden, w2)


@bug("declared R of .* but is P.sum. .*: a reduction over tp is missing")
def missing_forward_reduction(hand: Hand) -> None:
    *_, product = layer(hand)
    hand.output("out", product, "R", (6, 8))


@bug("leaves as P.sum. and is declared nowhere: a reduction is missing")
def missing_reduction_of_an_undeclared_result(hand: Hand) -> None:
    *_, product = layer(hand)
    hand.output("out", product)


@bug("a replicated value is added to a partial sum over tp: it will be counted 2 times")
def bias_before_the_reduction(hand: Hand) -> None:
    *_, product = layer(hand)
    bias = hand.input("bias", (8,), "R")
    hand.output("out", hand.reduce(hand.call(aten.add.Tensor, product, bias)), "R", (6, 8))


@bug("a replicated bias is added to a partial sum over tp: it will be counted 4 times", mesh="tp=4")
def bias_inside_the_product(hand: Hand) -> None:
    bias, hidden, w2 = hand.input("bias", (8,), "R"), hand.input("h", (6, 24), "S(1)"), hand.input("w2", (24, 8), "S(0)")
    hand.output("out", hand.reduce(hand.call(aten.addmm.default, bias, hidden, w2)), "R", (6, 8))


@bug("the constant 1.0 is added to a partial sum over tp: it will be counted 2 times")
def constant_before_the_reduction(hand: Hand) -> None:
    *_, product = layer(hand)
    hand.output("out", hand.reduce(hand.call(aten.add.Tensor, product, 1.0)), "R", (6, 8))


@bug("non-linear op gelu on a partial sum")
def activation_before_the_reduction(hand: Hand) -> None:
    *_, product = layer(hand)
    hand.output("out", hand.reduce(hand.call(aten.gelu.default, product)), "R", (6, 8))


@bug("mm contracts S.1. of .* with R of .*: the pieces belong to different positions")
def weight_not_cut(hand: Hand) -> None:
    _, _, _, hidden, _ = layer(hand)
    wrong = hand.input("w3", (12, 8), "R")
    hand.output("out", hand.reduce(hand.call(aten.mm.default, hidden, wrong)), "R", (6, 8))


@bug("already reduced over tp by all_reduce.*reduced twice, so 2 times too large")
def gradient_reduced_twice(hand: Hand) -> None:
    *_, product = layer(hand)
    hand.output("w", hand.reduce(hand.reduce(product)), "R", (6, 8), "gradient")


@bug("all_reduce of a value that is not partial over tp: it would be multiplied by 2")
def reduction_of_a_final_value(hand: Hand) -> None:
    x, *_ = layer(hand)
    hand.output("out", hand.reduce(x), "R", (6, 8))


@bug("all_reduce of a value that is cut over tp: it would mix pieces of different places")
def reduction_of_shards(hand: Hand) -> None:
    _, _, _, hidden, _ = layer(hand)
    hand.output("out", hand.reduce(hidden), "R", (6, 12))


@bug("all_reduce by max over tp of a value that is partial by sum")
def wrong_reduction(hand: Hand) -> None:
    *_, product = layer(hand)
    hand.output("out", hand.reduce(product, op="max"), "R", (6, 8))


@bug("the collective runs over 'dp', but the mesh tp=2 has no such axis")
def unknown_axis(hand: Hand) -> None:
    *_, product = layer(hand)
    hand.output("out", hand.reduce(product, axis="dp"), "R", (6, 8))


@bug("a reduction over tp is missing", mesh="dp=2,tp=2")
def reduction_over_the_wrong_axis(hand: Hand) -> None:
    hidden, weight = hand.input("h", (6, 24), "S(0),S(1)"), hand.input("w", (24, 8), "R,S(0)")
    hand.output("out", hand.call(aten.mm.default, hidden, weight), "S(0),R", (6, 8))


@bug("all_gather over tp of a value that is R: it would be repeated 2 times")
def gather_of_a_replica(hand: Hand) -> None:
    x, *_ = layer(hand)
    hand.output("out", hand.call(c10d.all_gather_into_tensor.default, x, 2, "tp"), "R", (12, 8))


@bug("_softmax over dimension 1, which is cut")
def softmax_over_the_cut(hand: Hand) -> None:
    _, _, _, hidden, _ = layer(hand)
    hand.output("out", hand.call(aten._softmax.default, hidden, 1, False), "S(1)", (6, 24))


@bug("native_layer_norm over dimension 1, which is cut")
def norm_over_the_cut(hand: Hand) -> None:
    _, _, _, hidden, _ = layer(hand)
    made = hand.call(aten.native_layer_norm.default, hidden, [12], None, None, 1e-5)
    hand.output("out", hand.call(operator.getitem, made, 0), "S(1)", (6, 24))


@bug("declared S.0. of .* but is S.1. of")
def wrong_declaration(hand: Hand) -> None:
    x = hand.input("x", (8, 8), "S(1)")
    hand.output("out", hand.call(aten.relu.default, x, origin="relu"), "S(0)", (16, 4))


@bug("the product of two partial values over tp is not the product of their totals")
def product_of_partial_sums(hand: Hand) -> None:
    *_, product = layer(hand)
    hand.output("out", hand.reduce(hand.call(aten.mul.Tensor, product, product)), "R", (6, 8))


@bug("operands do not line up globally: S.0. of .*; the pieces would be combined with the wrong partners")
def wrong_partners(hand: Hand) -> None:
    a, b = hand.input("a", (8, 4), "S(0)"), hand.input("b", (4, 8), "S(1)")
    turned = hand.call(aten.view.default, b, [4, 4])
    hand.output("out", hand.call(aten.add.Tensor, a, turned), "S(0)", (8, 4))


@bug("attention sees only a piece of the keys")
def keys_are_cut(hand: Hand) -> None:
    q, k, v = (hand.input(n, (2, 2, 8, 4), layout) for n, layout in (("q", "R"), ("k", "S(2)"), ("v", "S(2)")))
    made = hand.call(aten._scaled_dot_product_flash_attention_for_cpu.default, q, k, v)
    hand.output("out", hand.call(operator.getitem, made, 0), "R", (2, 2, 8, 4))


@bug("causal attention of queries that are cut")
def causal_mask_starts_at_zero_everywhere(hand: Hand) -> None:
    q, k, v = (hand.input(n, (2, 2, 8, 4), layout) for n, layout in (("q", "S(2)"), ("k", "R"), ("v", "R")))
    made = hand.call(aten._scaled_dot_product_flash_attention_for_cpu.default, q, k, v, 0.0, True)
    hand.output("out", hand.call(operator.getitem, made, 0), "S(2)", (2, 2, 8, 4))


@bug("the ranges that the ranks take of dimension 0 are not its chunks")
def wrong_offset(hand: Hand) -> None:
    x = hand.input("x", (7, 3), "R")
    where = hand.call(coordinate, "tp")
    offset = hand.call(local_offset, 6, 2, where)
    length = hand.call(local_size, 7, 2, where)
    hand.output("out", hand.call(aten.narrow.default, x, 0, offset, length), "S(0)", (7, 3))


@bug("a view uses the size of one rank")
def size_of_rank_0_everywhere(hand: Hand) -> None:
    x = hand.input("x", (5, 4), "S(0)")
    hand.output("out", hand.call(aten.view.default, x, [3, 2, 2]), "S(0)", (5, 2, 2))


@bug("all_gather of pieces of different lengths .* pad them first")
def gather_of_uneven_pieces(hand: Hand) -> None:
    x = hand.input("x", (5, 4), "S(0)")
    hand.output("out", hand.call(c10d.all_gather_into_tensor.default, x, 2, "tp"), "R", (6, 4))


@bug("mean over dimension 0, which is cut into pieces of different lengths")
def mean_of_means(hand: Hand) -> None:
    x = hand.input("x", (5, 4), "S(0)")
    hand.output("out", hand.reduce(hand.call(aten.mean.dim, x, [0]), op="avg"), "R", (4,))


@bug("embedding over dimension 0, which is cut")
def rows_of_the_table_are_cut(hand: Hand) -> None:
    table, ids = hand.input("table", (10, 4), "S(0)"), hand.input("ids", (3,), "R", dtype=torch.int64)
    hand.output("out", hand.call(aten.embedding.default, table, ids), "R", (3, 4))


@pytest.mark.parametrize("name", BUGS)
def test_a_planted_bug_is_called_by_its_name(name: str) -> None:
    words, mesh, build = BUGS[name]
    hand = Hand(mesh)
    build(hand)
    report = check_types(hand.program())
    assert report.status == "ill-typed", report.untyped
    first = report.problems[0]
    assert re.search(words, str(first)), str(first)
    assert "model.py:" in str(first)


def test_both_lines_are_named_where_an_operand_is_to_blame() -> None:
    hand = Hand("tp=2")
    bias_before_the_reduction(hand)
    (first,) = check_types(hand.program()).problems
    assert len(set(first.sources)) == 2


def test_an_op_without_a_rule_is_reported_and_never_taken_for_typed() -> None:
    hand = Hand("tp=2")
    x = hand.input("x", (8, 4), "S(0)")
    hand.output("out", hand.call(aten.cholesky_inverse.default, x))
    report = check_types(hand.program())
    assert report.status == "untypable"
    assert "no type rule" in report.untyped[0].message


def test_an_untypable_value_is_judged_further_from_its_declared_layout() -> None:
    hand = Hand("tp=2")
    x = hand.input("x", (8, 4), "S(0)")
    made = hand.call(aten.cholesky_inverse.default, x, layout="S(0)", shape=(8, 4))
    hand.output("out", hand.call(aten.sum.default, made), "R", ())
    report = check_types(hand.program())
    assert len(report.untyped) == 1
    assert "a reduction over tp is missing" in report.problems[0].message


def test_a_logical_program_has_nothing_to_type() -> None:
    hand = Hand(None)
    hand.output("out", hand.input("x", (2,), "R"))
    with pytest.raises(ValueError, match="lowered to a mesh"):
        check_types(hand.program())


def test_findings_are_data() -> None:
    hand = Hand("tp=2")
    missing_forward_reduction(hand)
    assert set(dataclasses.asdict(check_types(hand.program()).problems[0])) == {"node", "op", "message", "sources"}
