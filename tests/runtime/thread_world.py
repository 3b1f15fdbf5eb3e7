"""Ranks that share memory, as threads of this process."""

import os
import threading
from collections.abc import Callable

import torch

from hocket.runtime.exchange import SPIN_CROWDED, Exchange, exchange_bytes
from hocket.runtime.mesh import Mesh


def thread_world(mesh: Mesh, work: Callable[[Exchange], object], expected: type[Exception]) -> list[object]:
    """What ``work`` gives on every rank; exceptions of the type ``expected`` are results, others are raised."""
    fd = os.memfd_create("test")
    os.ftruncate(fd, exchange_bytes(mesh))
    results: list[object] = [None] * mesh.size

    def run(rank: int) -> None:
        try:
            with torch.no_grad():
                results[rank] = work(Exchange(os.dup(fd), mesh, rank, SPIN_CROWDED))
        except Exception as error:
            results[rank] = error

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(mesh.size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
        assert not thread.is_alive()
    os.close(fd)
    for result in results:
        if isinstance(result, Exception) and not isinstance(result, expected):
            raise result
    return results
