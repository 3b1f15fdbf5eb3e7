"""However the user's process ends, and whatever kind of script it is, no rank survives it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
from local_support import alive, wait_gone, write_hook

HERE = Path(__file__).parent

HEAD = f"""
import os, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # whoever starts the tests in the background may have it ignored
sys.path.insert(0, {str(HERE)!r})
import torch
torch.set_num_threads(1)
from local_support import mlp, mlp_bindings, mlp_tensors
from hocket.runtime.engines.local import LocalEngine, Limits
from hocket.runtime.launcher import launcher
from hocket.runtime.mesh import Mesh
mesh = Mesh.parse("tp=2")
"""

PARALLEL = "torch.set_num_threads(2)\n(torch.ones(600, 600) @ torch.ones(600, 600)).sum()\n"

STEP = """
engine = LocalEngine(mesh, threads=1, rank_hook=sys.argv[1] if len(sys.argv) > 1 else None)
print(launcher().pid, *engine.pids, flush=True)
x, up, down = mlp_tensors()
handle = engine.load(mlp(mesh), mlp_bindings(up, down))
ticket, (y,) = engine.forward(handle, [x])
print("result", torch.allclose(y, torch.relu(x @ up) @ down, atol=1e-5), flush=True)
"""


def start(tmp_path, body, *arguments):
    script = tmp_path / "script.py"  # no __main__ guard, on purpose
    script.write_text(HEAD + textwrap.dedent(body))
    return subprocess.Popen(
        [sys.executable, str(script), *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        cwd=tmp_path,
    )


def end(process, seconds=120):
    try:
        return process.communicate(timeout=seconds)
    finally:
        if process.poll() is None:
            process.kill()
            process.communicate()


def pids_of(line):
    return [int(word) for word in line.split()]


def test_a_script_without_main_guard_runs_once_and_leaves_nothing(tmp_path):
    """It runs parallel ops first, too: forking such a process would deadlock, but the ranks are not its forks."""
    before = set(os.listdir("/dev/shm")), set(os.listdir("/tmp"))
    process = start(tmp_path, "print('top', flush=True)\n" + PARALLEL + STEP)
    out, err = end(process)
    assert process.returncode == 0, err
    top, pids, result = out.splitlines()
    assert (top, result) == ("top", "result True")
    wait_gone(pids_of(pids))
    assert set(os.listdir("/dev/shm")) <= before[0]
    assert not [name for name in set(os.listdir("/tmp")) - before[1] if "hocket" in name]
    assert err == ""


@pytest.mark.parametrize("where", ["in a collective", "idle"])
def test_kill_9_of_the_controller_ends_every_rank(tmp_path, where):
    hook = [str(write_hook(tmp_path, fault="sleep", index=2))] if where == "in a collective" else []
    process = start(tmp_path, STEP + "import time; time.sleep(1000)", *hook)
    try:
        pids = pids_of(process.stdout.readline())
        if where == "idle":
            assert process.stdout.readline() == "result True\n"
        else:
            time.sleep(0.5)
        assert alive(pids) == pids
        os.kill(process.pid, signal.SIGKILL)
        wait_gone(pids, 2.0)
    finally:
        end(process)


def test_ctrl_c_ends_the_ranks_and_raises_keyboard_interrupt(tmp_path):
    hook = write_hook(tmp_path, fault="sleep", index=2)
    body = STEP.replace(
        "ticket, (y,) = engine.forward(handle, [x])",
        """
try:
    print("stepping", flush=True)
    engine.forward(handle, [x])
except KeyboardInterrupt:
    from local_support import alive
    print("interrupted", engine.pids, torch.isfinite(up).all().item(), flush=True)
    sys.exit(7)
""",
    )
    process = start(tmp_path, body, str(hook))
    try:
        pids = pids_of(process.stdout.readline())
        assert process.stdout.readline() == "stepping\n"
        time.sleep(0.5)
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to the whole foreground group
        out, err = end(process)
    finally:
        end(process)
    assert process.returncode == 7, err
    assert "interrupted [] True" in out
    wait_gone(pids)


@pytest.mark.slow
def test_an_uncaught_exception_in_the_script_ends_everything(tmp_path):
    process = start(tmp_path, STEP + "raise ValueError('of the user')")
    out, err = end(process)
    assert process.returncode == 1
    assert err.strip().endswith("ValueError: of the user")
    wait_gone(pids_of(out.splitlines()[0]))
