"""Peers: the same training under torch's own tensor parallelism (DTensor) and DistributedDataParallel, on real gloo processes.

Each process has one thread, waits on a pipe between blocks, and times its own steps; a step's time is that of the slowest process.
"""

from __future__ import annotations

import contextlib
import datetime
import multiprocessing
import tempfile
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType

import torch
import torch.distributed as dist
from step_model import RATE, Case
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, loss_parallel, parallelize_module

from hocket.compiler.demo.llama import Attention

LIMIT = 600.0


class Peer:
    """A world of processes that trains on demand. kind: ``tensor``, the same with its logits cut (``vocabulary``), ``data``, or
    ``alone`` for processes that never talk."""

    def __init__(self, kind: str, case: Case, world: int) -> None:
        context = multiprocessing.get_context("spawn")
        self._folder = tempfile.TemporaryDirectory()
        store = str(Path(self._folder.name) / "store")
        self._pipes: list[Connection] = []
        self._processes = []
        for rank in range(world):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(kind, case, rank, world, store, theirs), daemon=True)
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(process)

    def losses(self, steps: int) -> list[float]:
        """Train some steps and return their losses (the mean over the processes)."""
        return [sum(step) / len(step) for step in zip(*(loss for loss, _ in self._run(steps)), strict=True)]

    def block(self, steps: int) -> list[float]:
        """Train some steps and return their seconds."""
        return [max(step) for step in zip(*(seconds for _, seconds in self._run(steps)), strict=True)]

    def _run(self, steps: int) -> list[tuple[list[float], list[float]]]:
        for pipe in self._pipes:
            pipe.send(steps)
        answers = []
        for pipe in self._pipes:
            if not pipe.poll(LIMIT):
                raise TimeoutError(f"a peer process gave no answer within {LIMIT:.0f} s")
            answers.append(pipe.recv())
        return answers

    def __enter__(self) -> Peer:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None) -> None:
        for pipe in self._pipes:
            pipe.close()
        for process in self._processes:
            process.join(10)
            process.kill()
        self._folder.cleanup()


def _serve(kind: str, case: Case, rank: int, world: int, store: str, pipe: Connection) -> None:
    torch.set_num_threads(1)
    limit = datetime.timedelta(seconds=LIMIT)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world, timeout=limit)
    kinds = {"tensor": _tensor_parallel, "vocabulary": _vocabulary_parallel, "data": _data_parallel, "alone": _alone}
    model, loss = kinds[kind](case, rank, world)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE)
    around = loss_parallel() if kind == "vocabulary" else contextlib.nullcontext()
    with around:
        _train(loss, optimizer, pipe)


def _train(loss: Callable[[], Tensor], optimizer: torch.optim.Optimizer, pipe: Connection) -> None:
    try:
        while True:
            losses, seconds = [], []
            for _ in range(pipe.recv()):
                start = time.perf_counter()
                optimizer.zero_grad()
                value = loss()
                value.backward()
                optimizer.step()
                losses.append(float(value.detach()))
                seconds.append(time.perf_counter() - start)
            pipe.send((losses, seconds))
    except EOFError:
        dist.destroy_process_group()


def _tensor_parallel(case: Case, _rank: int, world: int) -> tuple[nn.Module, Callable[[], Tensor]]:
    """Megatron's plan as torch's tutorial writes it; every process computes whole groups of heads."""
    return _tensor_plan(case, world, ColwiseParallel(output_layouts=Replicate()))


def _vocabulary_parallel(case: Case, _rank: int, world: int) -> tuple[nn.Module, Callable[[], Tensor]]:
    """The same with the logits left cut, for a loss within ``loss_parallel``."""
    return _tensor_plan(case, world, ColwiseParallel(output_layouts=Shard(-1), use_local_output=False))


def _tensor_plan(case: Case, world: int, head: ColwiseParallel) -> tuple[nn.Module, Callable[[], Tensor]]:
    mesh = init_device_mesh("cpu", (world,))
    model = case.model()
    whole = Replicate()
    parallelize_module(
        model,
        mesh,
        {
            "embedding": RowwiseParallel(input_layouts=whole),
            "layers.*.attention.q": ColwiseParallel(),
            "layers.*.attention.k": ColwiseParallel(),
            "layers.*.attention.v": ColwiseParallel(),
            "layers.*.attention.o": RowwiseParallel(),
            "layers.*.feed_forward.gate": ColwiseParallel(),
            "layers.*.feed_forward.up": ColwiseParallel(),
            "layers.*.feed_forward.down": RowwiseParallel(),
            "head": head,
        },
    )
    for module in model.modules():
        if isinstance(module, Attention):
            module.heads, module.kv_heads = module.heads // world, module.kv_heads // world
    tokens, targets = case.data()
    return model, lambda: model(tokens, targets)


def _data_parallel(case: Case, rank: int, world: int) -> tuple[nn.Module, Callable[[], Tensor]]:
    model = nn.parallel.DistributedDataParallel(case.model())
    tokens, targets = (part.chunk(world)[rank] for part in case.data())
    return model, lambda: model(tokens, targets)


def _alone(case: Case, rank: int, world: int) -> tuple[nn.Module, Callable[[], Tensor]]:
    """A share of the batch and nobody to talk to: no parallel step of plain torch on these cores can take less time."""
    model = case.model()
    tokens, targets = (part.chunk(world)[rank] for part in case.data())
    return model, lambda: model(tokens, targets)
