"""Collectives between two real ranks: in shared memory, as local ranks do them, beside gloo."""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path

import step_exchange_rank
from common import Row, Sample, progress, versus

from hocket.runtime.engines.local import LocalEngine
from hocket.runtime.mesh import Mesh

CLAIM = "collectives of 2 ranks"


def rows() -> list[Row]:
    """Every collective at every size; times of rank 0."""
    progress("exchange: collectives in shared memory and over gloo")
    with tempfile.TemporaryDirectory() as folder:
        hook = Path(folder) / "hook.py"
        shutil.copy(step_exchange_rank.__file__, hook)
        LocalEngine(Mesh.parse("d=2"), threads=1, rank_hook=hook).close()
        times = json.loads(hook.with_suffix(".0.json").read_text())
    found = []
    for case, measured in times.items():
        name, nbytes = case.split()
        ours, theirs = Sample(tuple(measured["shm"])), Sample(tuple(measured["gloo"]))
        found.append(versus(CLAIM, f"{name}, {int(nbytes) >> 10:,} KiB, shared memory vs gloo", ours, "gloo", theirs))
    return found
