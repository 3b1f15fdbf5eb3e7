"""The five figures that every plan and every pass is judged by."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

Quantity = Any
"""A float, or a sympy expression of named sizes until it is evaluated."""


@dataclass(frozen=True)
class Cost:
    """Per rank and step.

    seconds: predicted time; flops: floating-point operations; bytes_moved: to and from memory; bytes_on_wire: sent by one rank;
    peak_bytes: most bytes held at once.
    """

    seconds: Quantity = 0.0
    flops: Quantity = 0.0
    bytes_moved: Quantity = 0.0
    bytes_on_wire: Quantity = 0.0
    peak_bytes: Quantity = 0.0

    def __add__(self, other: Cost) -> Cost:
        return Cost(
            self.seconds + other.seconds,
            self.flops + other.flops,
            self.bytes_moved + other.bytes_moved,
            self.bytes_on_wire + other.bytes_on_wire,
            self.peak_bytes + other.peak_bytes,
        )
