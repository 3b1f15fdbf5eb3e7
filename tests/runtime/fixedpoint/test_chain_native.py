"""A chain that is a layer of torch: hoisted, solved or left to torch's kernel, the results are the layer's."""

import dataclasses
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hocket.errors import InputError, ProgramError
from hocket.runtime.fixedpoint import decide
from hocket.runtime.fixedpoint.body import Body, Call
from hocket.runtime.fixedpoint.hoist import hoist, hoisted
from hocket.runtime.fixedpoint.how import How
from hocket.runtime.fixedpoint.known import LOOP, NATIVE
from hocket.runtime.fixedpoint.native import run_native
from hocket.runtime.fixedpoint.op import chain_op
from hocket.runtime.fixedpoint.solvers import loop
from hocket.runtime.fixedpoint.steps import Chain


def slot(i: int) -> dict[str, int]:
    return {"slot": i}


def call(op: str, *args: object, out: int) -> Call:
    return Call(f"aten.{op}", list(args), {}, (out,), spread=False)


LAYER = Body(
    1,
    2,
    1,
    (
        call("t.default", slot(1), out=4),
        call("mm.default", slot(3), slot(4), out=5),
        call("t.default", slot(2), out=6),
        call("addmm.default", slot(5), slot(0), slot(6), out=7),
        call("tanh.default", slot(7), out=8),
    ),
    (8,),
    (8,),
    rows=True,
)
"""h' = tanh(x W^T + h U^T), whole."""


def layer(steps: int = 60, rows: int = 2, *, seed: int = 0, batched: bool = True) -> Chain:
    generator = torch.Generator().manual_seed(seed)

    def random(*sizes: int) -> torch.Tensor:
        return torch.randn(*sizes, generator=generator, dtype=torch.float64) * 0.4

    body = LAYER if batched else dataclasses.replace(LAYER, rows=False)
    return Chain(body, [random(rows, 4)], [random(4, 3), random(4, 4)], [random(steps, rows, 3)], steps)


def run(chain: Chain, how: How) -> list[torch.Tensor]:
    return chain_op()(chain.init, chain.shared, chain.streams, chain.count, chain.body.text, how.to_json())


def test_products_and_transposes_leave_the_step() -> None:
    parts = hoisted(LAYER.text)
    assert (parts.fixed, parts.ahead, parts.shared, parts.streams) == ((6,), (5,), (), ())
    assert [c.op for c in parts.rest.calls] == ["aten.addmm.default", "aten.tanh.default"]
    assert (parts.rest.carries, parts.rest.shared, parts.rest.streams) == (1, 1, 1)


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 40), st.integers(1, 3), st.integers(0, 9), st.booleans())
def test_hoisting_leaves_the_values_of_the_loop(steps: int, rows: int, seed: int, batched: bool) -> None:
    chain = layer(steps, rows, seed=seed, batched=batched)
    torch.testing.assert_close(loop(hoist(chain)).trajectory, loop(chain).trajectory, rtol=0, atol=1e-14)


def test_a_chain_without_anything_to_hoist_stays_as_it_is() -> None:
    inner = hoist(layer())
    assert hoist(inner) is inner


@pytest.mark.parametrize("contender", [LOOP, NATIVE, 16])
def test_whoever_runs_the_results_are_the_layers(contender: int) -> None:
    decide.forget()
    chain, how = layer(), How("auto", native="rnn_tanh")
    known = decide.knowledge(chain, how)
    known.window, known.merge, known.warm, known.is_measured = contender, 40.0, 16, True
    found = run(chain, how)
    expected = run_native("rnn_tanh", chain.init, chain.shared, chain.streams[0])
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-13)


def test_torchs_kernel_is_tried_from_the_second_call_on_and_every_call_gives_the_same() -> None:
    decide.forget()
    chain, how = layer(200, 1), How("auto", native="rnn_tanh")
    expected = run(chain, How("sequential", native="rnn_tanh"))
    for _ in range(decide.SETTLING):
        torch.testing.assert_close(run(chain, how), expected, rtol=0, atol=1e-12)
    known = decide.knowledge(chain, how)
    assert not known.trials
    assert len(known.turns[NATIVE]) == len(known.turns[LOOP]) >= decide.TURNS
    assert "torch's kernel" in known.reason


@pytest.mark.parametrize(
    ("turns", "chosen"),
    [
        ({LOOP: [1.0] * 3, NATIVE: [0.8] * 3, 16: [0.75] * 3}, NATIVE),  # not clearly faster
        ({LOOP: [1.0] * 3, NATIVE: [0.8] * 3, 16: [0.7] * 3}, 16),
        ({LOOP: [1.0] * 3, NATIVE: [1.2] * 3, 16: [0.95] * 3}, LOOP),
        ({LOOP: [1.0] * 3, NATIVE: [9.0, 0.5, 0.5], 16: [0.6] * 3}, NATIVE),  # the first turn makes plans
        ({LOOP: [1.0] * 5, 16: [0.5] * 5, 24: [None, None, None, 9.0, 0.4]}, 24),  # one that joined later
        ({LOOP: [1.0] * 3, 16: [0.5, math.inf, math.inf]}, LOOP),
    ],
)
def test_blocks_must_be_clearly_faster_than_the_best_in_order(turns: dict[int, list[float | None]], chosen: int) -> None:
    known = decide.Known(turns=turns, merge=20.0)
    decide.keep_the_fastest(known)
    assert known.window == chosen


def test_hopeless_windows_leave_and_neighbours_of_the_best_join() -> None:
    known = decide.Known(turns={LOOP: [1.0] * 3, NATIVE: [2.0] * 3, 16: [0.5] * 3, 32: [0.6] * 3, 64: [0.9] * 3}, rounds=9)
    assert decide.still_hopeful(known, 320) == [LOOP, NATIVE, 16, 32, 12, 23]
    assert known.turns[12] == [None] * 3


def test_a_window_that_has_become_slower_than_the_others_loses_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    decide.forget()
    chain, how = layer(200, 1), How("auto", native="rnn_tanh")
    known = decide.knowledge(chain, how)
    known.window, known.merge, known.warm, known.is_measured = 25, 40.0, 24, True
    known.calls = known.wait
    now, seconds = [0.0], {LOOP: 2.0, NATIVE: 1.0, 25: 3.0}
    plain = decide._Decider._run

    def timed(self: decide._Decider, contender: int) -> object:
        now[0] += seconds[contender]
        return plain(self, contender)

    monkeypatch.setattr(decide._Decider, "_run", timed)
    monkeypatch.setattr(decide, "clock", lambda: now[0])
    for _ in range(decide.CHECKED * 3):
        run(chain, how)
    assert not known.trials
    assert known.window == NATIVE


def test_a_body_that_cannot_be_the_layer_is_refused() -> None:
    with pytest.raises(ProgramError, match="torch's lstm has 2 carries"):
        run(layer(), How("auto", native="lstm"))
    with pytest.raises(InputError, match="expected a layer among"):
        How(native="transformer")
