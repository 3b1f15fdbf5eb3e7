"""Rank processes for the benchmark of tile loops: one thread each, joined by the local engine's own transports.

A rank runs *contenders*, functions of no arguments, in turns; before each run all ranks meet, and the time of a run is that of the
slowest rank.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import multiprocessing
import os
import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from typing import Any

import torch
from tiles_link import Form, LinkBench

from hocket.runtime.exchange import exchange_bytes
from hocket.runtime.executors.flat import FlatExecutor
from hocket.runtime.executors.tile_ready import ReadyLoop
from hocket.runtime.executors.tile_runner import TileRunner
from hocket.runtime.executors.tiles import LoopRun
from hocket.runtime.late import late_waits
from hocket.runtime.load import load
from hocket.runtime.mesh import Mesh
from hocket.runtime.program import RankProgram
from hocket.runtime.rendezvous import connect_local
from hocket.runtime.shm import ShmCommunicator
from hocket.runtime.templates import Site
from hocket.runtime.tile_loop import Call, Cut, Read, Result, TileLoop
from hocket.runtime.zygote import keep_freed_memory

AXIS = "tp"
Contender = Callable[[], object]


def product_loop(kind: str, parts: int, rows: int, tiles: int = 1) -> TileLoop:
    """x @ w into a collective, or a gathered x times w."""
    calls = (Call("aten.mm.default", [{"slot": 0}, {"slot": 1}], {}, (2,), False),)
    gathers = kind == "all_gather"
    result = Result("map", 2, Cut(0)) if gathers else Result(kind, 2, Cut(0), "sum")
    read = Read("gather" if gathers else "tiled", Cut(0))
    return TileLoop(AXIS, parts, rows, tiles, (), (read, Read("whole")), calls, (result,))


class Ranks:
    """The processes. Jobs are functions of a ``Bench`` by name; every rank does the same job and answers."""

    def __init__(self, parts: int) -> None:
        self.parts, self.mesh = parts, Mesh(((AXIS, parts),))
        store, exchange = (os.memfd_create(name) for name in ("bench-store", "bench-exchange"))
        os.ftruncate(exchange, exchange_bytes(self.mesh))
        context = multiprocessing.get_context("fork")
        pipes = [context.Pipe() for _ in range(parts)]
        self._pipes = [ours for ours, _ in pipes]
        self._processes = [
            context.Process(target=_serve, args=(self.mesh, rank, (store, exchange), pipes[rank][1]), daemon=True)
            for rank in range(parts)
        ]
        for process in self._processes:
            process.start()
        os.close(store)
        os.close(exchange)

    def __call__(self, job: str, *args: Any) -> list[Any]:
        """What every rank answers."""
        for pipe in self._pipes:
            pipe.send((job, args))
        answers = [pipe.recv() for pipe in self._pipes]
        for answer in answers:
            if isinstance(answer, str) and answer.startswith("failed"):
                raise RuntimeError(answer)
        return answers

    def times(self, job: str, *args: Any) -> dict[str, list[float]]:
        """Seconds of every contender and run: those of the slowest rank."""
        answers = self(job, *args)
        return {name: [max(column) for column in zip(*(a[name] for a in answers), strict=True)] for name in answers[0]}

    def within(self, seconds: float, most: int, job: str, *args: Any) -> dict[str, list[float]]:
        """``times`` with as many repeats as fit: at least two, at most ``most``."""
        one = self.times(job, *args, 1)
        round_seconds = sum(found[0] for found in one.values())
        repeats = max(2, min(most, int(seconds / max(round_seconds, 1e-6)) - 1))
        return self.times(job, *args, repeats)

    def close(self) -> None:
        """End the processes."""
        for pipe, process in zip(self._pipes, self._processes, strict=True):
            with contextlib.suppress(OSError):
                pipe.send(("", ()))
            process.join(10)
            if process.is_alive():
                process.kill()

    def __enter__(self) -> Ranks:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _serve(mesh: Mesh, rank: int, shared: tuple[int, int], pipe: Connection) -> None:
    torch.set_num_threads(1)
    keep_freed_memory(ctypes.CDLL(None))  # as ranks of an engine do
    communicator = connect_local(mesh, rank, shared, torch.device("cpu"), 120.0)
    assert isinstance(communicator, ShmCommunicator)
    bench = Bench(communicator)
    while True:
        job, args = pipe.recv()
        if not job:
            return
        try:
            pipe.send(getattr(bench, job)(*args))
        except Exception as error:  # the parent raises it
            pipe.send(f"failed on rank {rank}: {type(error).__name__}: {error}")


class Bench:
    """One rank's jobs."""

    def __init__(self, communicator: ShmCommunicator) -> None:
        self.shm, self.gloo = communicator, communicator._gloo
        self.transport = communicator.transport
        self.rank, self.parts = communicator.rank, communicator.mesh.size
        self.site = Site.of(communicator.mesh, self.rank)
        self.runner = TileRunner.of(communicator)
        self._link: LinkBench | None = None

    def turns(self, contenders: dict[str, Contender], repeats: int) -> dict[str, list[float]]:
        """Every contender in every round, after a round to warm up."""
        found: dict[str, list[float]] = {name: [] for name in contenders}
        for number in range(repeats + 1):
            for name, run in contenders.items():
                self.transport.barrier(AXIS)
                start = time.perf_counter()
                run()
                if number:
                    found[name].append(time.perf_counter() - start)
        return found

    def product(self, kind: str, shape: Sequence[int], dtype: torch.dtype, names: Sequence[str], repeats: int) -> Any:
        """One product [M, K/W] @ [K/W, N] and its collective, by every contender of ``names``."""
        m, k, n = shape
        torch.manual_seed(self.rank)
        gathers = kind == "all_gather"
        x = (torch.randn(m // self.parts, k) if gathers else torch.randn(m, k // self.parts)).to(dtype) / 8
        w = (torch.randn(k, n // self.parts) if gathers else torch.randn(k // self.parts, n)).to(dtype) / 8
        whole = torch.randn(m, k).to(dtype) if gathers else x
        out = torch.empty(m, w.shape[1], dtype=dtype)
        fused = self.runner.bind(product_loop(kind, self.parts, m), self.site)
        known: dict[str, Contender] = {
            "product alone": lambda: torch.mm(whole, w, out=out),
            "gloo": lambda: self._apart(self.gloo, kind, x, w),
            "shared memory": lambda: self._apart(self.shm, kind, x, w),
            "tile loop": lambda: fused(x, w),
        }
        if "async-TP algorithm" in names:
            known["async-TP algorithm"] = self._async_tp(kind, x, w)
        return self.turns({name: known[name] for name in names}, repeats)

    def _apart(self, communicator: Any, kind: str, x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        if kind == "all_gather":
            return torch.mm(communicator.wait(communicator.all_gather(x, AXIS)), w)
        y = torch.mm(x, w)
        start = communicator.reduce_scatter if kind == "reduce_scatter" else communicator.all_reduce
        result: torch.Tensor = communicator.wait(start(y, "sum", AXIS))
        return result

    def _async_tp(self, kind: str, x: torch.Tensor, w: torch.Tensor) -> Contender:
        """torch's ``_pipelined_produce_and_all2all`` and ``_pipelined_all_gather_and_consume`` on this transport."""
        rows, parts, rank = x.shape[0] if kind == "all_gather" else x.shape[0] // self.parts, self.parts, self.rank
        width = x.shape[1] if kind == "all_gather" else w.shape[1]
        buffers = [self.transport.symmetric(f"async-tp {i} {kind} {tuple(x.shape)}", (rows, width), x.dtype, AXIS) for i in (0, 1)]
        whole = torch.empty(parts * rows, width, dtype=x.dtype)
        chunks = whole.chunk(parts)
        made = torch.empty(parts * rows, w.shape[1], dtype=x.dtype)

        def gather_and_consume() -> torch.Tensor:
            buffers[0].local.copy_(x)
            self.transport.barrier(AXIS)
            chunks[rank].copy_(x)
            torch.mm(x, w, out=made.chunk(parts)[rank])
            for step in range(1, parts):
                source = (rank + step) % parts
                chunks[source].copy_(buffers[0].at(source))
                torch.mm(chunks[source], w, out=made.chunk(parts)[source])
            self.transport.barrier(AXIS)
            return made

        def produce_and_exchange() -> torch.Tensor:
            self.transport.barrier(AXIS)
            for step in range(1, parts):
                target, source, buffer = (rank + step) % parts, (rank - step) % parts, buffers[step % 2]
                torch.mm(x.narrow(0, target * rows, rows), w, out=buffer.local)
                self.transport.barrier(AXIS)
                chunks[source].copy_(buffer.at(source))
                self.transport.barrier(AXIS)
            torch.mm(x.narrow(0, rank * rows, rows), w, out=chunks[rank])
            self.transport.barrier(AXIS)
            return whole.view(parts, rows, width).sum(0)

        return gather_and_consume if kind == "all_gather" else produce_and_exchange

    def collective(self, kind: str, sizes: Sequence[int], repeats: int) -> Any:
        """One collective on shared memory: bytes of the whole tensor -> seconds."""
        contenders: dict[str, Contender] = {}
        for size in sizes:
            rows = self.parts * max(1, size // 4 // 256 // self.parts)
            value = torch.randn(rows // self.parts if kind == "all_gather" else rows, 256)
            contenders[str(size)] = lambda value=value: self._collect(kind, value)  # type: ignore[misc]
        return self.turns(contenders, repeats)

    def _collect(self, kind: str, value: torch.Tensor) -> torch.Tensor:
        if kind == "all_gather":
            return self.shm.wait(self.shm.all_gather(value, AXIS))
        start = self.shm.reduce_scatter if kind == "reduce_scatter" else self.shm.all_reduce
        return self.shm.wait(start(value, "sum", AXIS))

    def products(self, shapes: Sequence[tuple[int, int, int]], dtype: torch.dtype, repeats: int) -> Any:
        """Seconds of plain products [m, k] @ [k, n]."""
        contenders: dict[str, Contender] = {}
        for m, k, n in shapes:
            a, b, out = torch.randn(m, k).to(dtype), torch.randn(k, n).to(dtype), torch.empty(m, n, dtype=dtype)
            contenders[f"{m}x{k}x{n}"] = lambda a=a, b=b, out=out: torch.mm(a, b, out=out)  # type: ignore[misc]
        return self.turns(contenders, repeats)

    def wire_of(self, kind: str, shape: Sequence[int], dtype: torch.dtype) -> tuple[float, int]:
        """Bytes that one loop counts as sent, and bytes of the buffer it needs."""
        m, k, n = shape
        x, w = torch.randn(m, k // self.parts).to(dtype), torch.randn(k // self.parts, n).to(dtype)
        ready = ReadyLoop(product_loop(kind, self.parts, m), self.site)
        before = self.shm.wire.total
        self.runner.run(ready, (x, w))
        return float(self.shm.wire.total - before), LoopRun(ready, 0, 0, (x, w)).sizes.delivered

    def program(
        self,
        texts: dict[str, str],
        inputs: Sequence[tuple[tuple[int, ...], str]],
        repeats: int,
        line: tuple[float, float] = (0.0, 0.0),
    ) -> Any:
        """Whole programs: name -> instruction list; ``gloo ...`` runs over gloo, ``link ...`` over a link with that line. inputs:
        (local shape, dtype) per port."""
        generator = torch.Generator().manual_seed(self.rank)
        values = [(torch.randn(shape, generator=generator) / 8).to(getattr(torch, dtype)) for shape, dtype in inputs]
        contenders = {}
        for name, text in texts.items():
            communicator: Any = self.gloo if name.startswith("gloo") else self.shm
            if name.startswith("link"):
                communicator = self.link_end().tuned(line)
            contenders[name] = self._step(RankProgram.from_json(text), communicator, values)
        return self.turns(contenders, repeats)

    def _step(self, program: RankProgram, communicator: Any, values: Sequence[torch.Tensor]) -> Contender:
        ready = load(program, self.rank)
        executor = FlatExecutor(ready, communicator, schedule=functools.partial(late_waits, ready))
        first, *later = program.segments

        def run() -> None:
            frame = executor.open([values[p] if p in first.inputs else None for p in range(len(program.inputs))])
            executor.run(frame, first.name)
            for segment in later:
                executor.run(frame, segment.name, [values[p] for p in segment.inputs])
            frame.close()

        return run

    def link(self, shape: Sequence[int], forms: Sequence[Form], line: tuple[float, float], repeats: int) -> Any:
        """mm -> reduce_scatter over an emulated link. line: seconds a message and a byte."""
        loop = product_loop("reduce_scatter", self.parts, shape[0])
        return self.turns(self.link_end().contenders(loop, shape, forms, line), repeats)

    def link_end(self) -> LinkBench:
        """This rank's end of the link; all ranks make it at the same time."""
        if self._link is None:
            self._link = LinkBench(self)
        return self._link
