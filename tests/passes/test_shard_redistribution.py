"""Every way from one layout to another, on every rank, uneven sizes and empty pieces included."""

import itertools

import pytest
import torch
from lowered_programs import bytes_sent, collectives, lower, plan_of, program_of

from hocket.compiler.layout import Layout, Partial, Placement, Replicate, Shard, cut, global_slices
from hocket.compiler.program import INTEGER_FUNCTIONS, Role, RoleKind, check_program, note
from hocket.compiler.redistribute import is_reachable, steps, wire_bytes
from hocket.compiler.verify.lockstep import run_ranks
from hocket.runtime.mesh import Mesh

aten = torch.ops.aten
R, S0, S1, S2, SUM = Replicate(), Shard(0), Shard(1), Shard(2), Partial("sum")
ONE_AXIS: list[Layout] = [(p,) for p in (R, S0, S1, S2, SUM, Partial("max"), Partial("min"), Partial("avg"))]
FEW: list[Placement] = [R, S0, S1, SUM]
TWO_AXES: list[Layout] = list(itertools.product(FEW, repeat=2))
X = Role(RoleKind.INPUT, "x")


def move(shape: tuple[int, ...], source: Layout, target: Layout, mesh: Mesh, dtype: torch.dtype = torch.float64) -> None:
    """Bring one value from one layout into another; check pieces, the whole, the recorded shapes and the bytes."""
    program = program_of(lambda graph, x: [x], {"x": shape}, dtype)
    lowered = lower(program, plan_of(mesh, {"x": ((), (source,))}, [target]))
    check_program(lowered)
    value = torch.randn(shape, dtype=dtype)
    run = run_ranks(lowered, {X: value}, record=True)
    (whole,) = run.outputs.values()
    torch.testing.assert_close(whole, value, rtol=1e-12, atol=1e-12)
    (result,) = lowered.results
    assert result is not None
    assert note(result).layouts == (target,)
    assert note(result).global_shapes == (shape,)
    assert note(result).carries == "x"
    pieces = run.values[result.name]
    assert tuple(result.meta["val"].shape) == tuple(pieces[0].shape)
    assert all(tuple(p.shape) == tuple(n for _, n in global_slices(shape, target, mesh, r)) for r, p in enumerate(pieces))
    if not any(isinstance(p, Partial) for p in target):
        for piece, expected in zip(pieces, cut(value, target, mesh), strict=True):
            torch.testing.assert_close(piece, expected, rtol=1e-12, atol=1e-12)
    expected_bytes = sum(wire_bytes(step, shape, value.element_size(), mesh) for step in steps(source, target))
    assert bytes_sent(lowered) == pytest.approx(expected_bytes, rel=1e-12)


@pytest.mark.parametrize("parts", [1, 2, 3, 4])
@pytest.mark.parametrize("shape", [(4, 12, 8), (5, 7, 3), (1, 2, 9)])
def test_every_pair_of_placements_moves_the_value(parts: int, shape: tuple[int, ...]) -> None:
    mesh = Mesh((("a", parts),))
    for source, target in itertools.product(ONE_AXIS, repeat=2):
        if is_reachable(source, target):
            move(shape, source, target, mesh)


@pytest.mark.parametrize("mesh", ["a=2,b=2", "a=2,b=3", "a=3,b=2"])
@pytest.mark.parametrize("shape", [(12, 6), (7, 5)])
def test_every_pair_of_layouts_of_two_axes_moves_the_value(mesh: str, shape: tuple[int, ...]) -> None:
    for source, target in itertools.product(TWO_AXES, repeat=2):
        if is_reachable(source, target):
            move(shape, source, target, Mesh.parse(mesh))


def test_three_nested_cuts_of_one_dimension_come_apart_and_together() -> None:
    mesh = Mesh.parse("a=2,b=2,c=2")
    for source, target in itertools.product([(S0, S0, S0), (S0, S1, S0), (R, R, R), (S1, S0, S0)], repeat=2):
        move((11, 5), source, target, mesh)


@pytest.mark.parametrize("source", [S0, S1, SUM])
@pytest.mark.parametrize("target", [R, S0, S1])
def test_complex_values_are_sent_as_pairs_of_reals(source: Placement, target: Placement) -> None:
    move((5, 4), (source,), (target,), Mesh.parse("a=2"), torch.complex128)


def test_even_sizes_need_no_padding_and_no_rank_dependent_lengths() -> None:
    mesh = Mesh.parse("a=4")
    for source, target in [(S0, R), (SUM, S0), (S0, S1), (SUM, S1), (S1, R)]:
        program = program_of(lambda graph, x: [x], {"x": (8, 12)})
        lowered = lower(program, plan_of(mesh, {"x": ((), ((source,),))}, [(target,)]))
        targets = {node.target for node in lowered.nodes if node.op == "call_function"}
        assert not targets & {aten.constant_pad_nd.default, aten.slice.Tensor, *INTEGER_FUNCTIONS}
        assert len(collectives(lowered)) == 1


def test_a_step_on_an_axis_of_one_rank_sends_nothing() -> None:
    program = program_of(lambda graph, x: [x], {"x": (8,)})
    lowered = lower(program, plan_of(Mesh.parse("a=1"), {"x": ((), ((SUM,),))}, [(R,)]))
    assert collectives(lowered) == []
    assert not [d for d in lowered.decisions if d.by == "shard"]


def test_what_a_step_hands_over_is_contiguous_on_every_rank() -> None:
    """Attention and the backward of layer norm on CPU read strided pieces wrongly, without an error."""
    mesh = Mesh.parse("a=4")
    for source, target in itertools.permutations([(R,), (S0,), (S1,), (S2,)], 2):
        program = program_of(lambda graph, x: [x], {"x": (4, 4, 4)})
        lowered = lower(program, plan_of(mesh, {"x": ((), (source,))}, [target]))
        run = run_ranks(lowered, {X: torch.randn(4, 4, 4, dtype=torch.float64)}, record=True)
        (result,) = lowered.results
        assert result is not None
        assert all(piece.is_contiguous() for piece in run.values[result.name])
