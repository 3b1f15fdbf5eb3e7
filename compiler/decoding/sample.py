"""``hocket.sample``: an autoregressive sampler, many places from one call of its network, the same samples as place by place.

    x[t] = draw(cond(x[<t]), noise[t])      t = 1..T

is a triangular system. It is solved window by window (GS-Jacobi of Song et al., ICML 2021, arXiv 2002.03629): inside a window by
Jacobi sweeps, each of which settles at least one more place; what lies before the window is settled and not computed again. A
network of affine and pointwise layers is evaluated for the window only (``units``, ``slices``).
"""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from rich.progress import track
from torch import Tensor, nn

from ..capture import capture
from ..errors import HocketError, InputError
from ..program import Program
from .image_layers import find_regions
from .regions import RegionNet, Regions
from .slices import SlicedNet
from .units import ROWS, Units, UnsliceableError, find_units
from .window import best_size, clock

Draw = Callable[[Tensor, Tensor], Tensor]
WINDOWS = (64, 128, 32, 256, 16, 512, 8)
KEPT_RATES, KEPT_NETS = 8, 4


@dataclass
class SampleReport:
    """sweeps: evaluations made, where place by place makes ``places``; windows: their number; window: places in each; residual:
    largest change of a value in the last sweep of a window; exactness: what is guaranteed; evaluated: how the network was evaluated
    and, where not sliced, why; seconds: wall time.
    """

    places: int
    window: int
    exactness: str
    evaluated: str
    sweeps: int = 0
    windows: int = 0
    residual: float = 0.0
    seconds: float = 0.0

    def __str__(self) -> str:
        return (
            f"{self.places} places in {self.sweeps} sweeps over {self.windows} windows of {self.window}, {self.seconds:.3f} s; "
            f"{self.exactness}; {self.evaluated}"
        )


class Sampled(NamedTuple):
    """x: ``[rows, positions]``; report: what it took."""

    x: Tensor
    report: SampleReport


class DenseNet:
    """A network that is evaluated whole; the same interface as SlicedNet."""

    def __init__(self, cond: Callable[[Tensor], Tensor], order: Tensor, rows: int, dtype: torch.dtype) -> None:
        self.inputs = torch.zeros(rows, len(order), dtype=dtype)
        self._cond = cond
        self._order = order
        self._place = order.argsort()
        self._window = (0, 0)

    def begin(self, start: int, end: int) -> None:
        """Move to the window of places ``[start, end)``."""
        self._window = (start, end)

    def parameters(self) -> Tensor:
        """The parameters of the window's places."""
        return self._cond(self.inputs[:, self._place])[:, self._order[slice(*self._window)]]

    def settle(self, place: int) -> None:
        """Nothing is kept."""


@dataclass
class _Known:
    """What was found out about a network: its units or image rows, or why there are none; places settled per second by window and
    rows; networks that are prepared for so many rows and idle."""

    versions: tuple[int, ...]
    order: Tensor
    parts: Units | Regions | None
    reason: str
    rates: dict[tuple[int, int], list[float]] = field(default_factory=dict)
    nets: dict[int, SlicedNet] = field(default_factory=dict)


_KNOWN: weakref.WeakKeyDictionary[nn.Module, _Known] = weakref.WeakKeyDictionary()


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
    dtype = next((p.dtype for p in cond.parameters() if p.is_floating_point()), torch.float32)
    start, begin = time.perf_counter(), clock()
    known = _known(cond, places, ranks, dtype)
    net = _net(known, cond, rows, dtype)
    size = window if isinstance(window, int) else _window(known, rows, positions)
    exact = (
        "as place by place, bit for bit where values are from a finite set" if tolerance == 0 else f"changes below {tolerance:g}"
    )
    how = f"the whole network each sweep: {known.reason}" if known.parts is None else "only what a window can change was computed"
    report = SampleReport(positions, min(size, positions), exact, how)
    _solve(net, draw, noise[:, places], (report, tolerance), progress=progress)
    report.seconds = time.perf_counter() - start
    known.rates.setdefault((size, rows), []).append(positions / max(clock() - begin, 1e-9))
    del known.rates[size, rows][:-KEPT_RATES]
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


