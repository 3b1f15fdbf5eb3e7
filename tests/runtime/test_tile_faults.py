"""Tile loops that cannot go on: one error that says which rank waits for what, in time, and nothing left behind."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from local_support import wait_gone

from hocket.compiler.cost.tile_timing import repeated_loop
from hocket.compiler.emit import emit
from hocket.runtime.communicator import Wire
from hocket.runtime.engines.local import Limits, LocalEngine
from hocket.runtime.errors import RankHung, RunError
from hocket.runtime.exchange import SPIN_CROWDED, Exchange, exchange_bytes
from hocket.runtime.executors.tile_runner import TileRunner
from hocket.runtime.mesh import Mesh
from hocket.runtime.templates import Site
from hocket.runtime.tile_loop import Call, Cut, Read, Result, TileLoop
from hocket.runtime.transports.link import LinkSpec, LinkTransport
from hocket.runtime.transports.shm import ShmTransport
from hocket.runtime.transports.transport import TransportError

MESH = Mesh((("d", 2),))
CALLS = (Call("aten.mm.default", [{"slot": 0}, {"slot": 1}], {}, (2,), False),)
READS = (Read("tiled", Cut(0)), Read("whole"))
LOOP = TileLoop("d", 2, 8, 2, (), READS, CALLS, (Result("reduce_scatter", 2, Cut(0), "sum"),))


def world(work: Callable[[TileRunner, int], object], *, link: bool = False, timeout: float = 1.0) -> list[object]:
    """Run ``work`` on two ranks, a thread each; errors are results."""
    fd = os.memfd_create("test")
    os.ftruncate(fd, exchange_bytes(MESH))
    results: list[object] = [None, None]

    def run(rank: int) -> None:
        try:
            transport: ShmTransport | LinkTransport = ShmTransport(Exchange(os.dup(fd), MESH, rank, SPIN_CROWDED), timeout)
            if link:
                transport = LinkTransport(transport, LinkSpec(1e-4, 1e9))  # type: ignore[arg-type]
            results[rank] = work(TileRunner(SimpleNamespace(wire=Wire()), transport), rank)  # type: ignore[arg-type]
        except Exception as error:
            results[rank] = error

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    os.close(fd)
    return results


def run_loop(runner: TileRunner, loop: TileLoop) -> torch.Tensor:
    return runner.bind(loop, Site.of(MESH, 0))(torch.ones(8, 3), torch.ones(3, 4))[0]


@pytest.mark.parametrize("link", [False, True])
def test_ranks_that_agree_get_their_numbers(link: bool) -> None:
    def work(runner: TileRunner, rank: int) -> list[float]:
        return [float(run_loop(runner, replace(LOOP, eager=eager)).sum()) for eager in (False, True, False)]

    assert world(work, link=link, timeout=60.0) == [[96.0] * 3] * 2


def test_ranks_with_different_loops_are_told() -> None:
    def work(runner: TileRunner, rank: int) -> object:
        return run_loop(runner, replace(LOOP, tiles=1 + rank))

    found = world(work)
    assert all(isinstance(error, TransportError | RankHung) for error in found), found
    assert any("a tile loop of 2 x 1 tiles over 8 rows" in str(error) for error in found)


def test_a_rank_that_never_begins_is_named() -> None:
    def work(runner: TileRunner, rank: int) -> object:
        return run_loop(runner, LOOP) if rank == 0 else None

    error, _ = world(work)
    assert isinstance(error, RankHung)
    assert "rank 1" in str(error)


def test_a_rank_that_stops_half_way_is_named_with_its_tile() -> None:
    """Both have run the loop before; in the second the peer does not come."""

    def work(runner: TileRunner, rank: int) -> object:
        run = runner.bind(LOOP, Site.of(MESH, 0))
        run(torch.ones(8, 3), torch.ones(3, 4))
        return run(torch.ones(8, 3), torch.ones(3, 4)) if rank == 0 else None

    error, _ = world(work)
    assert isinstance(error, RankHung)
    assert "chunk 0, tile 0" in str(error)


def test_no_memory_for_the_buffer_is_one_error_that_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hocket.runtime.exchange.available_bytes", lambda: 1 << 10)
    for error in world(lambda runner, _: run_loop(runner, LOOP)):
        assert isinstance(error, TransportError)
        assert "no shared memory for buffer 'a tile loop of 2 x 2 tiles" in str(error)


NO_MEMORY = """
import hocket.runtime.exchange
def install(worker):
    if worker.rank == 1:
        hocket.runtime.exchange.available_bytes = lambda: 0
"""


def test_an_engine_whose_ranks_find_no_memory_ends_in_one_error(tmp_path: Path) -> None:
    hook = tmp_path / "hook.py"
    hook.write_text(NO_MEMORY)
    with LocalEngine(MESH, threads=1, limits=Limits(step=5.0, first=10.0), rank_hook=hook) as engine:
        pids = engine.pids
        handle = engine.load(emit(repeated_loop(2, 1, engine)), {})
        start = time.monotonic()
        with pytest.raises(RunError, match="no shared memory for buffer"):
            engine.forward(handle, [torch.ones(64, 16), torch.ones(16, 16), torch.zeros(256, 256)])
        assert time.monotonic() - start < 30.0
    wait_gone(pids, 30.0)
