"""The transport of CUDA's symmetric memory: all but torch's four calls on files that processes share, and the whole on a GPU."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from gloo_pair import run_pair, world_of_two
from transport_conformance import check, conformance

from hocket.runtime.errors import InputError
from hocket.runtime.mesh import Mesh
from hocket.runtime.transports import cuda


class FileMemory:
    """``SymmetricMemory`` in files that both processes map."""

    def __init__(self, folder: str, rank: int) -> None:
        self.folder, self.rank, self.made = folder, rank, 0

    def _copy(self, number: int, rank: int, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        path = f"{self.folder}/memory-{number}-{rank}"
        return torch.from_file(path, shared=True, size=math.prod(shape), dtype=dtype).view(tuple(shape))

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        self.made += 1
        return self._copy(self.made, self.rank, shape, dtype)

    def meet(self, own: torch.Tensor, group: Any) -> Sequence[torch.Tensor]:
        dist.barrier(group)
        return [self._copy(self.made, rank, own.shape, own.dtype) for rank in range(2)]

    def write(self, words: torch.Tensor, place: int, value: int) -> None:
        words[place] = value

    def read(self, words: torch.Tensor, place: int) -> int:
        return int(words[place])


def file_rank(rank: int, folder: str) -> None:
    """One rank on memory in files."""
    with world_of_two(rank, folder):
        groups = {"d": (dist.group.WORLD, (0, 1))}
        transport = cuda.CudaTransport(Mesh.parse("d=2"), rank, groups, 60.0, FileMemory(folder, rank))
        torch.save(conformance(transport), f"{folder}/rank{rank}.pt")
        transport.close()


def gpu_rank(rank: int, folder: str) -> None:
    """One of two ranks on one device."""
    os.environ["TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES"] = "1"
    with world_of_two(rank, folder):
        torch.cuda.set_device(rank % torch.cuda.device_count())
        groups = {"d": (dist.group.WORLD, (0, 1))}
        transport = cuda.CudaTransport(Mesh.parse("d=2"), rank, groups, 60.0)
        torch.save(conformance(transport, device="cuda"), f"{folder}/rank{rank}.pt")
        transport.close()


def test_ranks_on_shared_memory_conform(tmp_path: Path) -> None:
    check(run_pair(file_rank, tmp_path))


@pytest.mark.gpu
@pytest.mark.skipif(bool(cuda.why_unavailable()), reason=cuda.why_unavailable() or "available")
def test_two_ranks_on_cuda_devices_conform(tmp_path: Path) -> None:
    check(run_pair(gpu_rank, tmp_path))


def test_without_a_device_there_is_one_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(InputError, match="torch finds no CUDA device here"):
        cuda.CudaTransport(Mesh.parse("d=2"), 0, {}, 1.0)


def test_a_torch_that_lacks_a_call_is_told_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch.distributed._symmetric_memory as memory

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.delattr(memory, "rendezvous")
    assert "lacks rendezvous" in cuda.why_unavailable()
