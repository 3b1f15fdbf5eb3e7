"""What the ring check found, and how sure it is."""

from __future__ import annotations

import enum
from dataclasses import dataclass

from ...program import Role


class Status(enum.StrEnum):
    """equal: no output differs on any draw; different: one does; unsupported: an op has no meaning in the ring; poison: every draw
    divided by zero, so nothing was shown."""

    EQUAL = "equal"
    DIFFERENT = "different"
    UNSUPPORTED = "unsupported"
    POISON = "poison"


@dataclass(frozen=True)
class Difference:
    """One output that differs. index: its first differing entry, None where shapes, replicas or presence differ; ranks: replicas
    that disagree; entries: how many of ``total`` entries differ."""

    role: Role
    reason: str
    index: tuple[int, ...] | None = None
    entries: int = 0
    total: int = 0
    ranks: tuple[int, ...] = ()

    def __str__(self) -> str:
        where = "" if self.index is None else f" first at {list(self.index)}, {self.entries} of {self.total} entries"
        return f"{self.role}: {self.reason}{where}"


@dataclass(frozen=True)
class Bound:
    """Probability that a differing entry was missed on all draws.

    rigorous: only for rational programs of known degree (Schwartz-Zippel in both components); otherwise the measured rate of a
    single comparison with exponentials, 1/p^2 a draw, which is a heuristic and no theorem.
    """

    probability: float
    rigorous: bool
    degree: int | None
    explanation: str


@dataclass(frozen=True)
class RingVerdict:
    """Result of ``compare``. sensitivity: treatments that equality relied on (``hash:erf``, ``root``, ``order``, ``settle``);
    rings: the p of each ring; draws: evaluations made; canonical: the programs were rewritten to a canonical form first."""

    status: Status
    differences: tuple[Difference, ...] = ()
    reason: str = ""
    bound: Bound | None = None
    sensitivity: frozenset[str] = frozenset()
    rings: tuple[int, ...] = ()
    draws: int = 0
    canonical: bool = False

    @property
    def equal(self) -> bool:
        """Whether equality was shown."""
        return self.status is Status.EQUAL

    def __str__(self) -> str:
        detail = "; ".join(map(str, self.differences)) or self.reason
        return f"{self.status}{': ' + detail if detail else ''}"
