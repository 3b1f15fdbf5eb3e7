"""The op table against torch itself: every entry is justified, and the page of the documentation says how."""

from __future__ import annotations

import pytest
import torch
from conformance import PAGE, Evidence, compare_formula, entries, gather_evidence, page, unjustified
from formulas import FORMULAS, REASONS, Formula

from hocket.compiler.verify.ring.algebra import Algebra
from hocket.compiler.verify.ring.arithmetic import ring_of
from hocket.compiler.verify.ring.evaluate import apply
from hocket.compiler.verify.ring.value import RingTensor

aten = torch.ops.aten


def test_every_entry_agrees_with_torch_or_has_a_reason() -> None:
    evidence = gather_evidence()
    assert evidence.failures == []
    assert unjustified(evidence) == []
    assert set(REASONS) <= set(entries()), "a reason for an op that the table does not have"
    needless = sorted(op for op in REASONS if op in evidence.by and "samples" in evidence.by[op])
    assert needless == [], "these have samples that agree, and need no reason"
    assert PAGE.read_text() == page(evidence), f"run {__file__.replace('test_ring_', '')}"


@pytest.mark.parametrize("name", ["1 / (1 + exp(-x))", "layer norm", "clamp(x, -1, 1)"])
def test_a_formula_that_is_off_by_a_thousandth_does_not_agree(name: str) -> None:
    right = FORMULAS[name]
    wrong = Formula(right.op, lambda *xs: right.formula(*xs) * 1.001, right.shapes, right.signed, right.train)
    evidence = Evidence()
    compare_formula(name, wrong, evidence)
    assert evidence.failures == [f"{name} in float64"]
    assert not evidence.by


def test_a_strided_view_reads_every_digit_of_an_element_from_its_own_place() -> None:
    algebra = Algebra(ring_of(1559))
    x = RingTensor(algebra.ring.random([4], torch.Generator().manual_seed(0)))
    found = apply(algebra, aten.as_strided.default, (x, [2, 2], [1, 2], 0), {})
    assert torch.equal(found.data, x.data[:, [0, 2, 1, 3]].reshape(4, 2, 2))


def test_several_results_with_names_are_a_tuple_over_the_ring() -> None:
    algebra = Algebra(ring_of(1559))
    x = RingTensor(algebra.ring.random([3, 4], torch.Generator().manual_seed(0)))
    low, high = apply(algebra, aten.aminmax.default, (x,), {"dim": 1})
    assert tuple(low.shape) == tuple(high.shape) == (3,)
