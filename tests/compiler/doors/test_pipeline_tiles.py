"""Tile loops inside the stages of a pipeline: proven part by part, run by simulated and by real ranks."""

from __future__ import annotations

import copy
import os
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import hocket
from hocket.compiler.doors.module import session_of
from hocket.compiler.tiles import is_tile_loop
from hocket.runtime.communicator import Communicator
from hocket.runtime.exchange import Exchange, exchange_bytes
from hocket.runtime.executors.tile_runner import TileRunner
from hocket.runtime.inner import InnerCommunicator
from hocket.runtime.mesh import Mesh
from hocket.runtime.transports.link import LinkSpec, LinkTransport
from hocket.runtime.transports.shm import ShmTransport

ALWAYS = hocket.OverlapTiles(least_gain=-1e9)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.relu(self.up(x)))


def staged(model: nn.Module, mesh: str, engine: str, overlap: hocket.OverlapTiles):
    pipeline = hocket.PipelineParallel(microbatches=2, loss=lambda y: y.square().mean())
    return hocket.parallelize(model, mesh, engine=engine, tactics=[pipeline, hocket.TensorParallel("tp"), overlap])


@pytest.mark.parametrize("engine", ["sim", pytest.param("local", marks=pytest.mark.slow)])
def test_a_pipeline_with_loops_in_its_stages_trains_like_the_plain_model(engine: str) -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(Block(), Block()), torch.randn(8, 16)
    twin = copy.deepcopy(model)
    with staged(model, "pp=2,tp=2", engine, ALWAYS) as stages:
        for _ in range(3):  # buffers and signals are used again, by the training and by the forward alone in turns
            loss = stages.train_step(x)
            wanted = twin(x).square().mean()
            wanted.backward()
            torch.testing.assert_close(loss, wanted.detach())
            text = " ".join(str(stages.explain()).split())
            with torch.no_grad():
                torch.testing.assert_close(stages(x), twin(x))
    assert "in one loop" in text
    for (name, mine), theirs in zip(model.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, msg=name)


def test_every_part_with_a_loop_is_proven_and_small_layers_are_kept_for_a_reason() -> None:
    model, x = nn.Sequential(Block(), Block()), torch.randn(8, 16)
    for overlap, fused in ((ALWAYS, True), (hocket.OverlapTiles(), False)):
        with staged(model, "pp=2,tp=2", "sim", overlap) as stages:
            stages.train_step(x)
            made = session_of(stages).compiled
            parts = [part for stage in made.pipeline.stages for part in stage.parts]
            looped = [part for part in parts if any(map(is_tile_loop, part.program.nodes))]
            assert bool(looped) is fused
            proofs = [record for record in made.records if record.name == "tiles"]
            assert len(proofs) == len(looped)
            assert all(str(record.verdict.status) == "equal" for record in proofs)
            said = [d for d in made.joined.decisions if d.by == "tiles"]
            assert any(d.applied for d in said) is fused
            assert all(d.reason.startswith("stage ") for d in said)
            assert str(made.prove_again("ring").status) == "equal"


def test_stages_of_one_rank_say_that_nothing_travels_inside_them() -> None:
    model, x = nn.Sequential(Block(), Block()), torch.randn(8, 16)
    pipeline = hocket.PipelineParallel(microbatches=2, loss=lambda y: y.square().mean())
    with hocket.parallelize(model, "pp=2", engine="sim", tactics=[pipeline, ALWAYS]) as stages:
        stages.train_step(x)
        (said,) = [d for d in session_of(stages).compiled.joined.decisions if d.by == "tiles"]
    assert not said.applied
    assert "every stage has one rank" in said.reason


def test_all_programs_over_one_transport_count_their_loops_together() -> None:
    """Signals of a slot only grow: were every pipeline to count for itself, the second would take old signals for new ones."""

    class Memory:
        """A transport, as far as runners look at it here."""

    class Outer:
        mesh, rank, wire = Mesh.parse("pp=1,tp=2"), 0, None
        peer_memory = Memory()

    outer: Communicator = Outer()  # type: ignore[assignment]
    first, second = (TileRunner.of(InnerCommunicator(outer, Mesh.parse("tp=2"))) for _ in range(2))
    assert first.axes is second.axes is TileRunner.of(outer).axes


def test_a_link_counts_the_loops_of_the_shared_memory_below_it() -> None:
    fd = os.memfd_create("test")
    mesh = Mesh.parse("tp=1")
    os.ftruncate(fd, exchange_bytes(mesh))
    shm = ShmTransport(Exchange(fd, mesh, 0), 1.0)
    link = LinkTransport(shm, LinkSpec(1e-5, 1e9))
    runners = [TileRunner.of(SimpleNamespace(peer_memory=transport)) for transport in (shm, link)]  # type: ignore[arg-type]
    assert runners[0].axes is runners[1].axes
