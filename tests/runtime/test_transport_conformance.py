"""Every transport runs the same program and finds the same facts (MPI and CUDA have test files of their own)."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from gloo_pair import run_pair, world_of_two
from thread_world import thread_world
from transport_conformance import check, conformance

from hocket.runtime.exchange import Exchange
from hocket.runtime.gloo import GlooCommunicator
from hocket.runtime.mesh import Mesh
from hocket.runtime.transports.link import LinkSpec, LinkTransport
from hocket.runtime.transports.shm import ShmTransport
from hocket.runtime.transports.sim import simulate
from hocket.runtime.transports.transport import TransportError


@pytest.mark.parametrize("parts", [2, 3])
@pytest.mark.parametrize("link", ["", "link:50us,1GB/s"])
def test_ranks_in_shared_memory_and_over_an_emulated_link_conform(parts: int, link: str) -> None:
    def work(exchange: Exchange) -> object:
        shm = ShmTransport(exchange, 60.0)
        return conformance(LinkTransport(shm, LinkSpec.parse(link)) if link else shm)

    check(thread_world(Mesh.parse(f"d={parts}"), work, TransportError))  # type: ignore[arg-type]


@pytest.mark.parametrize("seed", range(3))
def test_simulated_ranks_conform_in_any_order(seed: int) -> None:
    check(simulate(Mesh.parse("d=3"), lambda t: conformance(t, timed=False), seed))


def gloo_rank(rank: int, folder: str) -> None:
    """One rank of a gloo world."""
    with world_of_two(rank, folder):
        torch.save(conformance(GlooCommunicator(Mesh.parse("d=2"), timeout=60).transport), f"{folder}/rank{rank}.pt")


@pytest.mark.slow
def test_ranks_over_gloo_conform(tmp_path: Path) -> None:
    check(run_pair(gloo_rank, tmp_path))
