"""The gloo transport between two real processes does what the shared-memory one does."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from gloo_pair import run_pair, world_of_two

from hocket.runtime.gloo import GlooCommunicator
from hocket.runtime.mesh import Mesh
from hocket.runtime.transports.transport import Capability, TransportError, TransportTimeout


def rank_main(rank: int, folder: str) -> None:
    """One rank: everything the protocol has, results into a file."""
    with world_of_two(rank, folder):
        torch.save(_everything(rank), f"{folder}/rank{rank}.pt")


def _everything(rank: int) -> dict[str, object]:
    t = GlooCommunicator(Mesh.parse("d=2"), timeout=60).transport
    other, found = 1 - rank, {}
    buffer = t.symmetric("x", (4, 3), torch.float32, "d")
    sums = []
    for epoch in range(1, 6):
        t.put(buffer, other, torch.full((2, 3), float(epoch + rank)), row=2 * rank)
        t.accumulate(buffer, other, torch.ones(1, 3), row=2 * rank + 1)
        t.put(buffer, rank, torch.full((2, 3), float(epoch)), row=2 * rank)
        t.signal(other, 0, epoch, "d")
        t.wait(other, 0, epoch, "d")
        sums.append(float(buffer.local.sum()))
        t.barrier("d")
    found["sums"] = sums
    found["got"] = t.get(buffer, other, torch.empty(1, 3), row=2 * rank + 1).tolist()
    t.barrier("d")
    sending = [t.isend(torch.full((5,), float(10 * rank + i)), other, i, "d") for i in range(3)]
    found["messages"] = [float(t.irecv(torch.empty(5), other, i, "d").wait()[4]) for i in (2, 0, 1)]
    for transfer in sending:
        transfer.wait()
    found["errors"] = []
    for action in (
        lambda: t.wait(other, 9, 1, "d", timeout=0.1),
        lambda: buffer.at(other),
        lambda: t.symmetric("y", (1 + rank,), torch.float32, "d"),
    ):
        try:
            action()
        except TransportError as error:
            found["errors"].append((type(error).__name__, str(error)))
    t.barrier("d")
    t.release(buffer)
    t.close()
    try:
        t.wait(other, 9, 1, "d", timeout=10)
    except TransportError as error:
        found["errors"].append((type(error).__name__, str(error)))
    return found


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    return run_pair(rank_main, Path(tmp_path_factory.mktemp("gloo_transport")))


def test_puts_and_sums_are_there_after_the_signal(results: list[dict]) -> None:
    for rank in range(2):
        assert results[rank]["sums"] == [6.0 * (epoch + 1 - rank) + 3 + 6 * epoch for epoch in range(1, 6)]


def test_rows_of_a_peer_can_be_read_and_messages_find_their_tags(results: list[dict]) -> None:
    assert [found["got"] for found in results] == [[[6.0] * 3], [[7.0] * 3]]
    assert [found["messages"] for found in results] == [[12.0, 10.0, 11.0], [2.0, 0.0, 1.0]]


def test_every_failure_is_one_named_error(results: list[dict]) -> None:
    for rank, found in enumerate(results):
        kinds = [kind for kind, _ in found["errors"]]
        texts = [text for _, text in found["errors"]]
        assert kinds == [TransportTimeout.__name__, "TransportError", "TransportError", "TransportError"]
        assert f"rank {1 - rank} to signal 1 in slot 9" in texts[0]
        assert "no view" in texts[1]
        assert "another buffer" in texts[2]
        assert "it has closed" in texts[3]


def test_it_promises_no_views() -> None:
    from hocket.runtime.transports.gloo import GlooTransport

    assert Capability.REMOTE_VIEW not in GlooTransport.capabilities
