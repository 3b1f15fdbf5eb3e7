"""What is known of a chain at its shapes: what was measured, what is being tried, and what was chosen.

A contender is a number: 0 the loop, NATIVE torch's own kernel, and w > 0 blocks of w steps.
"""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass, field
from typing import Any

import torch

from .how import How
from .steps import Chain

LOOP, NATIVE = 0, -1
LOOK_AGAIN = 64
"""Calls after which a choice is looked at again (doubled each time, so that looking costs nothing in the end)."""


@dataclass
class Known:
    """What is known of one chain at its shapes.

    merge: steps, inf where trajectories do not meet; memory: a word about it; window: the chosen contender; reason: why it was;
    warm: steps ahead of every block; trials: contenders still to be tried in this turn; turns: the seconds that each took, turn by
    turn, None for those before it joined; rounds: turns that are left; tried: the merge length for which contenders were last
    tried, -1 for none.
    """

    costs: dict[int, float] = field(default_factory=dict)
    merge: float = math.inf
    window: int = LOOP
    warm: int = 0
    reason: str = ""
    wait: int = LOOK_AGAIN
    calls: int = 0
    is_measured: bool = False
    trials: list[int] = field(default_factory=list)
    turns: dict[int, list[float | None]] = field(default_factory=dict)
    rounds: int = 0
    tried: float = -1.0
    memory: str = ""

    def beside_loop(self, contender: int) -> float:
        """Time of a contender over that of the loop: the median of its turns but the first, which makes plans for the sizes."""
        pairs = [pair for pair in zip(self.turns[contender], self.turns[LOOP], strict=False) if pair[0] is not None]
        return statistics.median(seconds / plain for seconds, plain in (pairs[1:] or pairs) if seconds is not None and plain)

    def spent(self) -> float:
        """Seconds that the turns took, those that fell back left out."""
        return sum(s for taken in self.turns.values() for s in taken if s is not None and s < math.inf)


_KNOWN: dict[tuple[Any, ...], Known] = {}
_MOST_KNOWN = 256


def key_of(chain: Chain, how: How) -> tuple[Any, ...]:
    """What a decision depends on, the values left out: body, sizes, exactness and threads."""
    shapes = tuple((tuple(t.shape), t.dtype, t.device) for t in (*chain.init, *chain.shared, *chain.streams))
    return chain.body.text, chain.count, shapes, how.exact, how.native, torch.get_num_threads()


def knowledge(chain: Chain, how: How) -> Known:
    """What this process knows of a chain."""
    key = key_of(chain, how)
    if key not in _KNOWN:
        while len(_KNOWN) >= _MOST_KNOWN:
            _KNOWN.pop(next(iter(_KNOWN)))
        _KNOWN[key] = Known()
    return _KNOWN[key]


def is_trying() -> bool:
    """Whether some chain of this process has contenders left to try."""
    return any(known.trials for known in _KNOWN.values())


def forget() -> None:
    """Measure every chain anew in this process."""
    _KNOWN.clear()
