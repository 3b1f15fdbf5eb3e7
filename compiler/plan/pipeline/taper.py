"""Uneven micro-batches: small ones first and last fill and drain the pipeline sooner.

The first stage can hand on a small micro-batch early, so the others start earlier; and the last backward of a small one reaches
stage 0 sooner. In between, full ones keep the fixed cost of an instruction low. The total is unchanged; a loss that weighs tokens
equally does not notice.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from fractions import Fraction

from ....runtime.errors import InputError


def taper(total: int, rise: int, fall: int, granularity: int) -> tuple[float, ...]:
    """Sizes that sum to ``total`` full micro-batches: a ramp of ``rise`` steps up, full ones, a ramp of ``fall`` steps down.

    granularity: samples of a full micro-batch; every size is a whole number of samples. InputError where the ramps do not fit.
    """
    if total < 1 or granularity < 1 or rise < 0 or fall < 0:
        raise InputError(f"a taper needs positive totals and granularity; found total {total}, granularity {granularity}")
    up, down = _ramp(rise, granularity), _ramp(fall, granularity)[::-1]
    samples = total * granularity - sum(up) - sum(down)
    if samples < 0:
        raise InputError(f"ramps of {rise} and {fall} steps do not fit into {total} micro-batches of {granularity} samples")
    full, rest = divmod(samples, granularity)
    middle = [granularity] * full
    sizes = sorted([*up, rest]) if rest else list(up)
    return tuple(float(Fraction(size, granularity)) for size in [*sizes, *middle, *down])


def _ramp(steps: int, granularity: int) -> list[int]:
    """Sizes between nothing and full, ascending, each at least one sample."""
    return [max(1, round(granularity * (step + 1) / (steps + 1))) for step in range(steps)]


def tapers(total: int, granularity: int, most: int = 6) -> Iterator[tuple[float, ...]]:
    """Different tapers of a total, the even split first."""
    seen: set[tuple[float, ...]] = set()
    for rise in range(min(most, total) + 1):
        for fall in sorted({0, rise // 2, rise}):
            try:
                sizes = taper(total, rise, fall, granularity)
            except InputError:
                continue
            if sizes not in seen:
                seen.add(sizes)
                yield sizes


def is_even(sizes: Sequence[float]) -> bool:
    """Whether all micro-batches are full ones."""
    return all(size == 1.0 for size in sizes)
