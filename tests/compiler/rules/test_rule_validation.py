"""The judge: right rules pass, wrong ones do not, whoever states them."""

import pytest
import torch
from rule_helpers import aten, op_node, pieces_make_the_whole, rule_texts

from hocket.compiler.layout import Partial, Replicate, Shard
from hocket.compiler.rules.pieces import cut_value, represents
from hocket.compiler.rules.rule import Rule
from hocket.compiler.rules.shrink import Trial, shrink
from hocket.compiler.rules.signature import signature_of
from hocket.compiler.rules.table import RuleTable
from hocket.compiler.rules.torch_rules import torch_rules
from hocket.compiler.rules.validate import failure

R, P = Replicate(), Partial()


def verdict(node, inputs, outputs, parts=2) -> str:
    trial = shrink(signature_of(node), parts)
    assert isinstance(trial, Trial), trial
    return failure(trial, Rule(tuple(inputs), tuple(outputs), "test"))


def cuts(rules) -> set[str]:
    return {text for text in rule_texts(rules) if "P" not in text}


def test_torchs_wrong_cumsum_rule_for_a_negative_dimension_is_rejected():
    node = op_node(aten.cumsum.default, torch.randn(4, 8), -1)
    told = rule_texts(torch_rules(signature_of(node), 2))
    assert "S(1) -> S(1)" in told, "torch has repaired its table; find another wrong rule for this test"
    answer = RuleTable(None).answer(node, 2)
    assert "S(1) -> S(1)" not in rule_texts(answer.rules)
    assert "S(0) -> S(0)" in rule_texts(answer.rules)
    assert any(str(rule).startswith("S(1) -> S(1) [torch") for rule, _ in answer.rejected)


def test_cumsum_along_a_positive_dimension_keeps_its_right_rules():
    rules = rule_texts(RuleTable(None).rules(op_node(aten.cumsum.default, torch.randn(4, 8), 1), 2))
    assert rules == {"R -> R", "S(0) -> S(0)", "P(sum) -> P(sum)", "P(avg) -> P(avg)"}


