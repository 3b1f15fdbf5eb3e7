"""Every solver ends at the loop's own values; bodies are data and nothing else."""

import dataclasses
import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hocket.errors import InputError, ProgramError
from hocket.runtime.fixedpoint import decide
from hocket.runtime.fixedpoint.body import Body, Call, read_body
from hocket.runtime.fixedpoint.how import How
from hocket.runtime.fixedpoint.newton import newton, shooting
from hocket.runtime.fixedpoint.op import chain_op, run_solver
from hocket.runtime.fixedpoint.solvers import Stop, blocks, jacobi, loop, windows
from hocket.runtime.fixedpoint.steps import Chain


def slot(i: int) -> dict[str, int]:
    return {"slot": i}


TANH = Body(
    1,
    1,
    1,
    (
        Call("aten.addmm.default", [slot(2), slot(0), slot(1)], {}, (3,), spread=False),
        Call("aten.tanh.default", [slot(3)], {}, (4,), spread=False),
    ),
    (4,),
    (4,),
    rows=True,
)
"""h' = tanh(u + h W)."""

XOR = Body(
    2,
    0,
    1,
    (
        Call("aten.bitwise_xor.Tensor", [slot(0), slot(2)], {}, (3,), spread=False),
        Call("aten.add.Tensor", [slot(3), slot(1)], {}, (4,), spread=False),
    ),
    (1, 4),
    (3, 4),
    rows=True,
)
"""a, b -> b, (a ^ u) + b on integers."""


def tanh_chain(steps: int = 60, *, scale: float = 0.5, rows: int = 2, width: int = 5, dtype: torch.dtype = torch.float64) -> Chain:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(width, width, generator=generator, dtype=dtype) * scale / math.sqrt(width)
    stream = torch.randn(steps, rows, width, generator=generator, dtype=dtype)
    return Chain(TANH, [torch.zeros(rows, width, dtype=dtype)], [weight], [stream], steps)


def xor_chain(steps: int, seed: int) -> Chain:
    generator = torch.Generator().manual_seed(seed)
    init = [torch.randint(-9, 9, (2, 3), generator=generator) for _ in range(2)]
    return Chain(XOR, init, [], [torch.randint(-9, 9, (steps, 2, 3), generator=generator)], steps)


@settings(max_examples=10, deadline=None)
@given(st.integers(1, 40), st.integers(1, 12), st.integers(0, 999))
def test_every_solver_is_bitwise_the_loop_on_integers(steps: int, window: int, seed: int) -> None:
    chain = xor_chain(steps, seed)
    expected = loop(chain).trajectory
    for found in (
        jacobi(chain, Stop([0.0, 0.0])),
        blocks(chain, Stop([0.0, 0.0]), window),
        windows(chain, Stop([0.0, 0.0]), window),
        run_solver(chain, How("auto")),
    ):
        assert all(torch.equal(a, b) for a, b in zip(found.trajectory, expected, strict=True)), found.report


@pytest.mark.parametrize("sweeps", [1, 4, 17])
def test_after_k_jacobi_sweeps_the_first_k_steps_are_exact(sweeps: int) -> None:
    chain = xor_chain(30, 5)
    expected, found = loop(chain).trajectory, jacobi(chain, Stop([0.0, 0.0]), sweeps=sweeps)
    assert found.report.exact_prefix == sweeps
    for a, b in zip(found.trajectory, expected, strict=True):
        assert torch.equal(a[:sweeps], b[:sweeps])
        assert not torch.equal(a, b)


def test_solvers_of_floats_agree_with_the_loop_to_rounding() -> None:
    chain = tanh_chain()
    expected = loop(chain).trajectory[0]
    relative = How().tolerance(torch.float64)
    for found in (
        jacobi(chain, Stop([relative])),
        blocks(chain, Stop([relative]), 16),
        windows(chain, Stop([relative]), 16),
        shooting(chain, Stop([relative]), 8),
        newton(chain, Stop([relative])),
    ):
        torch.testing.assert_close(found.trajectory[0], expected, rtol=0, atol=1e-13, msg=str(found.report))
        assert not found.report.fell_back


def test_newton_needs_few_iterations_where_jacobi_needs_many() -> None:
    chain = tanh_chain(200, scale=1.2, rows=1, width=2)
    stop = Stop([1e-12])
    assert newton(chain, stop).report.sweeps * 3 < jacobi(chain, stop).report.sweeps


def test_full_newton_refuses_large_states() -> None:
    with pytest.raises(InputError, match="at most 256 numbers"):
        newton(tanh_chain(4, rows=40, width=8), Stop([1e-12]))


def test_a_body_that_is_not_row_by_row_is_vectorised() -> None:
    folded = tanh_chain()
    body = read_body(dataclasses.replace(TANH, rows=False).to_json())
    batched = Chain(body, folded.init, folded.shared, folded.streams, folded.count)
    for chain in (folded, batched):
        found = blocks(chain, Stop([1e-14]), 16)
        torch.testing.assert_close(found.trajectory[0], loop(folded).trajectory[0], rtol=0, atol=1e-13)


def test_chaos_falls_back_to_the_loop_and_stays_there() -> None:
    decide.forget()
    chain, how = tanh_chain(120, scale=4.0, rows=1, width=16), How("auto")
    expected = loop(chain).trajectory[0]
    for _ in range(3):
        found = run_solver(chain, how)
        assert torch.equal(found.trajectory[0], expected)
        assert found.report.solver == "sequential"
    assert "do not meet" in decide.knowledge(chain, how).reason


