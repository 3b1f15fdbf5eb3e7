"""Which rings suit two programs: those in which the primes under the roots of their literals have true roots."""

from __future__ import annotations

import torch.fx as fx

from ...program import Program
from .arithmetic import ring_of
from .literals import read
from .tables import MORE_PRIMES, PRIMES


def literal_primes(program: Program) -> set[int]:
    """Primes under roots in the numbers that stand in the graph, and in the head sizes of attention kernels."""
    found: set[int] = set()
    numbers: list[float] = []
    for node in program.nodes:
        fx.node.map_aggregate((node.args, node.kwargs), lambda a: numbers.append(a) if isinstance(a, float) else None)
    for number in set(numbers):
        if number == number and abs(number) != float("inf"):
            found.update(prime for prime, _ in read(number).quarter_powers)
    return found


def rings_for(original: Program, transformed: Program) -> tuple[int, ...]:
    """Values of p: the default pair where it holds all roots, else every ring that does, else the default pair (where a root that
    is missing stands for itself: a scale split into two such roots would be a false alarm)."""
    primes = literal_primes(original) | literal_primes(transformed)
    suitable = tuple(p for p in (*PRIMES, *MORE_PRIMES) if all(ring_of(p).has_fourth_root(prime) for prime in primes))
    return suitable[:2] if suitable else PRIMES
