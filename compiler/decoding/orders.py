"""``hocket.locality_order``: groups of positions to draw together (locality-aware parallel decoding, LPD, arXiv 2507.01957).

    proximity(p) = sum of closeness(p, d) over positions d drawn before and near p          large: p is known well from them
    closeness(p, q) small among the members of a group                                      p and q tell little of each other

A group takes first what has enough drawn neighbours, best first, and no neighbour among the group's own members; what is missing is
filled up with the positions farthest from the members (farthest-point sampling). Groups grow like 1 - cos: little is known at the
beginning, so few positions are drawn at once.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..errors import InputError

NEIGHBOUR = 0.7
"""Closeness from which two positions are neighbours: pixels that touch, diagonal ones (0.707) included."""

KNOWN_WELL = 1.0
"""Proximity from which a position is drawn for its neighbours' sake: one adjacent pixel."""


def locality_order(sizes: Sequence[int], steps: int, *, closeness: Tensor | None = None, seed: int = 0) -> list[list[int]]:
    """Groups for ``hocket.sample(..., order=groups)`` and for training a network that draws them.

    sizes: of the grid that the positions fill, row by row: ``(28, 28)``, or ``(64,)`` for a line. steps: number of groups.
    closeness: symmetric ``[positions, positions]``, how much two positions tell of each other, where 1 is as much as adjacent
    pixels do (attention weights, mutual information); by default 1 / distance on the grid. seed: of the first position, of ties.

    Returns ``steps`` lists that hold every position once; the k first of them hold about 1 - cos(pi k / (2 steps)) of them all.
    A network draws them at once only if it was trained to, without seeing one member from another. Raises InputError for sizes that
    are no grid, steps that are not 1 .. positions, or a closeness that does not fit.
    """
    count = _positions(sizes)
    if isinstance(steps, bool) or not isinstance(steps, int) or not 1 <= steps <= count:
        raise InputError(f"steps must be a number from 1 to the {count} positions of a grid {list(sizes)}; found {steps!r}")
    close = _of_grid(sizes) if closeness is None else _checked(closeness, count)
    ties = torch.rand(count, generator=torch.Generator().manual_seed(seed)) * 1e-6
    near = torch.where(close >= NEIGHBOUR, close, 0.0)
    proximity = ties.clone()
    groups: list[list[int]] = []
    for size in group_sizes(count, steps):
        groups.append(_group(close, proximity, size))
        proximity = proximity + near[:, groups[-1]].sum(1)
        proximity[groups[-1]] = -math.inf  # drawn
    return groups


def group_sizes(count: int, steps: int) -> list[int]:
    """How many positions each group holds, at least one, smallest first."""
    ends = [round(count * (1 - math.cos(math.pi * k / (2 * steps)))) for k in range(steps + 1)]
    for k in range(1, steps + 1):
        ends[k] = min(max(ends[k], ends[k - 1] + 1), count - (steps - k))
    return sorted(after - before for before, after in itertools.pairwise(ends))


def _group(close: Tensor, proximity: Tensor, size: int) -> list[int]:
    """The next group. proximity: to what is drawn, -inf for what is drawn."""
    is_free = proximity > -math.inf
    worst = torch.where(is_free, 0.0, math.inf)  # of every position, closeness to the nearest member
    group: list[int] = []
    wanted = torch.where(proximity >= KNOWN_WELL, proximity, -math.inf)
    while len(group) < size:
        best = int(torch.where(worst < NEIGHBOUR, wanted, -math.inf).argmax())
        if wanted[best] == -math.inf or worst[best] >= NEIGHBOUR:
            lowest = worst.min()
            best = int(torch.where(worst == lowest, proximity, -math.inf).argmax())  # farthest; among equals the best known
        group.append(best)
        worst = torch.maximum(worst, close[best])
        worst[best] = math.inf
    return group


def _positions(sizes: Sequence[int]) -> int:
    if not sizes or not all(type(n) is int and n > 0 for n in sizes):
        raise InputError(f"sizes must be those of a grid, such as (28, 28); found {sizes!r}")
    return math.prod(sizes)


def _of_grid(sizes: Sequence[int]) -> Tensor:
    """1 / distance; 0 of a position to itself."""
    places = torch.cartesian_prod(*[torch.arange(n, dtype=torch.float64) for n in sizes]).reshape(-1, len(sizes))
    distance = torch.cdist(places, places, compute_mode="donot_use_mm_for_euclid_dist")
    return torch.where(distance > 0, 1 / distance, 0.0)


def _checked(closeness: Tensor, count: int) -> Tensor:
    found = closeness.detach().double().cpu()
    if found.shape != (count, count) or not bool(torch.isfinite(found).all()) or bool((found < 0).any()):
        raise InputError(
            f"closeness must be [{count}, {count}], finite and not negative; found {list(closeness.shape)} with entries from "
            f"{found.min() if found.numel() else 0:g} to {found.max() if found.numel() else 0:g}"
        )
    if not torch.allclose(found, found.t()):
        raise InputError("closeness must be symmetric: how much two positions tell of each other has no direction")
    return found.clone().fill_diagonal_(0.0)