def test_a_plan_that_does_not_hold_goes_on_from_its_exact_part_and_is_measured_anew() -> None:
    decide.forget()
    chain, how = tanh_chain(120, scale=4.0, rows=1, width=16), How("auto")
    known = decide.knowledge(chain, how)
    known.window, known.warm, known.merge, known.is_measured = (
        8,
        8,
        8.0,
        True,
    )  # as if the weights had become chaotic since the measurement
    found = run_solver(chain, how)
    torch.testing.assert_close(found.trajectory[0][:24], loop(chain).trajectory[0][:24], rtol=1e-9, atol=1e-9)  # then chaos grows
    assert found.report.fell_back
    assert known.window == 0
    assert run_solver(chain, how).report.solver == "sequential"


def test_nan_states_are_those_of_the_loop() -> None:
    chain = tanh_chain(40)
    chain.streams[0][20] = math.nan
    found = blocks(chain, Stop([1e-12]), 8, cap=2)
    assert torch.equal(found.trajectory[0].isnan(), loop(chain).trajectory[0].isnan())
    assert found.report.fell_back


def test_costs_decide_what_is_tried() -> None:
    known = decide.Known(costs={1: 1.0, 32: 1.0}, merge=16.0)
    assert decide.choose(known, 1000)[0] == 32
    known = decide.Known(costs={1: 1.0, 32: 60.0}, merge=16.0)
    assert decide.choose(known, 1000) == []


def test_the_fastest_of_what_is_tried_stays() -> None:
    decide.forget()
    chain, how = tanh_chain(200, rows=1), How("auto")
    expected = loop(chain).trajectory[0]
    for _ in range(decide.SETTLING):
        torch.testing.assert_close(run_solver(chain, how).trajectory[0], expected, rtol=0, atol=1e-13)
    known = decide.knowledge(chain, how)
    assert not known.trials
    assert decide.TURNS <= len(known.turns[0]) <= decide.MOST_TURNS
    fastest = min(known.beside_loop(contender) for contender in known.turns)
    assert known.beside_loop(known.window) <= max(fastest / decide.CLEARLY, fastest)
    assert "tried blocks of" in known.reason or "tried the loop" in known.reason


def test_a_busy_turn_does_not_change_the_choice() -> None:
    known = decide.Known(turns={0: [9.0, 1.0, 1.0, 1.0, 1.0], 16: [9.0, 0.5, 70.0, 0.5, 0.5]})
    assert known.beside_loop(16) == 0.5


def test_a_start_that_is_not_warm_enough_makes_the_next_ones_warmer() -> None:
    decide.forget()
    chain, how = tanh_chain(256, rows=1), How("auto")
    known = decide.knowledge(chain, how)
    known.window, known.warm, known.merge, known.is_measured = 64, 4, 48.0, True
    reports = [run_solver(chain, how).report for _ in range(16)]
    assert not any(report.fell_back for report in reports)
    assert reports[0].sweeps == 2
    assert reports[-1].sweeps == 1
    assert reports[-1].steps < reports[0].steps + 64


def test_the_error_is_estimated() -> None:
    chain = tanh_chain(400, scale=0.9)
    found = blocks(chain, Stop([1e-6]), 64)
    error = float((found.trajectory[0] - loop(chain).trajectory[0]).abs().amax())
    assert found.report.contraction is not None
    assert 0.0 < error <= 4 * found.report.error_estimate < 1e-3


@pytest.mark.parametrize("solver", ["sequential", "jacobi", "blocks:8", "windows:8", "shooting:8", "newton", "auto"])
def test_the_op_runs_every_solver(solver: str) -> None:
    chain = tanh_chain(rows=1)
    last, emitted = chain_op()(chain.init, chain.shared, chain.streams, chain.count, TANH.to_json(), How.parse(solver).to_json())
    expected = loop(chain).trajectory[0]
    torch.testing.assert_close(emitted, expected, rtol=0, atol=1e-13)
    torch.testing.assert_close(last, expected[-1], rtol=0, atol=1e-13)


def test_bodies_travel_as_json() -> None:
    assert read_body(XOR.to_json()) == XOR


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"calls": [["os.system.default", [], {}, [3], False]]}, "not allowed"),
        ({"calls": [["aten.bernoulli.default", [{"slot": 0}], {}, [3], False]], "following": [3], "emits": []}, "random"),
        ({"calls": [["aten.add_.Tensor", [{"slot": 0}, {"slot": 1}], {}, [3], False]]}, "not functional"),
        ({"calls": [["_c10d_functional.wait_tensor.default", [{"slot": 0}], {}, [3], False]]}, "ranks would wait"),
        ({"calls": [["aten.neg.default", [{"slot": 9}], {}, [3], False]]}, "before they exist"),
        ({"following": [77]}, "nothing writes"),
        ({"format": 2}, "format 2"),
        ({"inputs": "x"}, "malformed"),
    ],
)
def test_what_is_no_body_is_refused(change: dict[str, object], message: str) -> None:
    raw = {**json.loads(TANH.to_json()), **change}
    with pytest.raises(ProgramError, match=message):
        read_body(json.dumps(raw))


@pytest.mark.parametrize("solver", ["jacobian", "blocks:many", "blocks:-1"])
def test_unknown_solvers_are_refused_at_the_door(solver: str) -> None:
    with pytest.raises(InputError, match="expected a solver"):
        How.parse(solver)


def test_exactness_classes() -> None:
    assert How("blocks").exactness(torch.int64) == "BITWISE"
    assert How("blocks").exactness(torch.float32) == "ROUNDING"
    assert How("blocks", exact=1e-4).exactness(torch.float32) == "TOL(0.0001)"
    assert How("sequential").exactness(torch.float32) == "BITWISE"
    with pytest.raises(InputError, match="exact="):
        How(exact="nearly")
