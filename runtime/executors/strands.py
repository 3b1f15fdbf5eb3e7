"""Ranks with programs of their own in one process: each runs until it must wait for another, round after round."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from ..errors import CollectiveMismatch, HocketError, InputError
from ..load import COMPUTE, WAITING, LoadedProgram, load
from ..program import RankProgram, Segment
from .failure import place, rank_failed
from .rendezvous import Arrival, RankEnd, Rendezvous

Row = Sequence[torch.Tensor | None]
"""Values of one rank, one per port."""


@dataclass
class Strand:
    """One rank of one run: its values, and the next instruction."""

    loaded: LoadedProgram
    end: RankEnd
    values: list[Any]
    position: int = 0

    def advance(self, stop: int) -> bool:
        """Run until ``stop`` or until a result is not there yet. Returns whether anything ran."""
        start = self.position
        program, values = self.loaded.program, self.values
        while self.position < stop:
            step = self.loaded.steps[self.position]
            operands = [values[position] for position in step.inputs]
            if step.kind == WAITING and not operands[0].ready:
                break
            self.end.text = place(program, step.index)
            try:
                if step.kind == COMPUTE:
                    assert step.call is not None
                    result = step.call(*operands)
                else:
                    result = operator.methodcaller(step.kind, *operands)(self.end)
            except HocketError:
                raise
            except Exception as error:
                raise rank_failed(program, self.end.rank, step.index, error) from error
            for slot, value in [(step.output, result)] if step.output >= 0 else zip(step.spread, result, strict=True):
                if slot >= 0:
                    values[slot] = value
            for slot in step.frees:
                values[slot] = None
            self.position += 1
        return self.position > start

    def waits_for(self) -> str:
        """What keeps this strand, as text."""
        step = self.loaded.steps[self.position]
        pending: Arrival = self.values[step.inputs[0]]
        missing = ""
        if pending.meeting is not None:
            absent = [rank for rank in pending.meeting.members if rank not in pending.meeting.arrived]
            missing = f" (not there: rank {', '.join(map(str, absent))})"
        return f"rank {self.end.rank} waits for {pending.text}{missing}"


@dataclass
class StrandFrame:
    """The strands of one run."""

    strands: list[Strand]
    done: set[str] = field(default_factory=set)

    def close(self) -> None:
        """Drop every value. Closing twice is harmless."""
        self.strands = []


class StrandExecutor:
    """The same calls as ``LockstepExecutor`` for one program per rank. Segments of all programs have the same names."""

    def __init__(self, programs: Sequence[RankProgram], *, dtype: torch.dtype | None = None) -> None:
        self.programs = list(programs)
        self.dtype = dtype
        self.loaded = [load(program, rank, floating=dtype) for rank, program in enumerate(self.programs)]

    def open(self, inputs_per_rank: Sequence[Row]) -> StrandFrame:
        """A frame with the inputs of the first segments; one row per rank, one entry per port of its program."""
        if len(inputs_per_rank) != len(self.programs):
            raise InputError(f"expected inputs of {len(self.programs)} ranks, found {len(inputs_per_rank)}")
        rendezvous = Rendezvous(self.programs[0].mesh)
        strands = []
        for rank, (loaded, row) in enumerate(zip(self.loaded, inputs_per_rank, strict=True)):
            strand = Strand(loaded, RankEnd(rendezvous, rank), loaded.new_frame())
            ports = loaded.program.segments[0].inputs
            self._place(strand, ports, [row[port] for port in ports])
            strands.append(strand)
        return StrandFrame(strands)

    def run(self, frame: StrandFrame, segment: str, extra_inputs: Sequence[Row] = ()) -> list[list[torch.Tensor | None]]:
        """Run one segment on all ranks. CollectiveMismatch on a deadlock or when ranks do not agree."""
        if not frame.strands or segment in frame.done:
            raise InputError(f"segment {segment!r} cannot run: its frame is closed or has run it already")
        frame.done.add(segment)
        chosen = [program.segment(segment) for program in self.programs]
        for i, (strand, part) in enumerate(zip(frame.strands, chosen, strict=True)):
            if part.start > 0 or part is not strand.loaded.program.segments[0]:
                self._place(strand, part.inputs, extra_inputs[i])
        with torch.no_grad(), torch._C._DisableAutocast():
            self._finish(frame.strands, chosen)
        return [self._results(strand, part) for strand, part in zip(frame.strands, chosen, strict=True)]

    def _finish(self, strands: list[Strand], chosen: list[Segment]) -> None:
        moved = True
        while moved:
            moves = [strand.advance(part.stop) for strand, part in zip(strands, chosen, strict=True)]
            moved = any(moves)
        stuck = [strand for strand, part in zip(strands, chosen, strict=True) if strand.position < part.stop]
        if stuck:
            raise CollectiveMismatch(
                "deadlock: " + "; ".join(strand.waits_for() for strand in stuck),
                rank=stuck[0].end.rank,
                source=stuck[0].loaded.program.source(stuck[0].position),
            )

    def _results(self, strand: Strand, part: Segment) -> list[torch.Tensor | None]:
        results = [None if slot < 0 else strand.values[slot] for _, slot in part.results]
        for slot in part.frees:
            strand.values[slot] = None
        return results

    def _place(self, strand: Strand, ports: Sequence[int], row: Row) -> None:
        for port, value in zip(ports, row, strict=True):
            if value is None:
                raise InputError(f"rank {strand.end.rank}: input {strand.loaded.program.inputs[port]} is missing")
            strand.values[port] = prepare(value, self.dtype)


def prepare(value: torch.Tensor, dtype: torch.dtype | None) -> torch.Tensor:
    """An input without autograd history, in another floating dtype if one is asked for."""
    value = value.detach()
    return value.to(dtype) if dtype is not None and value.is_floating_point() else value
