"""Every way in which a rank can fail reaches the user as one exception that names the culprit, and leaves nothing behind."""

from __future__ import annotations

import gc
import os
import signal
import threading
import time

import pytest
import torch
from local_support import LINE, mlp, mlp_bindings, mlp_tensors, open_files, wait_gone, write_hook

from hocket.runtime.engines.local import Limits, LocalEngine
from hocket.runtime.errors import CollectiveMismatch, RankDied, RankFailed, RankHung, RunError
from hocket.runtime.launcher import launcher
from hocket.runtime.mailbox import SLOTS
from hocket.runtime.memory import default_arena
from hocket.runtime.mesh import Mesh

MESH = Mesh.parse("tp=2")
SHORT = Limits(step=1.0, first=1.0)
BOUND = 4.0
"""Seconds within which every failure must be reported: one of the limits above, and the tear-down."""


@pytest.fixture(scope="module", autouse=True)
def warm():
    LocalEngine(MESH, threads=1).close()


def step(engine, handle, x, backward):
    ticket, _ = engine.forward(handle, [x])
    assert backward, "the fault did not happen"
    engine.backward(handle, ticket, [torch.ones(6, 4)])


def fail(tmp_path, mesh=MESH, limits=SHORT, backward=False, during=None, **fault):
    """Run the MLP with a fault; returns (exception, engine, tensors). Checks what holds for every failure."""
    gc.collect()
    default_arena().trim()
    before = open_files()
    hook = write_hook(tmp_path, **fault) if fault else None
    engine = LocalEngine(mesh, threads=1, limits=limits, rank_hook=hook)
    pids = engine.pids
    x, up, down = mlp_tensors()
    kept = [up.detach().clone(), down.detach().clone()]
    handle = engine.load(mlp(mesh), mlp_bindings(up, down))
    helper = threading.Timer(0.8, during, [pids]) if during else None
    if helper:
        helper.start()
    start = time.monotonic()
    with pytest.raises(RunError) as caught:
        step(engine, handle, x, backward)
    assert time.monotonic() - start < BOUND
    if helper:
        helper.join()
    wait_gone(pids)
    assert torch.equal(up, kept[0])
    assert torch.equal(down, kept[1])
    with pytest.raises(RunError, match="this engine is closed"):
        engine.forward(handle, [x])
    engine.close()
    error = caught.value.with_traceback(None)  # its frames hold tensors, and so shared memory
    error.__context__ = None
    assert "parameters and buffers in your process are intact" in str(error)
    del engine, handle, up, down, x, caught
    gc.collect()
    default_arena().trim()
    assert open_files() <= before, "descriptors leaked"
    return error


def test_exception_in_forward_names_rank_instruction_line_and_remote_traceback(tmp_path):
    error = fail(tmp_path, fault="raise late", index=2)
    assert type(error) is RankFailed
    assert error.rank == 1
    assert "aten.mm.default(%5, %2)" in error.instruction
    assert error.source == LINE
    assert "injected failure" in str(error)
    assert "ValueError: injected failure" in error.remote
    assert "rank 0 waits" in str(error)


def test_exception_in_backward_names_its_instruction(tmp_path):
    error = fail(tmp_path, fault="raise", index=9, backward=True)
    assert type(error) is RankFailed
    assert error.rank == 1
    assert "threshold_backward" in error.instruction
    assert "in backward" in str(error)


@pytest.mark.parametrize("fault", ["memory", "limit"])
def test_running_out_of_memory_is_called_so(tmp_path, fault):
    error = fail(tmp_path, fault=fault, index=1)
    assert type(error) is RankFailed
    assert error.rank == 1
    assert "ran out of memory" in str(error)
    assert "relu" in error.instruction


def test_kill_9_in_compute(tmp_path):
    error = fail(tmp_path, fault="sleep", index=2, limits=Limits(), during=lambda pids: os.kill(pids[1], signal.SIGKILL))
    assert type(error) is RankDied
    assert error.rank == 1
    assert "SIGKILL" in str(error)
    assert "aten.mm.default(%5, %2)" in error.instruction
    assert error.source == LINE


def test_kill_9_in_a_collective(tmp_path):
    error = fail(tmp_path, fault="sleep", rank=0, index=2, limits=Limits(), during=lambda pids: os.kill(pids[1], signal.SIGKILL))
    assert type(error) is RankDied
    assert error.rank == 1
    assert "wait_tensor" in error.instruction or "all_reduce" in error.instruction
    assert "rank 0 is in forward" in str(error)


@pytest.mark.parametrize(("fault", "words"), [("segv", "SIGSEGV"), ("exit", "exited with code 3"), ("kill", "SIGKILL")])
def test_crash_names_the_signal(tmp_path, fault, words):
    error = fail(tmp_path, fault=fault, index=1)
    assert type(error) is RankDied
    assert error.rank == 1
    assert words in str(error)
    if fault == "segv":
        assert "string_at" in error.remote