def _known(cond: nn.Module, places: Tensor, ranks: Tensor, dtype: torch.dtype) -> _Known:
    versions = tuple(t._version for t in (*cond.parameters(), *cond.buffers()))
    known = _KNOWN.get(cond)
    if known is None or known.versions != versions or not torch.equal(known.order, torch.stack((places, ranks))):
        known = _KNOWN[cond] = _analysed(cond, places, ranks, dtype)
        known.versions, known.order = versions, torch.stack((places, ranks))
    return known


def _analysed(cond: nn.Module, places: Tensor, ranks: Tensor, dtype: torch.dtype) -> _Known:
    example = torch.zeros(ROWS, len(places), dtype=dtype)
    out = cond(example)
    if not isinstance(out, Tensor) or out.shape[:2] != example.shape:
        found = list(out.shape) if isinstance(out, Tensor) else type(out).__name__
        raise InputError(f"cond must return parameters [rows, positions, ...], here [{ROWS}, {len(places)}, ...]; found {found}")
    firsts = torch.searchsorted(ranks, ranks)  # the first place of each place's group
    try:
        program = capture(cond, (example,), train=False)
        tensors = {**dict(cond.named_parameters(remove_duplicate=False)), **dict(cond.named_buffers(remove_duplicate=False))}
        if any(node.target is torch.ops.aten.convolution.default for node in program.nodes):
            _check_causal(cond, example, places, firsts)
            return _Known((), places, _regions(program, tensors, places, firsts), "")
        units = find_units(program, tensors, places.argsort())
    except (UnsliceableError, HocketError) as error:
        _check_causal(cond, example, places, firsts)
        return _Known((), places, None, str(error).partition("\n")[0])
    ordered = Units(units.banks, units.outputs[places], units.shape)
    late = (ordered.degree_of_outputs() >= firsts).nonzero().flatten().tolist()
    if late:
        reads = int(ordered.degree_of_outputs()[late[0]])
        raise InputError(_not_causal(int(places[late[0]]), int(places[reads])))
    return _Known((), places, ordered, "")


def _regions(program: Program, tensors: dict[str, Tensor], places: Tensor, firsts: Tensor) -> Regions:
    """The rows of the image that a convolutional network works on, one row after the other."""
    in_order = torch.arange(len(places))
    if not (torch.equal(places, in_order) and torch.equal(firsts, in_order)):
        raise UnsliceableError("convolutions are followed for pixels drawn row by row only, one at a time")
    return find_regions(program, tensors, len(places))


def _net(known: _Known, cond: nn.Module, rows: int, dtype: torch.dtype) -> SlicedNet | RegionNet | DenseNet:
    match known.parts:
        case Units():
            net = known.nets.pop(rows, None) or SlicedNet(known.parts, rows, dtype)
            net.restart()
            return net
        case Regions():
            return RegionNet(known.parts, rows, dtype)
    return DenseNet(cond, known.order[0], rows, dtype)


def _check_causal(cond: nn.Module, example: Tensor, places: Tensor, firsts: Tensor) -> None:
    """Change some positions and see that no parameters generated up to then change. A sample of them: a check, not a proof."""
    generator = torch.Generator().manual_seed(0)
    base = torch.rand(example.shape, generator=generator).to(example.dtype)
    expected = cond(base)[:, places]
    for place in torch.randint(len(places), (8,), generator=generator).tolist():
        changed = base.clone()
        changed[:, places[place]] += 1.0
        moved = (cond(changed)[:, places] != expected).reshape(ROWS, len(places), -1).any(dim=2).any(dim=0)
        early = (moved & (firsts <= place)).nonzero().flatten().tolist()
        if early:
            raise InputError(_not_causal(int(places[early[0]]), int(places[place])))


def _not_causal(position: int, later: int) -> str:
    return (
        f"cond's parameters of position {position} depend on position {later}, which is not generated before it; "
        "give the order the network was made for as order="
    )


def _window(known: _Known, rows: int, positions: int) -> int:
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
