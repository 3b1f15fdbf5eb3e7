"""A model as a chain of indivisible units (layers, or the pieces between narrow cuts) that stages are made of."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field

from ....runtime.errors import InputError
from .costs import LinkCosts, PipelineCosts, StageCosts


@dataclass(frozen=True)
class Chain:
    """Costs of every unit for a full micro-batch, of the links, and of an instruction whatever its size."""

    units: tuple[StageCosts, ...]
    link: LinkCosts = field(default_factory=LinkCosts)
    fixed: float = 0.0

    def cut(self, cuts: Sequence[int], pieces: int = 1) -> PipelineCosts:
        """Costs of the stages between cuts: stage i holds the units ``cuts[i] .. cuts[i+1]-1``; its weight gradient in pieces.

        A stage has no more pieces than units; each piece is a run of units of about equal work.
        """
        bounds = [0, *cuts, len(self.units)]
        if any(b <= a for a, b in itertools.pairwise(bounds)):
            raise InputError(f"every stage needs at least one of the {len(self.units)} units; found the cuts {list(cuts)}")
        stages = tuple(_merged(self.units[a:b], pieces) for a, b in itertools.pairwise(bounds))
        return PipelineCosts(stages, self.link, self.fixed)

    def balanced(self, stages: int) -> tuple[int, ...]:
        """Cuts that make the heaviest stage as light as possible, counting what it sends and receives."""
        work = [unit.work for unit in self.units]
        sends = [self.link.sending(unit.boundary) + self.link.receiving(unit.boundary) for unit in self.units]
        return balance(work, sends, stages)


def _merged(units: Sequence[StageCosts], pieces: int) -> StageCosts:
    parts = _pieces(units, min(pieces, len(units)))
    recomputable = all(unit.recompute is not None for unit in units)
    return StageCosts(
        forward=sum(unit.forward for unit in units),
        backward_input=sum(unit.backward_input for unit in units),
        backward_weight=tuple(sum(sum(unit.backward_weight) for unit in part) for part in parts),
        recompute=sum(unit.recompute or 0.0 for unit in units) if recomputable else None,
        activation=sum(unit.activation for unit in units),
        held=tuple(sum(sum(unit.held) for unit in part) for part in parts),
        stash=units[0].stash,
        boundary=units[-1].boundary,
    )


def _pieces(units: Sequence[StageCosts], count: int) -> list[Sequence[StageCosts]]:
    """Runs of units, the last ones first: their gradients are ready first."""
    cuts = balance([sum(unit.backward_weight) for unit in units], [0.0] * len(units), count)
    bounds = [0, *cuts, len(units)]
    return [units[a:b] for a, b in itertools.pairwise(bounds)][::-1]


def balance(work: Sequence[float], sends: Sequence[float], parts: int) -> tuple[int, ...]:
    """Cut a chain into contiguous parts; the largest part's work, and what crosses its two borders, is the least possible.

    work: of every unit; sends: cost of cutting after a unit, paid by both sides. Dynamic programming, O(parts * units^2).
    InputError when there are fewer units than parts.
    """
    count = len(work)
    if parts < 1 or count < parts:
        raise InputError(f"expected at most {count} stages, since the model has {count} units to cut between; found {parts}")
    before = [0.0]
    for amount in work:
        before.append(before[-1] + amount)

    def cost(a: int, b: int) -> float:
        entering = sends[a - 1] if a else 0.0
        leaving = sends[b - 1] if b < count else 0.0
        return before[b] - before[a] + entering + leaving

    best = [cost(0, b) if b else float("inf") for b in range(count + 1)]
    choice: list[list[int]] = []
    for part in range(1, parts):
        row, chosen = [float("inf")] * (count + 1), [0] * (count + 1)
        for b in range(part + 1, count + 1):
            for a in range(part, b):
                value = max(best[a], cost(a, b))
                if value < row[b]:
                    row[b], chosen[b] = value, a
        best = row
        choice.append(chosen)
    cuts, end = [], count
    for chosen in reversed(choice):
        end = chosen[end]
        cuts.append(end)
    return tuple(reversed(cuts))
