"""Chains are found where they are, refused where they are none, and mean what the loop meant."""

import time

import pytest
import torch
import torch.fx as fx
from chain_graphs import Recipe, Writer, chain_program, chains_of, context, run, values_of
from hypothesis import given, settings
from hypothesis import strategies as st

from hocket.compiler.verify.ring.compare import compare
from hocket.compiler.verify.ring.verdict import Status
from hocket.passes.chain.find import find_chains
from hocket.passes.chain.jacobi import JacobiFeedforward

aten = torch.ops.aten
SOLVERS = ("sequential", "jacobi", "blocks:4", "windows:8", "gauss-seidel", "auto")


def check(seed: int) -> int:
    recipe = Recipe.draw(seed)
    program = chain_program(recipe)
    values = values_of(program, seed)
    expected = run(program, values)
    count = 0
    for solver in SOLVERS:
        lifted = JacobiFeedforward(solver, shortest=16)(program, context())
        count = len(chains_of(lifted))
        for a, b in zip(run(lifted, values), expected, strict=True):
            assert torch.equal(a, b), (recipe, solver)
    return count


@settings(max_examples=8, deadline=None)
@given(st.integers(0, 1 << 30))
def test_random_chains_are_found_and_every_solver_is_bitwise_equal(seed: int) -> None:
    assert check(seed) == 1


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_thousand_random_chains_are_found_and_every_solver_is_bitwise_equal() -> None:
    assert not [seed for seed in range(1000) if check(seed) != 1]


def test_the_original_program_is_left_alone() -> None:
    program = chain_program(Recipe(3, 26, 1, 1, 3, 2))
    before = str(program.graph.graph)
    JacobiFeedforward()(program, context())
    assert str(program.graph.graph) == before


def linear_chain(steps: int, *, moving: bool = False, noise: bool = False, back: int = 1) -> Writer:
    """x' = -(x + c); variants that are no chains."""
    write = Writer(2)
    states = [write.input(2, 3) for _ in range(back)]
    for t in range(steps):
        value = write.call(aten.add.Tensor, states[-back], states[0])
        if moving:
            value = write.call(aten.roll.default, value, [t], [1])
        if noise:
            value = write.call(aten.randint_like.default, value, 9)
        states.append(write.call(aten.neg.default, value))
    write.program(states[-1])
    return write


@pytest.mark.parametrize(
    ("variant", "reason"),
    [
        ({"moving": True}, "index arithmetic"),
        ({"noise": True}, "random numbers"),
    ],
)
def test_what_is_no_chain_is_refused_with_the_reason(variant: dict[str, object], reason: str) -> None:
    chains, refused = find_chains(linear_chain(60, **variant).graph, 24)  # type: ignore[arg-type]
    assert not chains
    assert any(reason in one.reason for one in refused), refused


@pytest.mark.parametrize("step", [1, 3, -1])
def test_integers_that_go_on_evenly_become_streams(step: int) -> None:
    write = Writer(2)
    x, table = write.input(2, 3), write.input(190, 2, 3)
    table = write.call(aten.neg.default, table)
    for t in range(30):
        place = 100 + step * t
        picked = write.call(aten.select.int, write.call(aten.add.Tensor, table, x), 0, place)
        x = write.call(aten.bitwise_xor.Tensor, write.call(aten.mul.Tensor, picked, place), x)
    program = write.program(x)
    lifted = JacobiFeedforward("blocks:8")(program, context())
    assert len(chains_of(lifted)) == 1
    values = values_of(program, 2)
    assert torch.equal(run(lifted, values)[0], run(program, values)[0])
    assert compare(program, lifted).status is Status.EQUAL


def test_integers_that_go_on_unevenly_are_refused_with_the_reason() -> None:
    write = Writer(2)
    x = write.input(2, 3)
    for t in range(60):
        x = write.call(aten.neg.default, write.call(aten.add.Tensor, x, t * t))
    write.program(x)
    chains, refused = find_chains(write.graph, 24)
    assert not chains
    assert any("index arithmetic" in one.reason for one in refused)


def test_results_of_several_steps_before_are_carried() -> None:
    (chain,) = find_chains(linear_chain(60, back=3).graph, 24)[0]
    assert max(distance for _, distance in chain.carries) >= 2


def test_short_chains_are_not_looked_at() -> None:
    assert find_chains(linear_chain(20).graph, 24) == ([], [])


def test_repeated_segments_that_do_not_feed_each_other_are_refused() -> None:
    write = Writer(2)
    x = write.input(2, 3)
    values = [write.call(aten.neg.default, write.call(aten.abs.default, x)) for _ in range(30)]
    write.program(write.call(aten.stack.default, values))
    chains, refused = find_chains(write.graph, 24)
    assert not chains
    assert any("do not feed each other" in one.reason for one in refused)


def test_the_golden_chain() -> None:
    write = Writer(2)
    x, u = write.input(2, 3), write.input(30, 2, 3)
    given = []
    for t in range(30):
        x = write.call(aten.bitwise_xor.Tensor, write.call(aten.neg.default, x), write.call(aten.select.int, u, 0, t))
        given.append(x)
    program = write.program(write.call(aten.stack.default, given))
    lifted = JacobiFeedforward("blocks:8")(program, context())
    targets = [str(n.target) for n in lifted.nodes if n.op == "call_function"]
    assert targets == ["hocket.chain.default", "<built-in function getitem>"]
    (decision,) = lifted.decisions
    assert decision.applied
    assert "a chain of 30 steps of 2 ops" in decision.reason
    assert "BITWISE" in decision.reason


@pytest.mark.parametrize("steps", [10_000, pytest.param(50_000, marks=pytest.mark.slow)])
def test_a_hundred_thousand_nodes_take_less_than_two_seconds(steps: int) -> None:
    graph = fx.Graph()
    node = graph.placeholder("x")
    value = node.meta["val"] = torch.empty(2, 3)
    for _ in range(steps):
        for target in (aten.neg.default, aten.abs.default):
            node = graph.call_function(target, (node,))
            node.meta["val"] = value
    graph.output((node,))
    times = []
    for _ in range(2):
        start = time.process_time()
        chains, _ = find_chains(graph, 24)
        times.append(time.process_time() - start)
    assert [(chain.period, chain.count) for chain in chains] == [(2, steps)]
    assert min(times) < 2.0 * steps / 50_000, times


def test_the_lifted_program_is_equal_over_the_ring() -> None:
    program = chain_program(Recipe(11, 26, 2, 1, 3, 2))
    verdict = compare(program, JacobiFeedforward("jacobi", shortest=16)(program, context()))
    assert verdict.status is Status.EQUAL
