"""The order in which a rank runs a segment: every wait as late as possible, right before the first step that needs its value.

    issue a; wait a; f; issue b; wait b; g(a, b)      ->      issue a; f; issue b; wait a; wait b; g(a, b)

Collectives stay where they are, so all ranks enter them in the same order. Between issue and wait a rank computes, and a rank that
is ahead or behind for a moment keeps nobody waiting: gradients, which nothing reads before the end, are waited for at the end.
"""

from __future__ import annotations

from collections.abc import Iterable

from .load import WAITING, LoadedProgram, Step
from .program import Segment


def late_waits(loaded: LoadedProgram, segment: Segment) -> list[Step]:
    """The steps of a segment in that order. A value that only a later segment or the caller needs is waited for at the end."""
    return waiting_late(loaded.steps[segment.start : segment.stop])


def waiting_late(steps: Iterable[Step]) -> list[Step]:
    """The same for steps in program order, whatever each of them does."""
    ordered: list[Step] = []
    held: dict[int, Step] = {}
    for step in steps:
        ordered += [held.pop(position) for position in dict.fromkeys(step.inputs) if position in held]
        if step.kind == WAITING and step.output >= 0:
            held[step.output] = step
        else:
            ordered.append(step)
    return [*ordered, *held.values()]
