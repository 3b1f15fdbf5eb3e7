"""Two processes that talk over gloo, for tests of what they say to each other."""

from __future__ import annotations

import contextlib
import datetime
import multiprocessing
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

SECONDS = 60


@contextlib.contextmanager
def world_of_two(rank: int, folder: str) -> Iterator[None]:
    """Inside, this process is a rank of a gloo world that meets in ``folder``."""
    torch.set_num_threads(1)
    limit = datetime.timedelta(seconds=SECONDS)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2, timeout=limit)
    yield
    dist.barrier()
    dist.destroy_process_group()


def run_pair(main: Callable[[int, str], None], folder: Path) -> list[Any]:
    """``main(rank, folder)`` in two processes; what each has saved in ``rank0.pt`` and ``rank1.pt``."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "torch.distributed"])
    ranks = [context.Process(target=main, args=(rank, str(folder))) for rank in range(2)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(SECONDS + 40)
    assert [process.exitcode for process in ranks] == [0, 0]
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(2)]
