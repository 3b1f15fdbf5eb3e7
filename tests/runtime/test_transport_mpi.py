"""The transport over MPI, on real ranks that ``mpirun`` starts; skipped where there is no MPI."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transport_conformance import check

from hocket.runtime.errors import InputError
from hocket.runtime.mesh import Mesh
from hocket.runtime.transports import mpi

HERE = Path(__file__).resolve().parent
needs_mpi = pytest.mark.skipif(
    bool(mpi.why_unavailable()) or shutil.which("mpirun") is None, reason=mpi.why_unavailable() or "mpirun is not installed"
)


def ranks(folder: Path, mesh: str, views: str) -> list[dict]:
    """What every rank has found."""
    count = Mesh.parse(mesh).size
    as_root = ["--allow-run-as-root"] if os.geteuid() == 0 else []
    command = [
        "mpirun",
        *as_root,
        "--oversubscribe",
        "-n",
        str(count),
        sys.executable,
        str(HERE / "mpi_ranks.py"),
        str(folder),
        mesh,
    ]
    process = subprocess.Popen([*command, views], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    try:
        _, errors = process.communicate(timeout=200)
    except subprocess.TimeoutExpired:
        process.terminate()  # mpirun then ends its ranks
        _, errors = process.communicate(timeout=30)
    assert process.returncode == 0, errors[-2000:]
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(count)]


@needs_mpi
@pytest.mark.parametrize("views", ["views", pytest.param("network", marks=pytest.mark.slow)])
def test_mpi_ranks_do_what_every_transport_does(tmp_path: Path, views: str) -> None:
    found = ranks(tmp_path, "d=2", views)
    check([one["facts"]["d"] for one in found])
    assert [one["can"] for one in found] == [["remote view"] * (views == "views")] * 2
    assert "slot 11" in found[0]["late"]
    if views == "views":  # a tile loop, in place
        whole = torch.arange(24, dtype=torch.float64).view(8, 3) * 3
        assert [one["looped"] for one in found] == [whole[:4].flatten().tolist(), whole[4:].flatten().tolist()]


def test_without_mpi4py_there_is_one_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mpi.importlib.util, "find_spec", lambda _name: None)
    assert "pip install hocket[mpi]" in mpi.why_unavailable()
    with pytest.raises(InputError, match=r"pip install hocket\[mpi\]"):
        mpi.MpiTransport(Mesh.parse("d=2"))
