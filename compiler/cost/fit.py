"""Timing a function, and a line through what was timed."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch


def fit_line(points: Mapping[float, float]) -> tuple[float, float]:
    """(slope, intercept), neither negative, of least relative squared error."""
    x, y = (np.array(values, dtype=float) for values in (list(points.keys()), list(points.values())))
    design = np.stack((x, np.ones_like(x)), axis=1) / y[:, None]
    slope, intercept = (float(c) for c in np.linalg.lstsq(design, np.ones_like(y), rcond=None)[0])
    if slope < 0:
        return 0.0, 1 / float(np.mean(1 / y))
    if intercept < 0:
        return float((x / y).sum() / ((x / y) ** 2).sum()), 0.0
    return slope, intercept


def quiet(times: Sequence[float]) -> float:
    """What some repeats of the same work take when nothing disturbs them: their lowest decile. Other work on the machine only ever
    adds time, so a mean or a median says how busy it was; the very least may be a clock's error."""
    return sorted(times)[len(times) // 10]


def spread(times: Sequence[float]) -> float:
    """How much longer than undisturbed the middle one of some repeats took, as a part: 0 on a quiet machine."""
    return statistics.median(times) / quiet(times) - 1


def quiet_seconds(run: Callable[[], object], device: str, budget: float) -> float:
    """Undisturbed time of ``run``, from as many repeats as the budget allows (at least 3), after one to warm up."""
    run()
    times: list[float] = []
    end = time.perf_counter() + budget
    while len(times) < 3 or (time.perf_counter() < end and len(times) < 1000):
        _wait(device)
        start = time.perf_counter()
        run()
        _wait(device)
        times.append(time.perf_counter() - start)
    return quiet(times)


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()
