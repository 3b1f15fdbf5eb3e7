import pytest
import torch
from hand_lowered import ATEN, Builder, data_parallel_training, mlp_reference, tensor_parallel_mlp

from hocket.compiler.emit import emit
from hocket.compiler.layout import assemble as assemble_placements
from hocket.compiler.layout import cut as cut_placements
from hocket.compiler.layout import parse_placement
from hocket.runtime.engines.sim import SimEngine
from hocket.runtime.errors import InputError
from hocket.runtime.mesh import Mesh
from hocket.runtime.pieces import assemble, cut, holders


def training(dp: int):
    program = emit(data_parallel_training(f"dp={dp}"))
    torch.manual_seed(1)
    w1, w2 = (torch.nn.Parameter(torch.randn(4, 4)) for _ in range(2))
    bindings = {("param", "w1"): w1, ("param", "w2"): w2, ("buffer", "seen"): torch.tensor(0.0)}
    engine = SimEngine(program.mesh)
    return engine, engine.load(program, bindings), bindings


@pytest.mark.parametrize("dp", [1, 2, 3, 6])
def test_training_on_simulated_ranks_equals_autograd(dp):
    engine, handle, bindings = training(dp)
    w1, w2 = bindings["param", "w1"], bindings["param", "w2"]
    for step in range(3):
        x, t = torch.randn(6, 4), torch.randn(6, 4)
        ticket, (y, seen) = engine.forward(handle, [x])
        wanted = torch.relu(x @ w1) @ w2
        torch.testing.assert_close(y, wanted.detach())
        assert seen is bindings["buffer", "seen"]
        assert seen.item() == step + 1
        d1, d2 = torch.autograd.grad(wanted, (w1, w2), t)
        g1, g2, gx = engine.backward(handle, ticket, [t])
        assert gx is None
        torch.testing.assert_close(g1, d1)
        torch.testing.assert_close(g2, d2)
        with torch.no_grad():
            w1 -= 0.1 * g1
            w2 -= 0.1 * g2


def test_several_forwards_may_be_alive_and_released():
    engine, handle, bindings = training(2)
    w1, w2 = bindings["param", "w1"], bindings["param", "w2"]
    x = [torch.randn(6, 4) for _ in range(3)]
    tickets = [engine.forward(handle, [v])[0] for v in x]
    engine.release(tickets[1])
    engine.release(tickets[1])
    with pytest.raises(InputError, match="closed"):
        engine.backward(handle, tickets[1], [None])
    for i in (2, 0):
        t = torch.randn(6, 4)
        g1, g2, _ = engine.backward(handle, tickets[i], [t])
        d1, d2 = torch.autograd.grad(torch.relu(x[i] @ w1) @ w2, (w1, w2), t)
        torch.testing.assert_close(g1, d1)
        torch.testing.assert_close(g2, d2)


def test_a_missing_tangent_is_zero():
    engine, handle, _ = training(2)
    ticket, _ = engine.forward(handle, [torch.randn(6, 4)])
    g1, g2, _ = engine.backward(handle, ticket, [None])
    assert not g1.any()
    assert not g2.any()


def test_a_buffer_updated_by_the_forward_keeps_its_old_value_for_the_backward():
    b = Builder("d=2")
    x = b.input("input", "x", (4,), "S(0)")
    scale = b.input("buffer", "scale", (), "R")
    t = b.input("tangent", "y", (4,), "S(0)")
    b.output("output", "y", b.op(ATEN.mul.Tensor, x, scale), "S(0)", (4,))
    b.output("update", "scale", b.op(ATEN.mul.Tensor, scale, 2), "R", ())
    b.output("gradient", "x", b.op(ATEN.mul.Tensor, t, scale), "S(0)", (4,))
    program = emit(b.program())
    assert program.inputs_read_after("forward") == {1}
    engine = SimEngine(program.mesh)
    buffer = torch.tensor(3.0)
    handle = engine.load(program, {("buffer", "scale"): buffer})
    ticket, (y, new) = engine.forward(handle, [torch.ones(4)])
    assert new is buffer
    assert (y[0].item(), buffer.item()) == (3.0, 6.0)
    (gradient,) = engine.backward(handle, ticket, [torch.ones(4)])
    assert torch.equal(gradient, torch.full((4,), 3.0))


def test_inference_reads_parameters_in_place():
    program = emit(tensor_parallel_mlp())
    w1, w2 = torch.randn(4, 8), torch.randn(8, 4)
    engine = SimEngine(program.mesh)
    handle = engine.load(program, {("param", "w1"): w1, ("param", "w2"): w2})
    for _ in range(2):
        x = torch.randn(8, 4)
        _, found = engine.forward(handle, [x])
        for one, two in zip(found, mlp_reference(x, w1, w2), strict=True):
            torch.testing.assert_close(one, two)
        w1.mul_(-1)


def test_what_does_not_fit_is_refused_at_the_door():
    engine, handle, bindings = training(2)
    program = handle.program
    with pytest.raises(InputError, match=r"expected 1 inputs \(input:x\), found 0"):
        engine.forward(handle, [])
    with pytest.raises(InputError, match=r"input:x: expected float32\[6, 4\], found float64\[6, 4\]"):
        engine.forward(handle, [torch.zeros(6, 4).double()])
    with pytest.raises(InputError, match=r"found float32\[5, 4\]"):
        engine.forward(handle, [torch.zeros(5, 4)])
    with pytest.raises(InputError, match="no input param:other"):
        engine.load(program, {**bindings, ("param", "other"): torch.zeros(1)})
    with pytest.raises(InputError, match="param:w1"):
        engine.load(program, {**bindings, ("param", "w1"): torch.zeros(4, 5)})
    with pytest.raises(InputError, match="mesh"):
        SimEngine(Mesh.parse("tp=2")).load(program, bindings)
    ticket, _ = engine.forward(handle, [torch.zeros(6, 4)])
    with pytest.raises(InputError, match="expected 1 tangents"):
        engine.backward(handle, ticket, [])
    engine.close()
    engine.close()
    with pytest.raises(InputError, match="closed"):
        engine.load(program, bindings)


LAYOUTS = ["R,R", "S(0),R", "R,S(1)", "S(0),S(0)", "S(1),S(0)", "P(sum),S(0)", "P(avg),P(max)", "P(product),P(min)", "S(2),P(sum)"]


@pytest.mark.parametrize("text", LAYOUTS)
@pytest.mark.parametrize("mesh", ["a=2,b=3", "a=3,b=1", "a=4,b=2"])
def test_pieces_agree_with_the_layouts_of_the_compiler(text, mesh):
    grid = Mesh.parse(mesh)
    value = torch.randn(5, 7, 2)
    layout = tuple(text.split(","))
    placements = tuple(map(parse_placement, layout))
    ours, theirs = cut(value, layout, grid), cut_placements(value, placements, grid)
    for one, two in zip(ours, theirs, strict=True):
        assert torch.equal(one, two)
    torch.testing.assert_close(assemble(ours, layout, grid), value)
    torch.testing.assert_close(assemble(ours, layout, grid), assemble_placements(theirs, placements, grid))
    assert all(ours[rank] is ours[holder] for rank, holder in enumerate(holders(layout, grid)))
