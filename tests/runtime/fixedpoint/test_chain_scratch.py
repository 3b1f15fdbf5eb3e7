"""Memory kept between solves: used again, bounded, and never under what a solve has returned."""

import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_chain_solvers import tanh_chain

from hocket.runtime.fixedpoint import scratch
from hocket.runtime.fixedpoint.scratch import Scratch
from hocket.runtime.fixedpoint.solvers import Stop, blocks, loop


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 70), st.integers(1, 40), st.integers(1, 3), st.integers(0, 20))
def test_what_a_solve_returns_outlives_later_solves(steps: int, window: int, rows: int, warm: int) -> None:
    chain = tanh_chain(steps, rows=rows)
    expected = loop(chain).trajectory[0]
    first = blocks(chain, Stop([1e-14]), min(window, steps), warm=warm).trajectory[0]
    other = tanh_chain(steps, rows=rows, scale=0.1)
    for _ in range(2):
        blocks(other, Stop([1e-14]), min(window, steps), warm=warm)
    torch.testing.assert_close(first, expected, rtol=0, atol=1e-13)


def test_memory_is_used_again_by_the_same_thread_only() -> None:
    like, used = torch.zeros(1, dtype=torch.float64), Scratch()
    place = used.take((7, 5, 3), like).data_ptr()
    used.give_back()
    elsewhere: list[int] = []
    thread = threading.Thread(target=lambda: elsewhere.append(Scratch().take((7, 5, 3), like).data_ptr()))
    thread.start()
    thread.join()
    assert elsewhere != [place]
    assert Scratch().take((7, 5, 3), like).data_ptr() == place
    assert Scratch().take((7, 5, 3), like).data_ptr() != place


def test_what_is_kept_is_bounded_and_what_is_too_large_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scratch, "_KEPT", scratch._Kept())
    monkeypatch.setattr(scratch, "MOST_BYTES", 1000)
    like = torch.zeros(1)
    for n in range(1, 60):
        used = Scratch()
        used.take((n, 10), like)
        used.give_back()
        kept = [t for free in scratch._KEPT.tensors.values() for t in free]
        assert sum(t.nbytes for t in kept) == scratch._KEPT.bytes <= 1000


def test_memory_taken_within_inference_mode_can_be_written_outside_of_it() -> None:
    chain = tanh_chain(50, rows=2)
    expected = loop(chain).trajectory[0]
    with torch.inference_mode():
        torch.testing.assert_close(blocks(chain, Stop([1e-14]), 9).trajectory[0], expected, rtol=0, atol=1e-13)
    torch.testing.assert_close(blocks(chain, Stop([1e-14]), 9).trajectory[0], expected, rtol=0, atol=1e-13)
