"""Cutting an instruction list into the ranges that a compiler may fuse: no collective, no wait, no random draw inside.

    a region      consecutive instructions of one segment; it reads ``inputs``, leaves ``outputs`` behind and frees ``frees``

Everything between is a value that only the region sees. Instructions keep their order, so a region may be run as one call or
instruction by instruction, with the same results.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

from .instruction import Instruction
from .ops import COLLECTIVES, WAIT, is_random, overload_of
from .program import RankProgram, Segment
from .tile_loop import TILE_LOOP

MIN_WORK = 2
"""Instructions that compute something (views do not) below which a region is not worth a call of its own."""


class Region(NamedTuple):
    """Instructions ``start .. stop-1``. inputs: slots read from outside; outputs: slots written here and read later."""

    start: int
    stop: int
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    frees: tuple[int, ...]


def regions(program: RankProgram) -> tuple[Region, ...]:
    """All regions worth compiling, in order: maximal, within one segment each."""
    found = []
    for segment in program.segments:
        for start, stop in _ranges(program, segment):
            region = _region(program.instructions, start, stop)
            if region.outputs and _work(program, start, stop) >= MIN_WORK:
                found.append(region)
    return tuple(found)


def is_boundary(ins: Instruction) -> bool:
    """Whether an instruction must stay by itself: it talks to other ranks, or two compilers may draw other numbers."""
    return ins.op in COLLECTIVES or ins.op in (WAIT, TILE_LOOP) or is_random(ins.op)


def _ranges(program: RankProgram, segment: Segment) -> Iterator[tuple[int, int]]:
    start = segment.start
    for index in range(segment.start, segment.stop):
        if is_boundary(program.instructions[index]):
            if index > start:
                yield start, index
            start = index + 1
    if segment.stop > start:
        yield start, segment.stop


def _work(program: RankProgram, start: int, stop: int) -> int:
    return sum(not _is_view(program.instructions[index]) for index in range(start, stop))


def _is_view(ins: Instruction) -> bool:
    returns: list[Any] = overload_of(ins.op)._schema.returns
    return any(result.alias_info is not None for result in returns)


def _region(instructions: tuple[Instruction, ...], start: int, stop: int) -> Region:
    written: set[int] = set()
    inputs: dict[int, None] = {}
    freed: set[int] = set()
    for ins in instructions[start:stop]:
        inputs.update(dict.fromkeys(s for s in ins.reads if s not in written))
        written.update(slot for slot in ins.outputs if slot >= 0)
        freed.update(ins.frees)
    outputs = tuple(sorted(written - freed))
    return Region(start, stop, tuple(inputs), outputs, tuple(sorted(freed - written)))


@dataclass
class Report:
    """What became of the regions of a program on one rank. failures: (source line, reason), one per distinct failure."""

    instructions: int = 0
    regions: int = 0
    compiled: int = 0
    fused: int = 0
    distinct: int = 0
    failures: list[tuple[str, str]] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """Plain data; ``Report(**data)`` restores it."""
        return asdict(self)

    def __str__(self) -> str:
        text = (
            f"inductor: {self.fused} of {self.instructions} instructions run in {self.compiled} compiled regions "
            f"({self.distinct} distinct)"
        )
        if self.regions > self.compiled:
            text += f"; {self.regions - self.compiled} regions run uncompiled"
        return text + "".join(f"\n  not compiled, {source}: {reason}" for source, reason in self.failures)


def summary(reports: Sequence[bytes]) -> Report | None:
    """The report of all ranks: the first rank's numbers, everybody's failures. None where nothing was to be compiled."""
    found = [Report(**json.loads(text)) for text in reports if text]
    if not found:
        return None
    failures = {(source, reason): None for report in found for source, reason in report.failures}
    worst = min(found, key=lambda report: report.compiled)
    worst.failures = list(failures)
    return worst
