"""Steps that write to places chosen beforehand compute what the functional ops compute, bit for bit, and touch nothing else."""

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hocket.runtime.fixedpoint.body import Body, Call
from hocket.runtime.fixedpoint.inplace import Plan, plan, writer
from hocket.runtime.fixedpoint.solvers import Stop, blocks, jacobi, loop, windows
from hocket.runtime.fixedpoint.steps import Chain

ROWS, WIDTH = 3, 4
POINTWISE = ("aten.add.Tensor", "aten.mul.Tensor", "aten.sub.Tensor")
INTEGERS = (*POINTWISE, "aten.bitwise_xor.Tensor", "aten.minimum.default")


def slot(i: int) -> dict[str, int]:
    return {"slot": i}


def random_body(seed: int, *, integers: bool) -> Body:
    """Two carries, a shared matrix, a stream; elementwise ops, products, halves taken and joined again, carries that only move."""
    draw = random.Random(seed)
    calls: list[Call] = []
    whole, slots = [0, 1, 3], 4

    def call(op: str, *args: object) -> int:
        nonlocal slots
        calls.append(Call(op, list(args), {}, (slots,), spread=False))
        slots += 1
        return slots - 1

    for _ in range(draw.randint(1, 7)):
        kind = draw.choice(("pointwise", "pointwise", "unary", "product", "halves"))
        a, b = draw.choice(whole), draw.choice(whole)
        if kind == "pointwise":
            whole.append(call(draw.choice(INTEGERS if integers else POINTWISE), slot(a), slot(b)))
        elif kind == "unary":
            whole.append(call("aten.neg.default" if integers else draw.choice(("aten.tanh.default", "aten.relu.default")), slot(a)))
        elif kind == "product" and not integers:
            whole.append(call("aten.addmm.default", slot(b), slot(a), slot(2)))
        else:
            halves = [call("aten.slice.Tensor", slot(x), 1, start, start + 2) for x, start in ((a, 0), (b, 2))]
            mixed = call(draw.choice(POINTWISE), slot(halves[0]), slot(halves[1]))
            whole.append(call("aten.cat.default", [slot(halves[draw.randint(0, 1)]), slot(mixed)], 1))
    following = (draw.choice(whole), draw.choice(whole))
    return Body(2, 1, 1, tuple(calls), following, following, rows=False)


def random_chain(seed: int, steps: int, *, integers: bool) -> Chain:
    generator = torch.Generator().manual_seed(seed)

    def values(*shape: int) -> torch.Tensor:
        drawn = torch.randint(-3, 4, shape, generator=generator)
        return drawn if integers else drawn.double() / 4

    body = random_body(seed, integers=integers)
    return Chain(body, [values(ROWS, WIDTH) for _ in range(2)], [values(WIDTH, WIDTH)], [values(steps, ROWS, WIDTH)], steps)


def functional(chain: Chain) -> list[torch.Tensor]:
    state, found = chain.init, []
    for t in range(chain.count):
        state = chain.step(state, [stream[t] for stream in chain.streams])
        found.append([value.clone() for value in state])
    return [torch.stack(column) for column in zip(*found, strict=True)]


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 1 << 30), st.booleans())
def test_placed_steps_are_bitwise_the_functional_ones_and_leave_the_inputs_alone(seed: int, integers: bool) -> None:
    chain = random_chain(seed, 5, integers=integers)
    given_values = [*chain.init, *chain.shared, *chain.streams]
    before = [value.clone() for value in given_values]
    found, expected = loop(chain).trajectory, functional(chain)
    assert all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(found, expected, strict=True)), chain.body
    assert all(torch.equal(a, b) for a, b in zip(given_values, before, strict=True))


def check_integers(seed: int) -> None:
    chain = random_chain(seed, 11, integers=True)
    expected, stop = functional(chain), Stop([0.0, 0.0])
    for found in (jacobi(chain, stop), blocks(chain, stop, 4), blocks(chain, stop, 4, warm=3), windows(chain, stop, 4)):
        assert all(torch.equal(a, b) for a, b in zip(found.trajectory, expected, strict=True)), (seed, found.report)
    for sweeps in (1, 3):
        found = jacobi(chain, stop, sweeps=sweeps)
        assert all(torch.equal(a[:sweeps], b[:sweeps]) for a, b in zip(found.trajectory, expected, strict=True)), (seed, sweeps)


@settings(max_examples=6, deadline=None)
@given(st.integers(0, 1 << 30))
def test_solvers_are_bitwise_the_loop_and_sweeps_exact_on_their_prefix(seed: int) -> None:
    check_integers(seed)


@pytest.mark.slow
def test_a_thousand_random_bodies_are_solved_bitwise_with_exact_prefixes() -> None:
    for seed in range(1000):
        check_integers(seed)


def tanh_chain(*, rows: int = 1, steps: int = 200) -> Chain:
    calls = (
        Call("aten.addmm.default", [slot(2), slot(0), slot(1)], {}, (3,), spread=False),
        Call("aten.tanh.default", [slot(3)], {}, (4,), spread=False),
    )
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(6, 6, generator=generator, dtype=torch.float64) / 6
    stream = torch.randn(steps, rows, 6, generator=generator, dtype=torch.float64)
    body = Body(1, 1, 1, calls, (4,), (4,), rows=True)
    return Chain(body, [torch.zeros(rows, 6, dtype=torch.float64)], [weight], [stream], steps)


def plan_of(chain: Chain) -> Plan:
    return plan(chain.body, None, [*chain.init, *chain.shared, *[stream[0] for stream in chain.streams]])


def test_the_golden_step_needs_no_buffer() -> None:
    made = plan_of(tanh_chain())
    assert not made.buffers
    assert not made.copies
    assert len(made.lines) == 2  # the product and its tanh both write the next carry


def test_an_operand_that_is_read_again_is_not_written_over() -> None:
    calls = (
        Call("aten.add.Tensor", [slot(0), slot(1)], {}, (2,), spread=False),
        Call("aten.neg.default", [slot(2)], {}, (3,), spread=False),
        Call("aten.mul.Tensor", [slot(2), slot(3)], {}, (4,), spread=False),
    )
    chain = Chain(Body(1, 0, 1, calls, (4,), (4,)), [torch.ones(2)], [], [torch.ones(3, 2)], 3)
    assert torch.equal(loop(chain).trajectory[0], functional(chain)[0])
    assert len(plan_of(chain).buffers) == 1


def test_ops_without_a_kernel_that_writes_where_it_is_told_have_no_writer() -> None:
    assert writer("aten.relu.default") is None
    assert writer("aten.slice.Tensor") is None
    assert writer("aten.tanh_backward.default") is not None


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("warm", [2, 8, 24])
def test_blocks_end_at_the_loops_values_however_warm_their_starts_are(rows: int, warm: int) -> None:
    chain = tanh_chain(rows=rows)
    found = blocks(chain, Stop([1e-6]), 32, warm=warm)
    torch.testing.assert_close(found.trajectory[0], loop(chain).trajectory[0], rtol=0, atol=1e-5)
    assert not found.report.fell_back
    assert (found.report.sweeps == 1) == (warm == 24)  # its memory is between 8 and 24 steps long
    assert found.report.steps >= 32 + warm
