"""A chain that is cut in time means what it meant: every solve ends at the loop's values, on any number of segments."""

import pytest
import torch
import torch.fx as fx
from chain_graphs import Recipe, Writer, chain_program, context, run, values_of
from hypothesis import given, settings
from hypothesis import strategies as st

import hocket
from hocket.compiler.program import Program
from hocket.compiler.verify.ring.compare import compare
from hocket.compiler.verify.ring.verdict import Status
from hocket.passes.chain.jacobi import JacobiFeedforward
from hocket.runtime.fixedpoint.report import RECENT

aten = torch.ops.aten


def cut(program: Program, parts: int, solver: str = "auto", shortest: int = 16) -> Program:
    return JacobiFeedforward(solver, shortest=shortest, axis="t")(program, context(f"t={parts}"))


def targets(program: Program) -> list[str]:
    return [str(n.target) for n in program.nodes if "hocket." in str(n.target)]


def check(seed: int, parts: int, solver: str) -> None:
    recipe = Recipe.draw(seed)
    program = chain_program(recipe)
    values = values_of(program, seed)
    after = cut(program, parts, solver)
    assert targets(after) == ["hocket.chain.default", *["hocket.resume.default"] * (parts - 1)], after.decisions
    for a, b in zip(run(after, values), run(program, values), strict=True):
        assert torch.equal(a, b), (recipe, parts, solver)


@settings(max_examples=4, deadline=None)
@given(st.integers(0, 1 << 30), st.integers(2, 4), st.sampled_from(("auto", "blocks:4", "jacobi")))
def test_random_integer_chains_of_any_length_are_bitwise_equal_on_any_number_of_segments(
    seed: int, parts: int, solver: str
) -> None:
    check(seed, parts, solver)


@pytest.mark.slow
def test_many_random_integer_chains_are_bitwise_equal_on_any_number_of_segments() -> None:
    for seed in range(150):
        check(seed, 2 + seed % 3, ("auto", "blocks:4", "jacobi")[seed % 3])


def xor_loop(steps: int) -> Program:
    write = Writer(2)
    x, u = write.input(2, 3), write.input(steps, 2, 3)
    given = []
    for t in range(steps):
        x = write.call(aten.bitwise_xor.Tensor, write.call(aten.neg.default, x), write.call(aten.select.int, u, 0, t))
        given.append(x)
    return write.program(write.call(aten.stack.default, given), x)


def test_the_golden_cut() -> None:
    after = cut(xor_loop(30), 2)
    assert [str(n.target).removeprefix("aten.").removesuffix(".default") for n in after.nodes if n.op == "call_function"] == [
        *["reshape", "transpose.int", "reshape"],  # the stream, by segments
        *["unsqueeze", "new_zeros", "cat", "reshape", "hocket.chain"],
        *["<built-in function getitem>"] * 2,
        *["unsqueeze", "reshape", "slice.Tensor", "cat", "reshape", "hocket.resume"],
        *["<built-in function getitem>", "reshape", "transpose.int", "reshape"],
        "select.int",
    ]
    (decision,) = after.decisions
    assert decision.applied
    assert "cut over t into 2 segments of 15 steps, exact after 2 sweeps" in decision.reason


def test_as_many_sweeps_as_segments_are_proven_exact_and_fewer_are_not() -> None:
    program = xor_loop(7)
    after = cut(program, 3, shortest=4)
    assert compare(program, after).status is Status.EQUAL
    sweeps = [n for n in after.graph.graph.nodes if "hocket." in str(n.target)]
    last, before = sweeps[-1], sweeps[-2]
    last.replace_all_uses_with(before)  # as if the third sweep had been left out
    assert compare(program, after).status is Status.DIFFERENT


def test_after_k_sweeps_the_first_k_segments_are_exact() -> None:
    program = xor_loop(30)
    values = values_of(program, 3)
    after = cut(program, 4)
    expected, found = run(program, values)[0], fx.Interpreter(after.graph, garbage_collect_values=False)
    found.run(*values, enable_io_processing=False)
    sweeps = [found.env[n][1] for n in after.nodes if "hocket." in str(n.target)]
    for k, states in enumerate(sweeps, 1):
        by_step = states.reshape(8, 4, 2, 3).transpose(0, 1).reshape(32, 2, 3)
        assert torch.equal(by_step[: 8 * k][:30], expected[: 8 * k])
        assert k == 4 or not torch.equal(by_step[8 * k : 8 * k + 8][: 30 - 8 * k], expected[8 * k : 8 * k + 8])


def test_a_boundary_that_is_handed_to_the_wrong_segment_is_seen() -> None:
    program = xor_loop(8)
    after = cut(program, 2, shortest=4)
    graph = after.graph.graph
    handed = next(n for n in graph.nodes if n.target is aten.slice.Tensor)
    handed.args = (handed.args[0], 0, 1, 2)
    assert compare(program, after).status is Status.DIFFERENT


def test_too_few_steps_are_kept_whole_with_the_reason() -> None:
    after = cut(xor_loop(4), 8, shortest=4)
    assert targets(after) == ["hocket.chain.default"]
    assert "not cut over t: 4 steps are too few for 8 segments" in after.decisions[0].reason


def test_steps_that_mix_their_rows_are_cut_as_lanes() -> None:
    write = Writer(2)
    x = write.input(2, 3)
    for _ in range(26):
        x = write.call(aten.add.Tensor, write.call(aten.flip.default, x, [0]), write.call(aten.neg.default, x))
    program = write.program(x)
    after = cut(program, 2)
    if targets(after) == ["hocket.chain.default"]:
        assert "cannot be put side by side" in after.decisions[0].reason
    values = values_of(program, 1)
    assert torch.equal(run(after, values)[0], run(program, values)[0])


def float_loop(steps: int, gain: float) -> tuple[Program, list[torch.Tensor]]:
    weight = torch.randn(4, 4, generator=torch.Generator().manual_seed(3)) * gain

    def model(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return hocket.sequential(lambda h, u: (torch.tanh(u + h @ weight), torch.tanh(u + h @ weight)))(x[0], x)

    x = torch.randn(steps, 2, 4, generator=torch.Generator().manual_seed(4))
    program = hocket.capture(model, (x,), train=False)
    return program, [x, weight] if len(program.placeholders) == 2 else [x]


def test_a_chain_that_forgets_is_resumed_for_a_few_steps_and_a_chaotic_one_to_the_end() -> None:
    for gain, exact_steps, fewest, most in ((0.3, 67, 4, 20), (3.0, 12, 23, 23)):
        program, values = float_loop(67, gain)
        expected, found = run(program, values), run(cut(program, 3), values)
        assert float((found[1] - expected[1])[:exact_steps].abs().amax()) <= 2e-6
        assert all(fewest <= r.steps <= most and r.solver == "resume" for r in list(RECENT)[-2:]), RECENT
