"""Recurrent layers cut in time over two ranks, beside one thread and beside a cut of the batch."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from common import Row, Sample, at_most, cpu_seconds, progress, versus
from torch import Tensor, nn

import hocket

CLAIM = "recurrent layers cut in time over two ranks (CPU seconds of the busier rank)"
WALL = "the same, time on the wall (both cores must be free)"
EQUAL = "results differ from torch's by, relative to the largest"
INPUT, CALLS = 32, 5

WAYS: dict[str, tuple[str, Callable[[], list[Any]]]] = {
    "cut in time": ("t=2", lambda: [hocket.Jacobi(axis="t")]),
    "cut in the batch": ("dp=2", lambda: [hocket.DataParallel("dp"), hocket.Jacobi("sequential")]),
}


def rows(*, quick: bool) -> list[Row]:
    """Forward, at the batch where one core is busy with each step already."""
    torch.set_num_threads(1)
    cases = [("RNN", 512), ("GRU", 256)]
    steps = 400 if quick else 2000
    found: list[Row] = []
    for kind, width in cases:
        found += _case(kind, (steps, 16, width), goal=None if quick else 1.6)
    return found


def _case(kind: str, sizes: tuple[int, int, int], goal: float | None) -> list[Row]:
    steps, batch, width = sizes
    case = f"nn.{kind}, T={steps}, B={batch}, H={width}"
    torch.manual_seed(0)
    layer, x = getattr(nn, kind)(INPUT, width).requires_grad_(requires_grad=False), torch.randn(steps, batch, INPUT)
    found: list[Row] = []
    with torch.no_grad():
        expected = layer(x)[0]
        alone, wall = cpu_seconds(lambda: layer(x), CALLS), _wall(lambda: layer(x))
        for name, (mesh, tactics) in WAYS.items():
            progress(f"{case}, {name}")
            with hocket.parallelize(layer, mesh, (x,), tactics=tactics(), engine="local", verify="off") as ours:
                busy, on_the_wall, result = _busier(lambda: ours(x)[0])
            wanted = goal if name == "cut in time" else None
            found.append(versus(CLAIM, f"{case}, {name}", busy, "torch, one thread", alone, wanted))
            found.append(versus(WALL, f"{case}, {name}", on_the_wall, "torch, one thread", wall))
            error = float((result - expected).abs().amax() / expected.abs().amax())
            found.append(at_most(EQUAL, f"{case}, {name}", Sample((error,), ""), 1e-6))
    return found


def _wall(work: Callable[[], object]) -> Sample:
    values = []
    for _ in range(CALLS):
        start = time.perf_counter()
        work()
        values.append(time.perf_counter() - start)
    return Sample(tuple(values))


def _busier(work: Callable[[], Tensor]) -> tuple[Sample, Sample, Tensor]:
    """Per call the CPU seconds of the rank that worked most, and wall seconds."""
    for _ in range(3):
        result = work()
    ranks = list(_ranks())
    busy, wall = [], []
    for _ in range(CALLS):
        before, start = [_cpu(pid) for pid in ranks], time.perf_counter()
        for _ in range(2):  # the clock of another process ticks in hundredths of a second
            result = work()
        wall.append((time.perf_counter() - start) / 2)
        busy.append(max(_cpu(pid) - was for pid, was in zip(ranks, before, strict=True)) / 2)
    return Sample(tuple(busy)), Sample(tuple(wall)), result


def _ranks() -> Iterator[int]:
    """The processes of the ranks: descendants of this one that are called so."""
    found: dict[int, tuple[str, int]] = {}
    for file in Path("/proc").glob("[0-9]*/stat"):
        try:
            text = file.read_text()
        except OSError:  # it has ended
            continue
        name, rest = text[text.index("(") + 1 : text.rindex(")")], text[text.rindex(")") + 2 :].split()
        found[int(file.parent.name)] = (name, int(rest[1]))
    for pid, (name, parent) in found.items():
        while parent in found and parent != os.getpid():
            parent = found[parent][1]
        if parent == os.getpid() and "rank" in name:
            yield pid


def _cpu(pid: int) -> float:
    text = Path(f"/proc/{pid}/stat").read_text()
    fields = text[text.rindex(")") + 2 :].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
