"""Right programs are typed without a complaint, whatever their sizes, and erasing them gives the program they came from."""

import time

import pytest
import torch
from tensor_parallel import Hand, aten, attention, c10d, mlp

from hocket.compiler.errors import UnsupportedError
from hocket.compiler.layout import coordinate, local_size, padding
from hocket.compiler.program import Program, check_program
from hocket.compiler.verify.differential import compare_programs
from hocket.compiler.verify.types import check_types, erase

MESHES = ["tp=1", "tp=2", "tp=4", "dp=2,tp=2"]


@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("build", [mlp, attention])
def test_tensor_parallel_programs_are_typed_and_erase_to_the_original(build, mesh: str) -> None:
    lowered, original = build(mesh), build(None)
    report = check_types(lowered)
    assert report.status == "typed", report.problems or report.untyped
    erased = erase(lowered, report)
    check_program(erased)
    assert erased.mesh is None
    assert not any("c10d" in str(node.target) for node in erased.nodes)
    assert compare_programs(original, erased, growth=False).differences == ()
    assert compare_programs(original, lowered, growth=False).differences == ()


def uneven_gather(mesh: str | None) -> Program:
    """S(1) of 7 columns -> R: pad to the longest piece, gather, put in order, trim; then the rows are summed."""
    hand = Hand(mesh)
    x = hand.input("x", (3, 7), "S(1)")
    if mesh is not None:
        length = hand.call(local_size, 7, 2, hand.call(coordinate, "tp"))
        x = hand.call(aten.constant_pad_nd.default, x, [0, hand.call(padding, length, 4)])
        gathered = hand.call(c10d.wait_tensor.default, hand.call(c10d.all_gather_into_tensor.default, x, 2, "tp"))
        apart = hand.call(aten.view.default, gathered, [2, 3, 4])
        x = hand.call(aten.reshape.default, hand.call(aten.permute.default, apart, [1, 0, 2]), [3, 8])
        x = hand.call(aten.slice.Tensor, x, 1, 0, 7)
    hand.output("out", hand.call(aten.cumsum.default, x, 1), "R", (3, 7))
    return hand.program()


def test_a_gather_of_uneven_columns_is_typed_step_by_step() -> None:
    report = check_types(uneven_gather("tp=2"))
    assert report.status == "typed", report.problems or report.untyped
    assert compare_programs(uneven_gather(None), erase(uneven_gather("tp=2")), growth=False).differences == ()
    assert compare_programs(uneven_gather(None), uneven_gather("tp=2"), growth=False).differences == ()


def bias_as_a_share(mesh: str | None) -> Program:
    """A replicated bias divided by the number of ranks is a partial sum: counted exactly once."""
    hand = Hand(mesh)
    h, w, bias = hand.input("h", (6, 8), "S(1)"), hand.input("w", (8, 4), "S(0)"), hand.input("bias", (4,), "R")
    share = bias if mesh is None else hand.call(aten.div.Tensor, bias, 2)
    hand.output("out", hand.reduce(hand.call(aten.addmm.default, share, h, w)), "R", (6, 4))
    return hand.program()


def test_a_share_of_a_replica_may_join_a_partial_sum() -> None:
    assert check_types(bias_as_a_share("tp=2")).status == "typed"
    assert compare_programs(bias_as_a_share(None), erase(bias_as_a_share("tp=2")), growth=False).differences == ()
    assert compare_programs(bias_as_a_share(None), bias_as_a_share("tp=2"), growth=False).differences == ()


def test_a_share_for_another_number_of_ranks_is_refused() -> None:
    hand = Hand("tp=4")
    h, w, bias = hand.input("h", (6, 8), "S(1)"), hand.input("w", (8, 4), "S(0)"), hand.input("bias", (4,), "R")
    hand.output("out", hand.reduce(hand.call(aten.addmm.default, hand.call(aten.div.Tensor, bias, 2), h, w)), "R", (6, 4))
    assert "counted 4 times" in check_types(hand.program()).problems[0].message


def test_merging_batch_and_heads_makes_a_strided_shard() -> None:
    report = check_types(attention("tp=2"))
    shown = {report.axes.describe(t) for t in report.types.values() if hasattr(t, "dims")}
    assert "S(0, outer=2)" in shown


def test_the_cost_does_not_depend_on_the_number_of_ranks() -> None:
    # one head a rank makes 1,024 heads; the graph has the same ops at every size
    seconds = {}
    for ranks in (2, 1024):
        program = attention(f"tp={ranks}", heads=ranks, size=1)
        check_types(program)
        start = time.process_time()
        for _ in range(5):
            report = check_types(program)
        seconds[ranks] = time.process_time() - start
        assert report.status == "typed", report.problems or report.untyped
    assert seconds[1024] < 1.0
    assert seconds[1024] < 5 * seconds[2] + 0.05


def test_what_cannot_be_typed_is_not_erased() -> None:
    hand = Hand("tp=2")
    x = hand.input("x", (8, 4), "S(0)")
    hand.output("out", hand.call(aten.cholesky_inverse.default, x), "S(0)", (8, 4))
    with pytest.raises(UnsupportedError, match=r"untypable.*no type rule"):
        erase(hand.program())


def test_a_value_of_zeros_may_join_a_partial_sum() -> None:
    hand = Hand("tp=2")
    h, w = hand.input("h", (6, 8), "S(1)"), hand.input("w", (8, 4), "S(0)")
    zeros = hand.call(aten.zeros.default, [6, 4])
    hand.output("out", hand.reduce(hand.call(aten.add.Tensor, hand.call(aten.mm.default, h, w), zeros)), "R", (6, 4))
    assert check_types(hand.program()).status == "typed"


def test_every_type_has_the_shape_of_the_global_value() -> None:
    report = check_types(mlp("tp=4"))
    shapes = {node.name: value.shape for node, value in report.types.items() if hasattr(value, "dims")}
    assert shapes["product"] == (6, 8)
    assert shapes["gelu_default"] == (6, 24)
    assert torch.Size(shapes["w1"]) == torch.Size((8, 24))


def test_complex_values_move_between_ranks_as_pairs_of_reals() -> None:
    # what the shard pass emits for S(0) -> S(1) of a complex value: split, exchange, join, all on a last dimension of 2
    hand = Hand("tp=2")
    x = hand.input("x", (4, 6), "S(0)", dtype=torch.complex64)
    pairs = hand.call(aten.view_as_real.default, x)
    apart = hand.call(aten.permute.default, hand.call(aten.reshape.default, pairs, [2, 2, 3, 2]), [1, 0, 2, 3])
    sent = hand.call(aten.contiguous.default, apart)
    received = hand.call(c10d.wait_tensor.default, hand.call(c10d.all_to_all_single.default, sent, [1, 1], [1, 1], "tp"))
    joined = hand.call(aten.reshape.default, received, [4, 3, 2])
    y = hand.call(aten.view_as_complex.default, joined, layout="S(1)", shape=(4, 6))
    hand.output("out", y, "S(1)", (4, 6))
    report = check_types(hand.program())
    assert report.status == "typed", report.problems or report.untyped
    original = Hand(None)
    original.output("out", original.input("x", (4, 6), "S(0)", dtype=torch.complex64))
    assert compare_programs(original.program(), erase(hand.program(), report), growth=False).differences == ()
