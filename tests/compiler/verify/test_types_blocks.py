"""Types of ops that move whole blocks: what is right passes, and the usual mistake is called by its name."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable

import pytest
import torch
import torch.fx as fx
from tensor_parallel import Hand, aten

from hocket.compiler.verify.types import TypeReport, check_types


def _report(build: Callable[[Hand], tuple[fx.Node, str, tuple[int, ...]]]) -> TypeReport:
    hand = Hand("tp=2")
    node, layout, shape = build(hand)
    hand.output("out", node, layout, shape)
    return check_types(hand.program())


def _index_add(hand: Hand, *, reduce: bool) -> tuple[fx.Node, str, tuple[int, ...]]:
    indices, rows = hand.input("indices", (6,), "S(0)", dtype=torch.int64), hand.input("rows", (6, 3), "S(0)")
    zeros = hand.call(aten.zeros.default, [4, 3])
    added = hand.call(aten.index_add.default, zeros, 0, indices, rows)
    return (hand.reduce(added) if reduce else added), "R", (4, 3)


def _attention_with_shared_heads(hand: Hand, *, keys: str) -> tuple[fx.Node, str, tuple[int, ...]]:
    q, k, v = (hand.input(n, (2, h, 6, 3), s) for n, h, s in (("q", 8, "S(1)"), ("k", 4, keys), ("v", 4, keys)))
    made = hand.call(aten._scaled_dot_product_flash_attention_for_cpu.default, q, k, v)
    return hand.call(operator.getitem, made, 0), "S(1)", (2, 8, 6, 3)


RIGHT: dict[str, Callable[[Hand], tuple[fx.Node, str, tuple[int, ...]]]] = {
    "rows added by index and reduced": lambda h: _index_add(h, reduce=True),
    "gates of halves": lambda h: (h.call(aten.glu.default, h.input("x", (4, 6), "S(0)"), 1), "S(0)", (4, 3)),
    "pixels of cut pictures": lambda h: (
        h.call(aten.pixel_shuffle.default, h.input("x", (4, 8, 3, 3), "S(0)"), 2),
        "S(0)",
        (4, 2, 6, 6),
    ),
    "whole blocks of channels": lambda h: (
        h.call(aten.pixel_shuffle.default, h.input("x", (4, 8, 3, 3), "S(1)"), 2),
        "S(1)",
        (4, 2, 6, 6),
    ),
    "pixels back": lambda h: (h.call(aten.pixel_unshuffle.default, h.input("x", (4, 2, 6, 6), "S(0)"), 2), "S(0)", (4, 8, 3, 3)),
    "query heads that share a key head on one rank": lambda h: _attention_with_shared_heads(h, keys="S(1)"),
    "a batch that becomes channels": lambda h: (
        h.call(aten.view.default, h.input("x", (2, 8, 3), "S(0)"), [1, 8, 3], layout="S(1)", shape=(1, 16, 3)),
        "S(1)",
        (1, 16, 3),
    ),
}
WRONG: dict[str, tuple[Callable[[Hand], tuple[fx.Node, str, tuple[int, ...]]], str]] = {
    "rows added by index, not reduced": (lambda h: _index_add(h, reduce=False), "a reduction over tp is missing"),
    "gates of a cut dimension": (
        lambda h: (h.call(aten.glu.default, h.input("x", (4, 8), "S(1)"), 1), "S(1)", (4, 4)),
        "glu over dimension 1, which is cut",
    ),
    "all key heads for some query heads": (
        lambda h: _attention_with_shared_heads(h, keys="R"),
        "attention pairs queries S.1. with keys R",
    ),
}


@pytest.mark.parametrize("name", RIGHT)
def test_a_right_program_is_typed(name: str) -> None:
    report = _report(RIGHT[name])
    assert report.status == "typed", (report.problems, report.untyped)


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_program_is_ill_typed_by_name(name: str) -> None:
    build, words = WRONG[name]
    report = _report(build)
    assert report.status == "ill-typed", report.untyped
    assert re.search(words, str(report.problems[0])), str(report.problems[0])
