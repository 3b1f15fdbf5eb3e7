"""``hocket.sample``: an autoregressive sampler, many places from one call of its network, the same samples as place by place.

    x[t] = draw(cond(x[<t]), noise[t])      t = 1..T

is a triangular system. It is solved window by window (GS-Jacobi of Song et al., ICML 2021, arXiv 2002.03629): inside a window by
Jacobi sweeps, each of which settles at least one more place; what lies before the window is settled and not computed again. A
network of affine and pointwise layers is evaluated for the window only (``units``, ``slices``).
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from rich.progress import track
from torch import Tensor, nn

from ..errors import InputError
from .networks import KEPT_NETS, DenseNet, Network, evaluator, network_of
from .regions import RegionNet, Regions
from .report import SampleReport
from .slices import SlicedNet
from .units import Units
from .window import best_size, clock

Draw = Callable[[Tensor, Tensor], Tensor]
WINDOWS = (64, 128, 32, 256, 16, 512, 8)
KEPT_RATES = 8


class Sampled(NamedTuple):
    """x: ``[rows, positions]``; report: what it took."""

    x: Tensor
    report: SampleReport


@torch.no_grad()
def sample(
    cond: nn.Module,
    draw: Draw,
    noise: Tensor,
    order: Tensor | Sequence[int] | Sequence[Sequence[int]] | None = None,
    window: int | str = "auto",
    *,
    tolerance: float = 0.0,
    progress: bool = False,
) -> Sampled:
    """Sample an autoregressive network exactly, many places a sweep.

    cond: ``x [rows, positions] -> parameters [rows, positions, ...]``, where the parameters of a position depend only on positions
    generated before it. draw: ``(parameters [rows, n, ...], noise [rows, n, ...]) -> x [rows, n]``, position by position and
    without random numbers of its own. noise: ``[rows, positions, ...]``. order: positions as they are generated, or groups of
    positions that are generated together; default 0, 1, 2, ... window: places per window, or ``"auto"``. tolerance: a window is
    settled once no value changes by more; 0 for values from a finite set, about 1e-5 for real ones. progress: draw a bar.

    Returns ``(x, report)``: x is what drawing place by place gives, bit for bit where x takes values from a finite set, else to
    within rounding (tolerance 0) or the tolerance times what the network amplifies. Raises InputError where parameters depend on a
    position generated later, or shapes do not fit.
    """
    rows, positions = _check(cond, noise, window, tolerance)
    ranks, places = _ranks(order, positions)
    like = _like(cond, noise)
    start, begin = time.perf_counter(), clock()
    known = network_of(cond, places, ranks, like)
    net = evaluator(known, cond, rows, like)
    size = window if isinstance(window, int) else _window(known, rows, positions)
    exact = (
        "as place by place, bit for bit where values are from a finite set" if tolerance == 0 else f"changes below {tolerance:g}"
    )
    how = f"the whole network each sweep: {known.reason}" if known.parts is None else "only what a window can change was computed"
    report = SampleReport(positions, min(size, positions), exact, how)
    rates = known.rates.setdefault((size, rows), [])
    report.predicted = positions / statistics.median(rates) if rates else None
    _solve(net, draw, noise[:, places], (report, tolerance), progress=progress)
    report.seconds = time.perf_counter() - start
    report.measured = max(clock() - begin, 1e-9)
    rates.append(positions / report.measured)
    del rates[:-KEPT_RATES]
    x = net.inputs[:, places.argsort()]
    if isinstance(net, SlicedNet) and len(known.nets) < KEPT_NETS:
        known.nets[rows] = net
    return Sampled(x, report)


def _solve(
    net: SlicedNet | RegionNet | DenseNet, draw: Draw, noise: Tensor, plan: tuple[SampleReport, float], *, progress: bool
) -> None:
    report, _ = plan
    starts = range(0, report.places, report.window)
    for start in track(starts, "sampling", transient=True) if progress else starts:
        _settle(net, draw, noise, (start, min(start + report.window, report.places)), plan)
        report.windows += 1


def _settle(
    net: SlicedNet | RegionNet | DenseNet,
    draw: Draw,
    noise: Tensor,
    window: tuple[int, int],
    plan: tuple[SampleReport, float],
) -> None:
    """Sweep a window until nothing in it changes."""
    (start, end), (report, tolerance) = window, plan
    net.begin(start, end)
    held, given = net.inputs[:, start:end], noise[:, start:end]
    for _ in range(end - start):  # as many sweeps as places settle a window whatever the guess
        drawn = _drawn(draw, net.parameters(), given)
        report.sweeps += 1
        if torch.equal(drawn, held):
            net.settle(end - 1)  # what the last place alone changes has not been computed
            return
        change = float((drawn - held).abs().max()) if tolerance else float("inf")
        held.copy_(drawn)
        if change <= tolerance:
            report.residual = max(report.residual, change)
            return


def _drawn(draw: Draw, parameters: Tensor, noise: Tensor) -> Tensor:
    drawn = draw(parameters, noise)
    if drawn.shape != noise.shape[:2]:
        raise InputError(
            f"draw must return one value per row and position, {list(noise.shape[:2])}; found {list(drawn.shape)} from parameters "
            f"{list(parameters.shape)} and noise {list(noise.shape)}"
        )
    return drawn


def _window(known: Network, rows: int, positions: int) -> int:
    """The size that settled most places per second for as many rows."""
    sizes = [w for w in WINDOWS if w < positions] if isinstance(known.parts, Units) else []
    if isinstance(known.parts, Regions):
        sizes = [n * known.parts.width for n in (2, 4, 1, 8) if n * known.parts.width < positions]
    return best_size([*sizes, positions], lambda w: known.rates.get((w, rows), []))


def _ranks(order: Tensor | Sequence[int] | Sequence[Sequence[int]] | None, positions: int) -> tuple[Tensor, Tensor]:
    """When each place is generated, equal within a group and ascending; and the position at each place."""
    if order is None:
        return torch.arange(positions), torch.arange(positions)
    listed = order.tolist() if isinstance(order, Tensor) else order
    groups = [sorted(map(int, p)) if isinstance(p, Sequence) else [int(p)] for p in listed]
    flat = [position for group in groups for position in group]
    if sorted(flat) != list(range(positions)):
        raise InputError(
            f"order must hold each of the {positions} positions once; found {len(flat)} entries, {len(set(flat))} different"
        )
    return torch.tensor([rank for rank, group in enumerate(groups) for _ in group]), torch.tensor(flat)


def _like(cond: nn.Module, noise: Tensor) -> Tensor:
    """An empty tensor of the network's dtype, on its device."""
    weight = next((p for p in cond.parameters() if p.is_floating_point()), None)
    if weight is not None and weight.device != noise.device:
        raise InputError(f"noise must be where cond is, on {weight.device}; found it on {noise.device}")
    return noise.new_empty(0, dtype=torch.float32 if weight is None else weight.dtype)


def _check(cond: object, noise: object, window: int | str, tolerance: float) -> tuple[int, int]:
    if not isinstance(cond, nn.Module):
        raise InputError(f"cond must be an nn.Module; found {type(cond).__name__}")
    if cond.training:
        raise InputError("cond is in training mode, where dropout makes sampling another function each sweep; call .eval() first")
    if not isinstance(noise, Tensor) or noise.dim() < 2 or 0 in noise.shape:
        found = list(noise.shape) if isinstance(noise, Tensor) else type(noise).__name__
        raise InputError(f"noise must be [rows, positions, ...]; found {found}")
    if window != "auto" and (isinstance(window, (bool, str)) or window < 1):
        raise InputError(f'window must be a number of places from 1 up, or "auto"; found {window!r}')
    if not tolerance >= 0:
        raise InputError(f"tolerance must be 0 or positive; found {tolerance}")
    return noise.shape[0], noise.shape[1]
