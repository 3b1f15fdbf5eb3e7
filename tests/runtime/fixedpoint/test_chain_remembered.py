"""Measurements on disk: read back as they were written, and never worse than none."""

import json
import logging
import math
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_chain_solvers import tanh_chain

from hocket.runtime.fixedpoint import decide, remembered
from hocket.runtime.fixedpoint.how import How
from hocket.runtime.fixedpoint.op import run_solver
from hocket.runtime.fixedpoint.remembered import Remembered, recall, remember
from hocket.runtime.fixedpoint.solvers import loop

SOME = Remembered({1: 1e-6, 16: 4e-6}, 24.0, 63, "memory of 24 steps; tried the loop 4.00 ms")
MERGES = st.one_of(st.just(math.inf), st.floats(0, 1e6))


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.builds(Remembered, st.dictionaries(st.integers(1, 128), st.floats(1e-9, 1)), MERGES, st.integers(-1, 500), st.text()))
def test_what_is_remembered_is_read_back(cache: Path, what: Remembered) -> None:
    remember("chain", what)
    assert recall("chain") == what
    assert recall("another chain") is None


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[1]",
        '{"format": 0}',
        b"\xff\xfe",
        json.dumps({"format": 1, **SOME._asdict(), "costs": {"1": -1.0}}),
        json.dumps({"format": 1, **SOME._asdict(), "window": -7}),
        json.dumps({"format": 1, **SOME._asdict(), "merge": float("nan")}),
    ],
)
def test_a_file_that_is_none_is_ignored_with_one_line(cache: Path, caplog: pytest.LogCaptureFixture, text: str | bytes) -> None:
    remember("chain", SOME)
    (file,) = cache.iterdir()
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    with caplog.at_level(logging.WARNING, logger="hocket"):
        assert recall("chain") is None
    assert [str(file) in record.getMessage() for record in caplog.records] == [True]
    remember("chain", SOME)
    assert recall("chain") == SOME


def test_only_so_many_files_are_kept(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remembered, "MOST_FILES", 5)
    for i in range(12):
        remember(i, SOME)
    assert len(list(cache.iterdir())) <= 5


def test_writers_at_the_same_time_leave_whole_files(cache: Path) -> None:
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda i: remember(i % 3, SOME._replace(window=i)), range(60)))
    assert all(recall(key) is not None for key in range(3))
    assert len(list(cache.iterdir())) == 3


def test_nothing_is_kept_where_that_is_switched_off_or_impossible(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(remembered.SWITCH, "off")
    remember("chain", SOME)
    assert recall("chain") is None
    assert not cache.exists()
    monkeypatch.delenv(remembered.SWITCH)
    cache.parent.mkdir(parents=True)
    cache.write_text("a file where the folder should be")
    remember("chain", SOME)
    assert recall("chain") is None


def test_a_second_process_starts_with_what_the_first_has_chosen() -> None:
    chain, how = tanh_chain(200, rows=1), How("auto")
    decide.forget()
    for _ in range(decide.SETTLING):
        run_solver(chain, how)
    first = decide.knowledge(chain, how)
    decide.forget()  # as a new process
    found = run_solver(chain, how)
    second = decide.knowledge(chain, how)
    assert torch.equal(found.trajectory[0], loop(chain).trajectory[0])
    assert not second.trials
    assert (second.window, second.costs) == (first.window, first.costs)
    assert "earlier process" in second.reason


@pytest.mark.parametrize(("window", "is_taken"), [(0, True), (23, True), (-1, False), (3, False), (400, False)])
def test_a_window_between_the_first_ones_is_taken_and_one_that_cannot_run_is_not(window: int, is_taken: bool) -> None:
    chain, how = tanh_chain(400, rows=1), How("auto")
    decide.forget()
    run_solver(chain, how)
    merge = decide.knowledge(chain, how).merge
    remember(decide.key_of(chain, how), SOME._replace(merge=merge, window=window))
    decide.forget()
    run_solver(chain, how)
    known = decide.knowledge(chain, how)
    assert bool(known.trials) != is_taken
    assert known.window == (window if is_taken else 0)


def test_a_choice_for_another_memory_is_tried_anew() -> None:
    chain, how = tanh_chain(400, rows=1), How("auto")
    remember(decide.key_of(chain, how), SOME._replace(merge=300.0))
    decide.forget()
    run_solver(chain, how)
    known = decide.knowledge(chain, how)
    assert known.trials
    assert known.costs == SOME.costs
