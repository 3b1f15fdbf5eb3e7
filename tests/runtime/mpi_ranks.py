"""One rank under ``mpirun``: the conformance program, a tile loop in place, and a peer that does not come."""

from __future__ import annotations

import json
import sys
from types import SimpleNamespace
from typing import Any, cast

import torch
from transport_conformance import conformance

from hocket.runtime.communicator import Communicator, Wire
from hocket.runtime.executors.tile_runner import TileRunner
from hocket.runtime.mesh import Mesh
from hocket.runtime.templates import Site
from hocket.runtime.tile_loop import Call, Cut, Read, Result, TileLoop
from hocket.runtime.transports.mpi import MpiTransport
from hocket.runtime.transports.transport import TransportTimeout


def scattered(t: MpiTransport) -> list[float]:
    """A product whose rows are added up in the memory of their owners; integers, so that every sum is exact."""
    mesh, axis = t.mesh, t.mesh.names[0]
    parts = mesh.axis_size(axis)
    rows, width = 4 * parts, 3
    calls = (Call("aten.mm.default", [{"slot": 0}, {"slot": 1}], {}, (2,), spread=False),)
    reads = (Read("tiled", Cut(0)), Read("whole"))
    loop = TileLoop(axis, parts, rows, 2, (), reads, calls, (Result("reduce_scatter", 2, Cut(0), "sum"),))
    runner = TileRunner(cast(Communicator, SimpleNamespace(wire=Wire())), t)
    run = runner.bind(loop, Site.of(mesh, t.rank))
    left = torch.arange(rows * width, dtype=torch.float64).view(rows, width) * (t.rank + 1)
    for _ in range(3):  # buffers and signals are used again
        (found,) = run(left, torch.eye(width, dtype=torch.float64))
    return cast(list[float], found.flatten().tolist())


def main(folder: str, mesh: str, views: str) -> None:
    """Facts of this rank into ``folder``."""
    torch.set_num_threads(1)
    t = MpiTransport(Mesh.parse(mesh), timeout=60.0, views=views == "views")
    facts: dict[str, Any] = {axis: conformance(t, axis) for axis in t.mesh.names}
    looped = scattered(t) if views == "views" else []
    late = ""
    if t.rank == 0:
        try:
            t.wait(1, 11, 1, t.mesh.names[-1], timeout=0.05)
        except TransportTimeout as error:
            late = str(error)
    t.close()
    with open(f"{folder}/rank{t.rank}.json", "w") as file:
        json.dump({"facts": facts, "late": late, "looped": looped, "can": [c.value for c in t.capabilities]}, file)


if __name__ == "__main__":
    main(*sys.argv[1:])
