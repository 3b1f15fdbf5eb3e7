"""Ranks with programs of their own must agree on every collective of every group, in an order that cannot deadlock."""

import pytest
from tensor_parallel import Hand, aten, mlp

from hocket.compiler.errors import CollectiveMismatch, InputError
from hocket.compiler.program import Program
from hocket.compiler.verify.types import check_types, match_programs


def two_sums(order: tuple[str, str], mesh: str = "a=2,b=2", op: str = "sum") -> Program:
    hand = Hand(mesh)
    x = hand.input("x", (4, 4), "P(sum),P(sum)")
    for axis in order:
        x = hand.reduce(x, axis, op)
    hand.output("out", hand.call(aten.relu.default, x), "R,R", (4, 4))
    return hand.program()


def test_one_program_for_all_ranks_agrees_with_itself() -> None:
    match_programs(mlp("tp=4"))
    match_programs([two_sums(("a", "b"))] * 4)


def test_groups_entered_in_different_orders_deadlock() -> None:
    programs = [two_sums(("a", "b")), two_sums(("b", "a")), two_sums(("b", "a")), two_sums(("a", "b"))]
    assert all(check_types(program).status == "typed" for program in programs)
    with pytest.raises(CollectiveMismatch, match="wait for each other for ever"):
        match_programs(programs)


def test_ranks_must_ask_for_the_same_reduction() -> None:
    programs = [two_sums(("a", "b"))] * 3 + [two_sums(("a", "b"), op="max")]
    with pytest.raises(CollectiveMismatch, match=r"model\.py"):
        match_programs(programs)


def test_logical_programs_have_no_ranks() -> None:
    with pytest.raises(InputError, match="lowered to a mesh"):
        match_programs(mlp(None))
