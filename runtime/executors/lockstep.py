"""Every rank in this process, deterministically, on the same instruction list as the real ranks.

Ranks that share one program advance together: one pass over the list, one value per class of ranks that hold the same object (see
``spread``). Programs that differ, or that send messages, run as strands: each rank goes on until it must wait, and a round in which
no rank moves is a deadlock, reported with the place of every rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from ..errors import CollectiveMismatch, InputError
from ..load import COMPUTE, TILES, WAITING, LoadedProgram, Step, load
from ..ops import RECV, SEND, is_random
from ..program import RankProgram
from ..templates import Site, fold
from ..tile_loop import TILE_LOOP
from .failure import rank_failed
from .rendezvous import SAME_RESULT, disagreement, group_results
from .spread import Partitions, Spread
from .strands import Row, StrandExecutor, prepare
from .tile_ranks import TogetherLoops
from .tile_ready import ReadyLoop


def run_lockstep(
    programs: RankProgram | Sequence[RankProgram], inputs_per_rank: Sequence[Row], *, dtype: torch.dtype | None = None
) -> list[list[torch.Tensor | None]]:
    """Run all segments of one program on all its ranks, or of one program per rank.

    inputs_per_rank: per rank one tensor per input port, tangents included; the same object on several ranks is computed with once.
    dtype: replaces every floating dtype of the program and of its inputs. Returns per rank one result per output port.
    """
    executor: Any = lockstep_executor(programs, dtype=dtype)  # either kind, with its own kind of frame
    frame = executor.open(inputs_per_rank)
    found: list[dict[int, torch.Tensor | None]] = [{} for _ in inputs_per_rank]
    for name in [segment.name for segment in executor.programs[0].segments]:
        extra = [[row[port] for port in p.segment(name).inputs] for p, row in zip(executor.programs, inputs_per_rank, strict=True)]
        results = executor.run(frame, name, extra)
        for program, by_port, row in zip(executor.programs, found, results, strict=True):
            by_port.update(zip(program.segment_outputs(name), row, strict=True))
    frame.close()
    return [[by_port[port] for port in range(len(p.outputs))] for p, by_port in zip(executor.programs, found, strict=True)]


def lockstep_executor(
    programs: RankProgram | Sequence[RankProgram], *, dtype: torch.dtype | None = None
) -> LockstepExecutor | StrandExecutor:
    """The executor for one shared program without messages, or for anything else."""
    if isinstance(programs, RankProgram):
        programs = [programs] * programs.mesh.size
    if not programs or len(programs) != programs[0].mesh.size or len({p.mesh for p in programs}) != 1:
        raise InputError(f"expected one program per rank of one mesh, found {len(programs)}")
    shared = all(p is programs[0] for p in programs)
    if not shared and any(ins.op == TILE_LOOP for p in programs for ins in p.instructions):
        raise InputError("ranks that run programs of their own (pipeline stages) cannot run tile loops; leave OverlapTiles() out")
    if shared and not any(ins.op in (SEND, RECV) for ins in programs[0].instructions):
        return LockstepExecutor(programs[0], dtype=dtype)
    return StrandExecutor(programs, dtype=dtype)


@dataclass
class LockstepFrame:
    """Values of one run on all ranks."""

    values: list[Any]
    done: set[str] = field(default_factory=set)

    def close(self) -> None:
        """Drop every value. Closing twice is harmless."""
        self.values = []


class LockstepExecutor:
    """All ranks of one shared program. The same calls as ``FlatExecutor``, with one row of tensors per rank."""

    def __init__(self, program: RankProgram, *, dtype: torch.dtype | None = None) -> None:
        self.program = program
        self.programs = [program] * program.mesh.size
        self.dtype = dtype
        self._alone = program.mesh.size == 1
        self.partitions = Partitions(program.mesh)
        self.loaded: LoadedProgram = load(program, 0, floating=dtype)
        self._loops: dict[int, ReadyLoop] = {}
        self._groups: dict[tuple[str, tuple[int, ...]], TogetherLoops] = {}
        self._random = {op for op in {ins.op for ins in program.instructions} if op != TILE_LOOP and is_random(op)}
        self._template = [None] * program.slots + [Spread(self.partitions.whole, [c]) for c in self.loaded.constants]
        sites = [Site.of(program.mesh, rank, floating=dtype) for rank in range(program.mesh.size)]
        for position, template in self.loaded.varying.items():
            self._template[position] = self.partitions.spread([fold(template, site) for site in sites], key=repr)

    def open(self, inputs_per_rank: Sequence[Row]) -> LockstepFrame:
        """A frame with the inputs of the first segment; one row per rank, one entry per port."""
        frame = LockstepFrame(list(self._template))
        if len(inputs_per_rank) != self.program.mesh.size:
            raise InputError(f"expected inputs of {self.program.mesh.size} ranks, found {len(inputs_per_rank)}")
        ports = self.program.segments[0].inputs
        self._place(frame, ports, [[row[port] for port in ports] for row in inputs_per_rank])
        return frame

    def run(self, frame: LockstepFrame, segment: str, extra_inputs: Sequence[Row] = ()) -> list[list[torch.Tensor | None]]:
        """Run one segment; extra_inputs: per rank, the inputs of a later segment. Returns results per rank, in port order."""
        chosen = self.program.segment(segment)
        if not frame.values or segment in frame.done:
            raise InputError(f"segment {segment!r} cannot run: its frame is closed or has run it already")
        if chosen is not self.program.segments[0]:
            self._place(frame, chosen.inputs, extra_inputs)
        frame.done.add(segment)
        with torch.no_grad(), torch._C._DisableAutocast():
            for step in self.loaded.steps[chosen.start : chosen.stop]:
                self._step(frame.values, step)
        spreads = [None if slot < 0 else frame.values[slot] for _, slot in chosen.results]
        for slot in chosen.frees:
            frame.values[slot] = None
        return [[None if s is None else s.at(rank) for s in spreads] for rank in range(self.program.mesh.size)]

    def _place(self, frame: LockstepFrame, ports: Sequence[int], rows: Sequence[Row]) -> None:
        for i, port in enumerate(ports):
            spread = self.partitions.spread([row[i] for row in rows])
            if any(value is None for value in spread.values):
                raise InputError(f"input {self.program.inputs[port]} is missing")
            frame.values[port] = Spread(spread.partition, [prepare(value, self.dtype) for value in spread.values])

    def _step(self, values: list[Any], step: Step) -> None:
        if step.kind == COMPUTE:
            result = self._compute(values, step)
        elif step.kind == WAITING:
            result = values[step.inputs[0]]
        elif step.kind == TILES:
            result = self._tile_loop(values, step)
        else:
            result = self._collective(values, step)
        if step.output >= 0:
            values[step.output] = result
        else:
            for element, slot in enumerate(step.spread):
                if slot >= 0:
                    values[slot] = Spread(result.partition, [value[element] for value in result.values])
        for slot in step.frees:
            values[slot] = None

    def _compute(self, values: list[Any], step: Step) -> Spread:
        operands: list[Spread] = [values[position] for position in step.inputs]
        call, partition = step.call, self.partitions.whole
        assert call is not None
        number = 0
        try:
            if self._alone:
                return Spread(partition, [call(*[operand.values[0] for operand in operands])])
            if self._random and self.program.instructions[step.index].op in self._random:
                partition = self.partitions.finest
                found = []
                for number in range(len(partition.firsts)):
                    found.append(call(*[operand.at(number) for operand in operands]))  # noqa: PERF401  (number is read on failure)
                return Spread(partition, found)
            distinct = tuple(operand.partition for operand in operands)
            partition, indices = self.partitions.join(distinct)
            rows = zip(*[[operand.values[i] for i in index] for operand, index in zip(operands, indices, strict=True)], strict=True)
            found = []
            for number, row in enumerate(rows):  # noqa: B007  (read on failure)
                found.append(call(*row))
            return Spread(partition, found if operands else [call()])
        except Exception as error:
            raise rank_failed(self.program, partition.firsts[number], step.index, error) from error

    def _collective(self, values: list[Any], step: Step) -> Spread:
        operands: list[Spread] = [values[position] for position in step.inputs]
        partition = self.partitions.join(tuple(operand.partition for operand in operands)).partition
        axis: str = operands[-1].values[0]
        groups = self.partitions.groups(partition, axis)
        found: list[list[torch.Tensor]] = []
        for members in groups.members:
            tensors = [operands[0].at(rank) for rank in members]
            extras = [tuple(operand.at(rank) for operand in operands[1:-1]) for rank in members]
            self._check(step, members, tensors, extras)
            try:
                found.append(group_results(step.kind, tensors, extras))
            except Exception as error:
                raise rank_failed(self.program, members[0], step.index, error) from error
        if step.kind in SAME_RESULT:
            return Spread(groups.same, [results[0] for results in found])
        where = [self.program.mesh.coordinate(rank)[axis] for rank in groups.own.firsts]
        return Spread(groups.own, [found[groups.same.of[rank]][i] for rank, i in zip(groups.own.firsts, where, strict=True)])

    def _tile_loop(self, values: list[Any], step: Step) -> Spread:
        """Every rank by itself, since each works on the chunks in an order of its own."""
        ready = self._loops.setdefault(step.index, ReadyLoop(self.loaded.loops[step.index], self.loaded.site))
        found: list[Any] = [None] * self.program.mesh.size
        for members in self.program.mesh.groups(ready.loop.axis):
            group = self._groups.setdefault((ready.loop.axis, members), TogetherLoops(len(members)))
            operands = [[values[position].at(rank) for position in step.inputs] for rank in members]
            try:
                results = group.run(ready, operands)
            except Exception as error:
                raise rank_failed(self.program, members[0], step.index, error) from error
            for rank, made in zip(members, results, strict=True):
                found[rank] = made
        return Spread(self.partitions.finest, found)

    def _check(self, step: Step, members: tuple[int, ...], tensors: list[torch.Tensor], extras: list[tuple[Any, ...]]) -> None:
        wrong = disagreement(step.kind, tensors, extras)
        if wrong is not None:
            index, what = wrong
            text, source = self.program.describe(step.index), self.program.source(step.index)
            raise CollectiveMismatch(
                f"ranks {members[0]} and {members[index]} disagree at {text}, from {source or 'an unknown line'}: {what}",
                rank=members[index],
                instruction=text,
                source=source,
            )
