"""What a solve did: for the user's report, for tests, and for the decision about the next one."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass


@dataclass(frozen=True)
class ChainReport:
    """One chain, solved once.

    solver: what ran, such as ``"blocks:32"``; steps: batched steps done one after the other (the sequential loop does ``count``);
    sweeps: passes over the chain; residual: the largest change of a state in the last sweep, at the places that were compared, 0
    where the result is exact by construction; contraction: factor by which differences shrank per step, None where not seen;
    exact_prefix: steps known to be those of the loop bit by bit up to the order of sums in a kernel; fell_back: why the rest ran
    as a loop, or "".
    """

    solver: str
    count: int
    steps: int
    sweeps: int
    residual: float = 0.0
    contraction: float | None = None
    exact_prefix: int = 0
    fell_back: str = ""

    @property
    def error_estimate(self) -> float:
        """Distance to the solution, from the residual r and the contraction rho: r / (1 - rho)."""
        if self.residual == 0.0:
            return 0.0
        if self.contraction is None or self.contraction >= 1.0:
            return float("inf")
        return self.residual / (1.0 - self.contraction)

    def __str__(self) -> str:
        text = f"{self.solver}: {self.steps} batched steps for {self.count}, {self.sweeps} sweeps, residual {self.residual:.1e}"
        return text + (f"; fell back: {self.fell_back}" if self.fell_back else "")


RECENT: deque[ChainReport] = deque(maxlen=64)
"""The latest solves of this process, oldest first."""