x, w, b = torch.randn(8, 6), torch.randn(6, 4), torch.randn(4)
WRONG = {
    "bias added once a rank": (op_node(aten.addmm.default, b, x, w), [R, Shard(1), Shard(0)], [P]),
    "relu of a partial sum": (op_node(aten.relu.default, x), [P], [P]),
    "constant added to a partial sum": (op_node(aten.add.Tensor, x, 1.0), [P], [P]),
    "softmax along the cut": (op_node(aten._softmax.default, x, 1, False), [Shard(1)], [Shard(1)]),
    "product of partial sums": (op_node(aten.mul.Tensor, x, x), [P, P], [P]),
    "transposed without moving the cut": (op_node(aten.t.default, torch.randn(8, 8)), [Shard(0)], [Shard(0)]),
    "contraction not summed": (op_node(aten.mm.default, x, w), [Shard(1), Shard(0)], [R]),
    "mean of a sum": (op_node(aten.mean.dim, x, [0]), [Shard(0)], [P]),
    "index into half a table": (op_node(aten.embedding.default, x, torch.tensor([0, 7, 3])), [Shard(0), R], [P]),
    "flip along the cut": (op_node(aten.flip.default, x, [0]), [Shard(0)], [Shard(0)]),
    "variance of pieces": (op_node(aten.var.correction, x, [0]), [Shard(0)], [Partial("avg")]),
    "half a reshape": (op_node(aten.view.default, x, [6, 8]), [Shard(0)], [Shard(1)]),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_rule_is_rejected(name):
    assert verdict(*WRONG[name])


RIGHT = {
    "bias joins the sum": (op_node(aten.addmm.default, b, x, w), [P, Shard(1), Shard(0)], [P]),
    "batch of a matrix product": (op_node(aten.mm.default, x, w), [Shard(0), R], [Shard(0)]),
    "reshape of the leading dimension": (op_node(aten.view.default, x, [8, 2, 3]), [Shard(0)], [Shard(0)]),
    "maximum of maxima": (op_node(aten.amax.default, x, [0]), [Shard(0)], [Partial("max")]),
}


@pytest.mark.parametrize("name", RIGHT)
def test_right_rule_is_accepted(name):
    assert verdict(*RIGHT[name]) == ""


def test_mean_over_uneven_chunks_is_no_average_of_means():
    even = op_node(aten.mean.dim, torch.randn(8, 4), [0])
    uneven = op_node(aten.mean.dim, torch.randn(7, 4), [0])
    table = RuleTable(None)
    assert "S(0) -> P(avg)" in rule_texts(table.rules(even, 2))
    assert "S(0) -> P(avg)" not in rule_texts(table.rules(uneven, 2))
    assert "S(0) -> P(sum)" in rule_texts(table.rules(op_node(aten.sum.dim_IntList, torch.randn(7, 4), [0]), 2))


def test_uneven_rules_leave_no_rank_without_a_piece():
    table = RuleTable(None)
    node = op_node(aten.relu.default, torch.randn(5, 7))
    assert cuts(table.rules(node, 4)) == {"R -> R", "S(1) -> S(1)"}  # 5 over 4 is 2, 2, 1, 0
    assert cuts(table.rules(node, 3)) == {"R -> R", "S(0) -> S(0)", "S(1) -> S(1)"}


@pytest.mark.parametrize(
    ("shape", "size", "parts", "expected"),
    [
        ((8, 6), [8, 2, 3], 2, {"R -> R", "S(0) -> S(0)", "S(1) -> S(1)"}),
        ((8, 6), [8, 3, 2], 2, {"R -> R", "S(0) -> S(0)"}),  # 3 heads cannot be cut in two
        ((7, 6), [7, 2, 3], 2, {"R -> R", "S(0) -> S(0)", "S(1) -> S(1)"}),  # an untouched dimension may be uneven
        ((3, 4, 5), [12, 5], 2, {"R -> R", "S(2) -> S(1)"}),  # a merged one may not
        ((4, 4, 5), [16, 5], 2, {"R -> R", "S(0) -> S(0)", "S(2) -> S(1)"}),
        ((6, 4), [4, 6], 2, {"R -> R", "S(0) -> S(0)"}),
        ((1, 8), [8, 1], 2, {"R -> R", "S(1) -> S(0)"}),
    ],
)
def test_reshape_rules_are_exactly_the_cuts_that_stay_cuts(shape, size, parts, expected):
    rules = RuleTable(None).rules(op_node(aten.view.default, torch.randn(shape), size), parts)
    assert cuts(rules) == expected


def test_mean_loss_over_the_batch_has_no_rule_but_its_backward_has():
    logp, target = torch.randn(8, 5).log_softmax(-1), torch.randint(0, 5, (8,))
    table = RuleTable(None)
    mean = op_node(aten.nll_loss_forward.default, logp, target, None, 1, -100)
    total = op_node(aten.nll_loss_forward.default, logp, target, None, 2, -100)
    assert rule_texts(table.rules(mean, 2)) == {"R, R -> R, R"}
    assert "nll_loss_forward" in table.explain(mean)
    assert "S(0), S(0) -> P(sum), P(sum)" in rule_texts(table.rules(total, 2))
    back = op_node(aten.nll_loss_backward.default, torch.tensor(1.0), logp, target, None, 1, -100, torch.tensor(8.0))
    assert "R, S(0), S(0), R -> S(0)" in rule_texts(table.rules(back, 2))


@pytest.mark.parametrize("placement", [R, Shard(0), Shard(1), P, Partial("avg"), Partial("max"), Partial("min")])
@pytest.mark.parametrize("parts", [2, 3])
def test_cutting_and_representing_are_inverse(placement, parts):
    value = torch.randn(5, 6, dtype=torch.float64)
    pieces = cut_value(value, placement, parts, torch.Generator().manual_seed(0))
    assert len(pieces) == parts
    assert represents(pieces, placement, value)
    assert not represents(pieces, placement, value + 1e-3)


def test_large_ops_are_judged_at_small_sizes():
    big = torch.empty(4096, 11008, device="meta")
    node = op_node(aten.mm.default, torch.empty(8192, 4096, device="meta"), big)
    trial = shrink(signature_of(node), 8)
    assert isinstance(trial, Trial)
    assert sum(spec.numel for spec in trial.signature.tensors) < 1000
    assert "S(1), S(0) -> P(sum)" in rule_texts(RuleTable(None).rules(node, 8))


def test_shrinking_keeps_broadcasts_equalities_and_divisibility():
    node = op_node(aten.add.Tensor, torch.randn(48, 1, 30), torch.randn(48, 31, 30))
    trial = shrink(signature_of(node), 4)
    assert isinstance(trial, Trial)
    (a, one, c), (a2, d, c2) = (spec.shape for spec in trial.signature.tensors)
    assert (a, c, one) == (a2, c2, 1)
    assert len({a, c, d, 1}) == 4
    assert a % trial.parts == 0
    assert c % trial.parts != 0
    assert d % trial.parts != 0


@pytest.mark.parametrize("causal", [False, True])
def test_attention_is_cut_by_queries_only_without_a_causal_mask(causal):
    q = torch.randn(2, 4, 6, 8)
    node = op_node(aten._scaled_dot_product_flash_attention_for_cpu.default, q, q, q, 0.0, causal)
    rules = RuleTable(None).rules(node, 2)
    assert {"S(0), S(0), S(0) -> S(0), S(0)", "S(1), S(1), S(1) -> S(1), S(1)"} <= rule_texts(rules)
    assert ("S(2), R, R -> S(2), S(2)" in rule_texts(rules)) is not causal
    assert not any("S(3)" in text for text in rule_texts(rules))


def test_cuda_attention_is_judged_by_its_cpu_twin():
    """Sizes only on this machine: the kernel itself cannot run here."""
    q = torch.empty(2, 4, 6, 8)
    fake = op_node(aten._scaled_dot_product_flash_attention_for_cpu.default, q, q, q)
    node = fake.graph.call_function(aten._scaled_dot_product_efficient_attention.default, (*fake.args[:3], None, True))
    seed = torch.zeros((), dtype=torch.int64)
    node.meta["val"] = (q, torch.empty(2, 4, 6), seed, seed)
    rules = RuleTable(None).rules(node, 2)
    assert {"S(0), S(0), S(0) -> S(0), S(0), R, R", "S(1), S(1), S(1) -> S(1), S(1), R, R"} <= rule_texts(rules)


def test_convolution_is_cut_over_batch_and_channels():
    image, weight, bias = torch.randn(4, 6, 9, 9), torch.randn(8, 6, 3, 3), torch.randn(8)
    conv = op_node(aten.convolution.default, image, weight, bias, [1, 1], [1, 1], [1, 1], False, [0, 0], 1)
    rules = RuleTable(None).rules(conv, 2)
    assert {"S(0), R, R -> S(0)", "R, S(0), S(0) -> S(1)", "S(1), S(1), P(sum) -> P(sum)"} <= rule_texts(rules)
    out = conv.meta["val"]
    back = op_node(
        aten.convolution_backward.default, out, image, weight, [8], [1, 1], [1, 1], [1, 1], False, [0, 0], 1, [True, True, True]
    )
    rules = RuleTable(None).rules(back, 2)
    assert {"S(0), S(0), R -> S(0), P(sum), P(sum)", "S(1), R, S(0) -> P(sum), S(0), S(0)"} <= rule_texts(rules)
    doubled = op_node(back.target, *[a.meta["val"].double() if hasattr(a, "meta") else a for a in back.args])
    assert all(pieces_make_the_whole(doubled, rule, 2) for rule in rules)


def test_batch_norm_in_training_is_never_cut_over_the_batch():
    image, c = torch.randn(4, 6, 5, 5), torch.ones(6)
    node = op_node(aten._native_batch_norm_legit_functional.default, image, c, c, c, c, True, 0.1, 1e-5)
    texts = rule_texts(RuleTable(None).rules(node, 2))
    assert "S(1), S(0), S(0), S(0), S(0) -> S(1), S(0), S(0), S(0), S(0)" in texts
    assert not any(text.startswith(("S(0)", "S(2)", "S(3)")) for text in texts)
