"""Recurrent layers of torch as chains, through ``hocket.parallelize`` with ``Jacobi()`` and no change of the model."""

from __future__ import annotations

from collections.abc import Callable

import chain_backward
import torch
from chain_layers import INPUT, whole_layer
from common import Row, Sample, at_most, cpu_seconds, progress, versus
from torch import Tensor, nn

import hocket
from hocket.runtime.fixedpoint import decide
from hocket.runtime.fixedpoint.report import RECENT

FORWARD = "recurrent layers, forward, one core"
STEP = "recurrent layers, forward and backward, one core"
WORST = "where there is nothing to gain: the chain beside torch's layer"
DOOR = "the same through parallelize, the door's own cost included"
SHORT = 20e-3
"""Seconds; what takes less is repeated more often."""

EQUAL = "results differ from torch's by, relative to the largest"


def rows(*, quick: bool) -> list[Row]:
    """CPU seconds of one thread, and how far the results are from torch's."""
    torch.set_num_threads(1)
    found: list[Row] = []
    widths = (64, 128) if quick else (64, 128, 256, 512)
    for kind in ("RNN", "GRU"):
        for width in widths:
            found += _forward(kind, (1000, 1, width))
    found += _no_worse("RNN", (100, 1, 128))
    if not quick:
        for case in (("RNN", (1000, 16, 256)), ("GRU", (100, 1, 128)), ("GRU", (100, 16, 128)), ("LSTM", (100, 16, 128))):
            found += _no_worse(*case)
    return found


def training_rows(*, quick: bool) -> list[Row]:
    """Forward and backward, and the backward as published."""
    torch.set_num_threads(1)
    found: list[Row] = []
    widths = (64, 128) if quick else (64, 128, 256, 512)
    for kind, width in [("RNN", width) for width in widths] + [("GRU", 128)]:
        found += _step(kind, (1000, 1, width), 6.0 if kind == "RNN" else None)
    return found + chain_backward.rows(quick=quick)


def _case(kind: str, sizes: tuple[int, int, int]) -> str:
    steps, batch, width = sizes
    return f"nn.{kind}, T={steps}, B={batch}, H={width}"


def _compiled(layer: nn.Module, x: Tensor, solver: str = "auto") -> nn.Module:
    return hocket.parallelize(layer, "one=1", (x,), tactics=[hocket.Jacobi(solver)], engine="sim", verify="off")


def _forward(kind: str, sizes: tuple[int, int, int]) -> list[Row]:
    steps, batch, width = sizes
    progress(f"{_case(kind, sizes)}, forward")
    torch.manual_seed(0)
    layer, x = getattr(nn, kind)(INPUT, width).requires_grad_(requires_grad=False), torch.randn(steps, batch, INPUT)
    with torch.no_grad():
        ours = _compiled(layer, x)
        _settle(lambda: ours(x))
        found = ours(x)[0]
        difference = _difference(found, layer(x)[0])
        times = _alternating(lambda: ours(x), lambda: layer(x))
    return _rows(FORWARD, _case(kind, sizes), times, 3.0, difference)


def _no_worse(kind: str, sizes: tuple[int, int, int]) -> list[Row]:
    progress(f"{_case(kind, sizes)}, where there is nothing to gain")
    with torch.no_grad():
        layer = whole_layer(kind, sizes)
        _settle(layer.solved)
        layer.solved()
        chosen = RECENT[-1].solver
        alone = _alternating(layer.solved, lambda: layer.module(layer.x))
        ours = _compiled(layer.module, layer.x)
        _settle(lambda: ours(layer.x))
        whole = _alternating(lambda: ours(layer.x), lambda: layer.module(layer.x))
    case = f"{_case(kind, sizes)}, solved by {chosen}"
    return [versus(WORST, case, *_beside(alone), 1 / 1.1), versus(DOOR, _case(kind, sizes), *_beside(whole))]


def _beside(times: tuple[Sample, Sample]) -> tuple[Sample, str, Sample]:
    return times[0], "torch", times[1]


def _settle(work: Callable[[], object]) -> None:
    """Call until every chain has been measured and has tried what there is."""
    for _ in range(decide.SETTLING):
        work()
        if not decide.is_trying():
            return


def _step(kind: str, sizes: tuple[int, int, int], goal: float | None) -> list[Row]:
    steps, batch, width = sizes
    progress(f"{_case(kind, sizes)}, forward and backward")
    torch.manual_seed(0)
    layer, x = getattr(nn, kind)(INPUT, width), torch.randn(steps, batch, INPUT)
    weight = torch.randn(steps, batch, width) / steps

    def gradients(module: nn.Module) -> list[Tensor]:
        (module(x)[0] * weight).sum().backward()
        found = [p.grad for p in module.parameters() if p.grad is not None]
        module.zero_grad(set_to_none=True)
        return found

    expected = gradients(layer)
    ours = _compiled(layer, x)
    _settle(lambda: gradients(ours))
    found = gradients(ours)
    difference = max(_difference(a, b) for a, b in zip(found, expected, strict=True))
    return _rows(STEP, _case(kind, sizes), _alternating(lambda: gradients(ours), lambda: gradients(layer)), goal, difference)


def _difference(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().amax() / expected.abs().amax())


def _alternating(ours: Callable[[], object], theirs: Callable[[], object], rounds: int = 3) -> tuple[Sample, Sample]:
    repeats = 3 if cpu_seconds(ours, 1).median > SHORT else 25
    pairs = [(cpu_seconds(ours, repeats), cpu_seconds(theirs, repeats)) for _ in range(rounds)]
    return Sample(tuple(v for a, _ in pairs for v in a.values)), Sample(tuple(v for _, b in pairs for v in b.values))


def _rows(claim: str, case: str, times: tuple[Sample, Sample], goal: float | None, difference: float) -> list[Row]:
    ours, theirs = times
    return [versus(claim, case, ours, "torch", theirs, goal), at_most(EQUAL, f"{claim}: {case}", Sample((difference,), ""), 5e-6)]
