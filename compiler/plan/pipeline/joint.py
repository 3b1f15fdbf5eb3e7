"""Search everything together: where to cut the model, which rank holds which stages, sizes of micro-batches, pieces of weight
gradients, recomputation, and the order.

Structures (placement, chunks) are scored with balanced cuts by a few list schedules. From the best ones a hill climb changes one
choice at a time: a cut by one unit, the taper, the pieces, recomputation. The order of the winners is then searched in depth.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from ....runtime.errors import InputError
from .bounds import lower_bound
from .chain import Chain
from .chunked_forms import loop_placement, v_placement
from .improve import Effort
from .problem import INFINITE, Problem, arrays
from .synthesise import HABITS, Synthesis, construct, synthesise
from .taper import is_even, tapers

PLACEMENTS = ("straight", "v", "loop")


@dataclass(frozen=True)
class Space:
    """What may be chosen.

    placements: of PLACEMENTS; chunks: stages per rank; pieces: of a stage's weight gradient; granularity: samples of a full
    micro-batch (1: all micro-batches are equal); recompute: whether forwards may be run again to save memory.
    """

    placements: tuple[str, ...] = PLACEMENTS
    chunks: tuple[int, ...] = (2,)
    pieces: tuple[int, ...] = (1, 2)
    granularity: int = 1
    recompute: bool = False


@dataclass(frozen=True)
class Choice:
    """One point of the space."""

    placement: str
    chunks: int
    cuts: tuple[int, ...]
    pieces: int = 1
    sizes: tuple[float, ...] = ()
    recomputed: frozenset[int] = frozenset()

    def __str__(self) -> str:
        text = f"{self.placement}, {self.chunks} stage{'s' * (self.chunks > 1)} per rank, cuts {list(self.cuts)}"
        text += f", weight gradients in {self.pieces} pieces" if self.pieces > 1 else ""
        text += f", micro-batches {' '.join(f'{size:g}' for size in self.sizes)}" if not is_even(self.sizes) else ""
        return text + (f", recomputing stages {sorted(self.recomputed)}" if self.recomputed else "")


@dataclass(frozen=True)
class JointPlan:
    """The best found. reasons: one line for everything that was weighed, with its simulated seconds."""

    choice: Choice
    synthesis: Synthesis
    reasons: tuple[str, ...]


@dataclass
class _Search:
    chain: Chain
    ranks: int
    micro_batches: int
    limits: tuple[float, ...]
    space: Space
    scores: dict[Choice, float] = field(default_factory=dict)

    def problem(self, choice: Choice) -> Problem:
        """The scheduling problem of a choice."""
        placement = placement_of(choice.placement, self.ranks, choice.chunks)
        count = len(choice.sizes) or self.micro_batches
        costs = self.chain.cut(choice.cuts, choice.pieces)
        return Problem(costs, placement, count, self.limits, choice.sizes, choice.recomputed)

    def score(self, choice: Choice) -> float:
        """Seconds of a few list schedules; infinite where it does not fit in memory."""
        if choice not in self.scores:
            try:
                found = arrays(self.problem(choice))
            except InputError:
                self.scores[choice] = INFINITE
            else:
                self.scores[choice] = construct(found, lower_bound(found), habits=HABITS[:3]).seconds
        return self.scores[choice]

    def structures(self) -> Iterator[Choice]:
        """Placements and chunks with balanced cuts; recomputing everything too, where that is allowed."""
        for name in self.space.placements:
            for chunks in (1,) if name == "straight" else self.space.chunks:
                stages = self.ranks * chunks
                if stages > len(self.chain.units) or (name == "v" and chunks != 2) or (name == "loop" and chunks < 2):
                    continue
                base = Choice(name, chunks, self.chain.balanced(stages), self.space.pieces[0])
                yield base
                if self.space.recompute:
                    yield replace(base, recomputed=frozenset(range(stages)))

    def neighbours(self, choice: Choice) -> Iterator[Choice]:
        """Choices that differ in one thing, the ones that tend to matter first."""
        if self.space.granularity > 1:
            for sizes in tapers(self.micro_batches, self.space.granularity):
                yield replace(choice, sizes=() if is_even(sizes) else sizes)
        bounds = [0, *choice.cuts, len(self.chain.units)]
        for place in range(1, len(bounds) - 1):
            for step in (-1, 1):
                if bounds[place - 1] < bounds[place] + step < bounds[place + 1]:
                    moved = [*choice.cuts[: place - 1], choice.cuts[place - 1] + step, *choice.cuts[place:]]
                    yield replace(choice, cuts=tuple(moved))
        for pieces in self.space.pieces:
            yield replace(choice, pieces=pieces)
        if self.space.recompute:
            for stage in range(len(choice.cuts) + 1):
                yield replace(choice, recomputed=choice.recomputed ^ {stage})

    def climb(self, choice: Choice, deadline: float) -> Choice:
        """First improvement until nothing improves or time is up."""
        improved = True
        while improved:
            improved = False
            for other in self.neighbours(choice):
                if time.monotonic() > deadline:
                    return choice
                if self.score(other) < self.score(choice) * (1 - 1e-9):
                    choice, improved = other, True
                    break
        return choice


def placement_of(name: str, ranks: int, chunks: int) -> tuple[int, ...]:
    """Stage -> rank. InputError for an unknown name."""
    match name:
        case "straight":
            return tuple(range(ranks))
        case "v":
            return v_placement(ranks)
        case "loop":
            return loop_placement(ranks, chunks)
        case _:
            raise InputError(f"expected one of the placements {', '.join(PLACEMENTS)}; found {name!r}")


def search_jointly(
    chain: Chain,
    ranks: int,
    micro_batches: int,
    limits: tuple[float, ...] = (),
    space: Space | None = None,
    effort: Effort | None = None,
) -> JointPlan:
    """The best plan found within the effort.

    limits: bytes of activations per rank (none: unlimited). InputError when there are more ranks than units, and when no choice
    fits in memory, naming the least that would.
    """
    space, effort = space or Space(), effort or Effort(8.0)
    if ranks > len(chain.units):
        raise InputError(f"expected at most {len(chain.units)} ranks, since the model has {len(chain.units)} units; found {ranks}")
    search = _Search(chain, ranks, micro_batches, limits, space)
    start = time.monotonic()
    starts = sorted(search.structures(), key=search.score)
    if search.score(starts[0]) == INFINITE:
        arrays(search.problem(starts[0]))
    best = starts[:2]
    for number, choice in enumerate(best):
        best[number] = search.climb(choice, start + effort.seconds * (0.3 + 0.2 * number))
    best.sort(key=search.score)
    share = max(0.2, start + effort.seconds - time.monotonic()) / len(best)
    finals = [(synthesise(search.problem(choice), replace(effort, seconds=share)), choice) for choice in best]
    winner, choice = min(finals, key=lambda pair: pair[0].seconds)
    return JointPlan(choice, winner, _reasons(search, finals))


def _reasons(search: _Search, finals: list[tuple[Synthesis, Choice]]) -> tuple[str, ...]:
    lines = [f"{synthesis} ({choice})" for synthesis, choice in sorted(finals, key=lambda pair: pair[0].seconds)]
    ranked = sorted(search.scores.items(), key=lambda item: item[1])
    lines += [f"list schedule {seconds:.6g} s: {choice}" for choice, seconds in ranked if seconds < INFINITE]
    refused = [choice for choice, seconds in ranked if seconds == INFINITE]
    return (*lines, *(f"does not fit in memory: {choice}" for choice in refused))
