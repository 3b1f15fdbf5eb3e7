"""What each rank does for ``step_exchange``: time collectives over gloo and in shared memory, in turn. A hook of the engine."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

SIZES = (4 << 10, 64 << 10, 1 << 20, 4 << 20, 16 << 20, 64 << 20)
"""Bytes of the whole tensor."""


def install(worker: Any) -> None:
    """Called on each rank once its groups are up; the figures go beside this file."""
    shared = worker.communicator
    transports = {"shm": shared, "gloo": shared._gloo}
    found: dict[str, dict[str, list[float]]] = {}
    with torch.inference_mode():
        for nbytes in SIZES:
            repeats, calls = (3, 2) if nbytes > 8 << 20 else (6, 6)
            for name, call in collectives(nbytes // 4, worker.mesh.size).items():
                times: dict[str, list[float]] = {transport: [] for transport in transports}
                for _ in range(repeats):
                    for transport, communicator in transports.items():
                        shared._gloo.barrier()
                        for number in range(calls + 1):
                            start = time.perf_counter()
                            communicator.wait(call(communicator))
                            if number:  # the first one meets whoever came late to the barrier
                                times[transport].append(time.perf_counter() - start)
                found[f"{name} {nbytes}"] = times
    Path(__file__).with_suffix(f".{worker.rank}.json").write_text(json.dumps(found))


def collectives(count: int, parts: int) -> dict[str, Callable[[Any], Any]]:
    """Each collective of a tensor of ``count`` numbers, as a function of the communicator."""
    whole, piece, splits = torch.ones(count), torch.ones(count // parts), [count // parts] * parts
    return {
        "all_reduce": lambda c: c.all_reduce(whole, "sum", "d"),
        "all_gather": lambda c: c.all_gather(piece, "d"),
        "reduce_scatter": lambda c: c.reduce_scatter(whole, "sum", "d"),
        "all_to_all": lambda c: c.all_to_all(whole, splits, splits, "d"),
    }
