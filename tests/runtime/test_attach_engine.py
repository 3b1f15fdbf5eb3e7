"""Under a launcher each process finds its place, and the world computes what one process would."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from local_support import mlp, mlp_bindings, mlp_tensors

from hocket.runtime.engines.attach import AttachEngine
from hocket.runtime.errors import InputError, RunError
from hocket.runtime.mesh import Mesh
from hocket.runtime.place import Place, find_place, first_host

SCRIPT = Path(__file__).with_name("attach_script.py")
LAUNCHER_WORDS = ("RANK", "WORLD", "SLURM", "MASTER", "OMPI", "TORCHELASTIC")


def clean_environment():
    kept = {k: v for k, v in os.environ.items() if not any(word in k for word in LAUNCHER_WORDS)}
    return {**kept, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}


def finish(processes, seconds=150):
    """Outputs of processes that must end well in time; kills their sessions otherwise."""
    try:
        outputs = [p.communicate(timeout=seconds) for p in processes]
    finally:
        for p in processes:
            if p.poll() is None:
                os.killpg(p.pid, signal.SIGKILL)
    assert all(p.returncode == 0 for p in processes), "\n".join(err for _, err in outputs)
    return "\n".join(out for out, _ in outputs)


def start(command, environment):
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )


def check_what_ranks_said(output):
    said = [json.loads(line[line.index("{") :]) for line in output.splitlines() if '"rank"' in line]
    assert sorted(s["rank"] for s in said) == [0, 1]
    for one in said:
        assert one["none"]
        assert one["bytes"] == 4 * (6 * 4 + 6 * 8)
        assert "saved values" in one["twice"]
        assert f"expected float32[8, 5] on rank {one['rank']}" in one["whole"]
        assert one["count"] == [1.0] * 3
        assert one["late"] == [0.0] * 3
        assert "on rank 1" in one["mismatch"]
        assert not one["left"]


def test_two_ranks_under_torchrun():
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(SCRIPT)]
    check_what_ranks_said(finish([start(command, clean_environment())]))


@pytest.mark.slow
def test_two_ranks_under_slurm_variables():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    slurm = {"SLURM_NTASKS": "2", "SLURM_JOB_NODELIST": "localhost", "MASTER_PORT": str(port)}
    environments = [{**clean_environment(), **slurm, "SLURM_PROCID": str(r), "SLURM_LOCALID": str(r)} for r in range(2)]
    check_what_ranks_said(finish([start([sys.executable, str(SCRIPT)], e) for e in environments]))


@pytest.fixture
def no_launcher(monkeypatch):
    for name in list(os.environ):
        if any(word in name for word in LAUNCHER_WORDS):
            monkeypatch.delenv(name)
    return monkeypatch


def test_a_mesh_of_one_needs_no_launcher(no_launcher):
    mesh = Mesh.parse("tp=1")
    x, up, down = mlp_tensors()
    with AttachEngine(mesh, device="cpu") as engine:
        handle = engine.load(mlp(mesh), mlp_bindings(up, down))
        ticket, (y,) = engine.forward(handle, [x])
        torch.testing.assert_close(y, (torch.relu(x @ up) @ down).detach())
        assert not any(g.any() for g in engine.backward(handle, ticket, [None])[:3])
    with pytest.raises(RunError, match="closed"):
        engine.forward(handle, [x])


def test_a_world_of_the_wrong_size_says_what_to_run(no_launcher):
    with pytest.raises(InputError, match=r"mesh tp=2 needs 2 ranks, found this process alone; run: torchrun --nproc-per-node 2"):
        AttachEngine(Mesh.parse("tp=2"))
    no_launcher.setenv("RANK", "0")
    no_launcher.setenv("WORLD_SIZE", "3")
    no_launcher.setenv("MASTER_ADDR", "localhost")
    with pytest.raises(InputError, match="found 3 started by torchrun"):
        AttachEngine(Mesh.parse("tp=2"))


def test_places_of_the_launchers():
    torchrun = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_ADDR": "a", "MASTER_PORT": "77"}
    assert find_place(torchrun) == Place(3, 4, 1, "a", 77, "torchrun")
    slurm = {"SLURM_PROCID": "5", "SLURM_NTASKS": "8", "SLURM_LOCALID": "1", "SLURM_JOB_NODELIST": "gpu[007-009,12]"}
    assert find_place({**slurm, "SLURM_JOB_ID": "40001"}) == Place(5, 8, 1, "gpu007", 20001, "SLURM")
    mpi = {"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "2", "MASTER_ADDR": "b", "MASTER_PORT": "1"}
    assert find_place(mpi).launcher == "Open MPI"
    assert find_place({}).world == 1
    with pytest.raises(InputError, match="MASTER_ADDR"):
        find_place({"RANK": "0", "WORLD_SIZE": "2"})
    with pytest.raises(InputError, match="must be a number, found 'x'"):
        find_place({**torchrun, "RANK": "x"})
    with pytest.raises(InputError, match="must be below"):
        find_place({**torchrun, "RANK": "4"})


@pytest.mark.parametrize(
    ("nodes", "first"),
    [("node1", "node1"), ("node1,node2", "node1"), ("gpu[007-009,12],login", "gpu007"), ("r[3,5]n-x", "r3n-x")],
)
def test_first_host_of_a_slurm_list(nodes, first):
    assert first_host(nodes) == first