@pytest.mark.parametrize("letters", [1, SLOTS], ids=["with room for a letter", "with a full box"])
def test_closing_does_not_wait_for_a_rank_that_hangs(tmp_path, letters):
    hook = write_hook(tmp_path, fault="sleep", index=1)
    engine = LocalEngine(MESH, threads=1, limits=Limits(window=2 * SLOTS), rank_hook=hook)
    pids = engine.pids
    x, up, down = mlp_tensors()
    handle = engine.load(mlp(MESH), mlp_bindings(up, down))
    kept = [engine.submit_forward(handle, [x]) for _ in range(letters + 1)]  # the rank took out the first one, and hangs in it
    start = time.monotonic()
    engine.close()
    assert time.monotonic() - start < BOUND
    wait_gone(pids)
    assert not any(step.settled for step in kept)


@pytest.mark.parametrize("fault", ["sleep", "spin"])
def test_hang_inside_an_op_names_where_it_hangs(tmp_path, fault):
    error = fail(tmp_path, fault=fault, index=1)
    assert type(error) is RankHung
    assert error.rank == 1
    assert "relu" in error.instruction
    assert error.source == LINE
    assert "in fault" in error.remote
    assert "rank 0 waits" in str(error)


def test_stopped_process_is_the_culprit_not_those_that_wait_for_it(tmp_path):
    error = fail(tmp_path, fault="stop", index=1)
    assert type(error) is RankHung
    assert error.rank == 1
    assert "stopped by a signal" in str(error)
    assert "relu" in error.instruction


def test_shape_mismatch_between_ranks_is_no_crash(tmp_path):
    edit = [(1, "aten.slice.Tensor", [{"slot": 4}, 0, 0, 2], {})]
    error = fail(tmp_path, edit=edit, limits=Limits())
    assert type(error) is CollectiveMismatch
    assert error.rank == 1
    assert "all_reduce" in error.instruction
    assert error.source == LINE


def test_dtype_mismatch_between_ranks(tmp_path):
    edit = [(2, "aten.zeros.default", [[6, 4]], {"dtype": {"dtype": "float64"}})]
    error = fail(tmp_path, edit=edit, limits=Limits())
    assert type(error) is CollectiveMismatch
    assert error.rank == 1


def test_skipped_collective_is_found_while_the_others_wait(tmp_path):
    edit = [(3, "aten.clone.default", [{"slot": 6}], {}), (4, "aten.clone.default", [{"slot": 7}], {})]
    error = fail(tmp_path, edit=edit, limits=Limits())
    assert type(error) is CollectiveMismatch
    assert error.rank == 1
    assert "skipped" in str(error)


def test_skipped_collective_that_pairs_with_a_later_one(tmp_path):
    edit = [(3, "aten.clone.default", [{"slot": 6}], {}), (4, "aten.clone.default", [{"slot": 7}], {})]
    error = fail(tmp_path, edit=edit, limits=Limits(), mesh=Mesh.parse("dp=2,tp=2"))
    assert type(error) is CollectiveMismatch


@pytest.mark.parametrize("rank", [0, 2, 3])
def test_the_right_rank_of_four_is_named(tmp_path, rank):
    error = fail(tmp_path, fault="raise", index=1, rank=rank, mesh=Mesh.parse("tp=4"))
    assert type(error) is RankFailed
    assert error.rank == rank


def test_death_between_steps_is_reported_by_the_next_call():
    engine = LocalEngine(MESH, threads=1)
    x, up, down = mlp_tensors()
    handle = engine.load(mlp(MESH), mlp_bindings(up, down))
    engine.forward(handle, [x])
    pids = engine.pids
    os.kill(pids[0], signal.SIGKILL)
    time.sleep(0.1)
    with pytest.raises(RankDied, match=r"rank 0 .* SIGKILL"):
        engine.forward(handle, [x])
    wait_gone(pids)


def test_ranks_end_with_the_process_that_starts_them():
    engine = LocalEngine(MESH, threads=1)
    pids = engine.pids
    x, up, down = mlp_tensors()
    handle = engine.load(mlp(MESH), mlp_bindings(up, down))
    os.kill(launcher().pid, signal.SIGKILL)
    wait_gone(pids)
    with pytest.raises(RankDied):
        engine.forward(handle, [x])
    with LocalEngine(MESH, threads=1) as again:  # a new one starts it again
        assert torch.allclose(
            again.forward(again.load(mlp(MESH), mlp_bindings(up, down)), [x])[1][0], torch.relu(x @ up) @ down, atol=1e-5
        )


def test_a_failure_at_start_is_one_error(tmp_path):
    hook = tmp_path / "broken.py"
    hook.write_text("def install(worker):\n    if worker.rank == 1:\n        raise ValueError('no luck')\n")
    before = open_files()
    with pytest.raises(RankFailed, match="rank 1 raised ValueError starting: no luck"):
        LocalEngine(MESH, threads=1, rank_hook=hook)
    assert open_files() <= before
