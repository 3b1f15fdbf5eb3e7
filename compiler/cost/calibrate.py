"""Measure this machine into a ``Cluster``: matmul speed, memory bandwidth, overhead per op, and each collective on real ranks.

Ops are timed here, on one thread, as a rank runs them. Collectives are timed by the caller (it owns the ranks): for each kind a
line seconds = alpha + beta * wire bytes  is fitted by least squares with relative weights, so that small messages
(which fix alpha) count as much as large ones (which fix beta). All times are those of an undisturbed machine (``fit.quiet``); how
busy it was shows in the spread that ``TileCosts`` keeps.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch

from ..errors import InputError
from ..redistribute import StepKind
from .cluster import COLLECTIVES, Cluster, Line, TileCosts
from .fit import fit_line, quiet_seconds
from .tile_timing import SENT, TimeLoops, fit_tiles

TimeCollective = Callable[[StepKind, int], float]
"""(kind, bytes of the whole tensor) -> undisturbed seconds of one such collective over all ranks.

The whole tensor is what all_reduce sums, what all_gather makes, what reduce_scatter takes, and all ranks' pieces of all_to_all.
"""

MESSAGE_BYTES = (1 << 12, 1 << 15, 1 << 18, 1 << 20, 1 << 22)
_MATMUL_SIZE = {"cpu": 512, "cuda": 4096}
_STREAM_BYTES = {"cpu": 1 << 26, "cuda": 1 << 30}
_OVERHEAD_OPS = 200


def calibrate(
    time_collective: TimeCollective | None = None,
    time_loops: TimeLoops | None = None,
    *,
    ranks: int = 2,
    device: str = "cpu",
    dtypes: Sequence[torch.dtype] = (torch.float32, torch.float64, torch.bfloat16),
    seconds: float = 10.0,
) -> Cluster:
    """Measure for about ``seconds`` seconds and return a Cluster (save it with ``.save()``).

    time_collective, time_loops: see ``TimeCollective`` and ``TimeLoops``; without them the default cluster's lines and costs of
    tile loops are kept. ranks: how many ranks they run on.
    Raises InputError for an unknown device, fewer than two ranks, or times that are not positive.
    """
    base = Cluster.default(device)
    if time_collective is not None and ranks < 2:
        raise InputError(f"collectives need at least two ranks to be timed; found {ranks}")
    if device == "cuda" and not torch.cuda.is_available():
        raise InputError('calibrate(device="cuda") needs a CUDA device; torch finds none here')
    budget = seconds / (2 * len(dtypes) + 4)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        flops = {
            str(dtype).removeprefix("torch."): matmul_flops(dtype, device, budget)
            for dtype in dict.fromkeys((torch.float32, *dtypes))
        }
        bandwidth = memory_bandwidth(device, budget)
        overhead = op_overhead(device, budget)
    finally:
        torch.set_num_threads(threads)
    lines = base.collectives if time_collective is None else fit_collectives(time_collective, ranks)
    tiles = TileCosts()
    if time_loops is not None:
        reduced = lines[StepKind.ALL_REDUCE].seconds(2 * (ranks - 1) * SENT, ranks)
        tiles = fit_tiles(time_loops, ranks, reduced, budget)
    return Cluster(device, flops, bandwidth, overhead, lines, tiles=tiles)


def matmul_flops(dtype: torch.dtype, device: str, budget: float) -> float:
    """Flops per second of a square matmul."""
    size = _MATMUL_SIZE[device]
    a, b = (torch.ones(size, size, dtype=dtype, device=device) for _ in range(2))
    out = torch.empty_like(a)
    return 2 * size**3 / quiet_seconds(lambda: torch.mm(a, b, out=out), device, budget)


def memory_bandwidth(device: str, budget: float) -> float:
    """Bytes read and written per second by an elementwise op on tensors larger than any cache."""
    count = _STREAM_BYTES[device] // 4
    a = torch.ones(count, device=device)
    out = torch.empty_like(a)
    return 8 * count / quiet_seconds(lambda: torch.mul(a, 2.0, out=out), device, budget)


def op_overhead(device: str, budget: float) -> float:
    """Seconds per op that has nothing to do: a run of tiny dependent ops, divided by their number."""
    start = torch.zeros(1, device=device)

    def run() -> None:
        x = start
        for _ in range(_OVERHEAD_OPS):
            x = torch.ops.aten.add.Tensor(x, 1)

    return quiet_seconds(run, device, budget) / _OVERHEAD_OPS


def fit_collectives(time_collective: TimeCollective, ranks: int, sizes: Sequence[int] = MESSAGE_BYTES) -> dict[StepKind, Line]:
    """A line per collective from times at several sizes."""
    lines = {}
    for kind in COLLECTIVES:
        times = {size: time_collective(kind, size) for size in sizes}
        bad = {size: t for size, t in times.items() if not (math.isfinite(t) and t > 0)}
        if bad:
            raise InputError(f"times of {kind} must be positive seconds; found {bad}")
        slope, intercept = fit_line({wire_share(kind, ranks) * size: t for size, t in times.items()})
        lines[kind] = Line(intercept / max(1, math.ceil(math.log2(ranks))), slope)
    return lines


def wire_share(kind: StepKind, ranks: int) -> float:
    """Bytes that one rank sends per byte of the whole tensor (the formulas of ``redistribute.wire_bytes``)."""
    share = (ranks - 1) / ranks
    return {StepKind.ALL_REDUCE: 2 * share, StepKind.ALL_TO_ALL: share / ranks}.get(kind, share)
