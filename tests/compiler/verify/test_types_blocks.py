"""Types of ops that move whole blocks: what is right passes, and the usual mistake is called by its name."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable

import pytest
import torch
import torch.fx as fx
from tensor_parallel import Hand, aten

from hocket.compiler.verify.types import TypeReport, check_types, erase


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


BATCHED = (4, 6, 5, 5)


def _bags(hand: Hand, layout: str, *, bags: str = "R") -> tuple[fx.Node, str, tuple[int, ...]]:
    rows, starts = hand.input("rows", (6,), bags, dtype=torch.int64), hand.input("starts", (2,), "R", dtype=torch.int64)
    made = hand.call(aten._embedding_bag.default, hand.input("w", (8, 4), layout), rows, starts)
    return hand.call(operator.getitem, made, 0), layout, (2, 4)


def _bags_backward(hand: Hand, layout: str) -> tuple[fx.Node, str, tuple[int, ...]]:
    rows, bag_of = (hand.input(name, (6,), "R", dtype=torch.int64) for name in ("rows", "bag_of"))
    starts, sizes = (hand.input(name, (2,), "R", dtype=torch.int64) for name in ("starts", "sizes"))
    most = hand.input("most", (0,), "R", dtype=torch.int64)
    gradient = hand.input("g", (2, 4), layout)
    made = hand.call(aten._embedding_bag_backward.default, gradient, rows, starts, bag_of, sizes, most, 8, False, 0, False, None)
    return made, layout, (8, 4)


def _joined(hand: Hand, source: str, *, into: str = "S(0)") -> tuple[fx.Node, str, tuple[int, ...]]:
    x, s = hand.input("x", (4, 3), into), hand.input("s", (4, 6), source)
    places = hand.input("places", (4, 6), source, dtype=torch.int64)
    return hand.call(aten.scatter_reduce.two, x, 1, places, s, "amax"), "S(0)", (4, 3)


def _trilinear(hand: Hand, *, reduce: bool) -> tuple[fx.Node, str, tuple[int, ...]]:
    """sum_ij x[b, i] w[o, i, j] y[b, j], with i cut."""
    x, y, w = hand.input("x", (2, 4), "S(1)"), hand.input("y", (2, 6), "R"), hand.input("w", (5, 4, 6), "S(1)")
    made = hand.call(aten._trilinear.default, x, w, y, [1, 3], [0], [1, 2], [2, 3])
    return (hand.reduce(made) if reduce else made), "R", (2, 5)


RIGHT: dict[str, Callable[[Hand], tuple[fx.Node, str, tuple[int, ...]]]] = {
    "nearest neighbours of cut pictures": lambda h: (
        h.call(aten.upsample_nearest2d.default, h.input("x", BATCHED, "S(0)"), [10, 10]),
        "S(0)",
        (4, 6, 10, 10),
    ),
    "interpolation of cut channels": lambda h: (
        h.call(aten.upsample_bilinear2d.default, h.input("x", BATCHED, "S(1)"), [10, 10], False),
        "S(1)",
        (4, 6, 10, 10),
    ),
    "borders of partial maxima": lambda h: (
        h.reduce(h.call(aten.reflection_pad1d.default, h.input("x", (6, 5), "P(max)"), [1, 1]), op="max"),
        "R",
        (6, 7),
    ),
    "interpolation of a partial sum": lambda h: (
        h.reduce(h.call(aten.upsample_linear1d.default, h.input("x", (4, 6, 5), "P(sum)"), [10], False)),
        "R",
        (4, 6, 10),
    ),
    "gradient of nearest neighbours": lambda h: (
        h.call(aten.upsample_nearest2d_backward.default, h.input("g", BATCHED, "S(0)"), [5, 5], [2, 6, 3, 3]),
        "S(0)",
        (4, 6, 3, 3),
    ),
    "reflected borders": lambda h: (
        h.call(aten.reflection_pad2d.default, h.input("x", BATCHED, "S(1)"), [1, 1, 2, 2]),
        "S(1)",
        (4, 6, 9, 7),
    ),
    "bags of cut columns": lambda h: _bags(h, "S(1)"),
    "gradient of bags of cut columns": lambda h: _bags_backward(h, "S(1)"),
    "sources joined by index in cut rows": lambda h: _joined(h, "S(0)"),
    "a trilinear form reduced": lambda h: _trilinear(h, reduce=True),
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
    "a trilinear form not reduced": (lambda h: _trilinear(h, reduce=False), "a reduction over tp is missing"),
    "bags over a piece of the rows": (
        lambda h: (_bags(h, "S(0)")[0], "R", (2, 4)),
        "_embedding_bag over dimension 0, which is cut",
    ),
    "sources joined by index into other rows": (
        lambda h: (_joined(h, "S(0)", into="R")[0], "R", (4, 3)),
        "scatter_reduce joins S.0. into R",
    ),
    "the average of partial maxima": (
        lambda h: (h.call(aten.avg_pool2d.default, h.input("x", BATCHED, "P(max)"), [5, 5]), "P(max)", (4, 6, 1, 1)),
        "avg_pool2d of a partial max",
    ),
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


UNTYPED: dict[str, tuple[Callable[[Hand], tuple[fx.Node, str, tuple[int, ...]]], str]] = {
    "bags that are cut": (lambda h: _bags(h, "R", bags="S(0)"), "a bag may begin on one rank and end on the next"),
    "interpolation of a cut height": (
        lambda h: (h.call(aten.upsample_nearest2d.default, h.input("x", (4, 6, 4, 4), "S(2)"), [4, 8]), "S(2)", (4, 6, 8, 8)),
        "upsample_nearest2d along a dimension that is cut needs its neighbours' borders",
    ),
    "a window that keeps the height of a picture without a batch": (
        lambda h: (h.call(aten.avg_pool2d.default, h.input("x", (6, 4, 4), "S(1)"), [3, 3], [1, 1], [1, 1]), "S(1)", (6, 4, 4)),
        "avg_pool2d along a dimension that is cut needs its neighbours' borders",
    ),
}


@pytest.mark.parametrize("name", UNTYPED)
def test_what_only_an_execution_can_judge_is_said_to_be_so(name: str) -> None:
    build, words = UNTYPED[name]
    report = _report(build)
    assert report.status == "untypable", report.problems
    assert words in str(report.untyped[0])


@pytest.mark.parametrize("name", RIGHT)
def test_a_right_program_erases_to_one_of_whole_values(name: str) -> None:
    hand = Hand("tp=2")
    node, layout, shape = RIGHT[name](hand)
    hand.output("out", node, layout, shape)
    erased = erase(hand.program())
    assert [tuple(result.meta["val"].shape) for result in erased.results] == [shape]
