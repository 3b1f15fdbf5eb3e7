"""How many tokens to evaluate at once: the size with the most tokens settled per second, from what has been seen so far."""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

from ..errors import InputError

SIZES = (1, 2, 4, 8, 16, 32)
TRIES, FAR_BEHIND = 3, 2.0
LOOK = 16  # every so many sweeps, look one size further: what is not tried shows nothing
FORGET = 0.97  # weight of the past after each sweep: text changes its nature


@dataclass
class Window:
    """A fixed size, or with ``size=None`` the best of SIZES.

    A sweep of n tokens settles sum over k of P(the first k guesses are right), k < n; the probabilities are counted from sweeps
    made, and continue geometrically beyond the longest. Its cost is measured; each size is tried early once, since a trial costs
    little: every sweep settles a token at least.
    """

    size: int | None
    _reached: list[float] = field(default_factory=lambda: [0.0] * SIZES[-1], repr=False)
    _survived: list[float] = field(default_factory=lambda: [0.0] * SIZES[-1], repr=False)
    _seconds: dict[int, float] = field(default_factory=dict, repr=False)
    _sweeps: int = 0

    def next_size(self) -> int:
        """Tokens of the next sweep."""
        if self.size is not None:
            return self.size
        untried = [n for n in (8, 1, 4, 16, 2, 32) if n not in self._seconds and self._worth_trying(n)]
        if untried:
            return untried[0]
        best = max(self._seconds, key=lambda n: self.expected(n) / self._seconds[n])
        is_look = self._sweeps % LOOK == LOOK - 1
        return min(2 * best, SIZES[-1]) if is_look else best

    def observe(self, size: int, right: list[int], seconds: float) -> None:
        """One sweep: how many of the ``size - 1`` guesses of each row were right, and what it took."""
        if self.size is not None:
            return
        self._sweeps += 1
        known = self._seconds.get(size)
        self._seconds[size] = seconds if known is None else min(seconds, 0.9 * known + 0.1 * seconds)
        for k in range(size - 1):
            reached = sum(count >= k for count in right)
            self._reached[k] = FORGET * self._reached[k] + reached
            self._survived[k] = FORGET * self._survived[k] + sum(count > k for count in right)

    def expected(self, size: int) -> float:
        """Tokens that a sweep of so many is expected to settle."""
        total, alive, rate = 1.0, 1.0, 0.5
        for k in range(size - 1):
            if self._reached[k] >= 1:
                rate = self._survived[k] / self._reached[k]
            alive *= rate
            total += alive
        return total

    def _worth_trying(self, size: int) -> bool:
        """Larger sizes only where guesses reach that far."""
        return size <= 8 or self.expected(size) > 1.15 * self.expected(size // 2)


def window_for(window: int | str) -> Window:
    """A size, or ``"auto"``; InputError for anything else."""
    if window == "auto":
        return Window(None)
    if isinstance(window, bool) or not isinstance(window, int) or window < 1:
        raise InputError(f'window must be a number of tokens from 1 up, or "auto"; found {window!r}')
    return Window(window)


_LEARNED: weakref.WeakKeyDictionary[object, dict[tuple[object, ...], Window]] = weakref.WeakKeyDictionary()
MOST_LEARNED = 16


def learned_window(lm: object, use: tuple[object, ...]) -> Window:
    """The window that earlier decodings of a model have tuned for one use (rows, temperature, draft): sizes are tried once."""
    if not isinstance(lm, nn.Module):
        return Window(None)  # refused later, by name
    kept = _LEARNED.setdefault(lm, {})
    if use not in kept:
        while len(kept) >= MOST_LEARNED:
            kept.pop(next(iter(kept)))
        kept[use] = Window(None)
    return kept[use]


def best_size(sizes: Sequence[int], rates: Callable[[int], Sequence[float]]) -> int:
    """The size to use next, given the places a second that each has settled so far: the best, once all were tried.

    Every size is tried once, and those that do not fall far behind some times more: the first call of a size prepares it.
    """
    untried = next((size for size in sizes if not rates(size)), None)
    if untried is not None:
        return untried
    best = {size: max(rates(size)) for size in sizes}
    close = (size for size in sizes if len(rates(size)) < TRIES and best[size] * FAR_BEHIND > max(best.values()))
    return next(close, max(sizes, key=lambda size: best[size]))


def clock() -> float:
    """CPU seconds where one thread does all the work, so that a busy machine misleads nobody; wall seconds otherwise."""
    return time.process_time() if torch.get_num_threads() == 1 and not torch.cuda.is_initialized() else time.perf_counter()
