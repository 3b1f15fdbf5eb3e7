"""The loop of one rank: run its instructions in order, wait only where a value has not arrived.

``PipelineRank.steps`` is a generator that yields the tag it is about to wait for, so that one loop serves both a rank that may
block and many ranks that take turns in one process. While a value is on its way, weight gradients that are ready run ahead of their
place, where the link knows that it is not there yet. Their order among themselves, and so every sum, stays as the schedule has it.
"""

from __future__ import annotations

import itertools
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from ..errors import InputError, RankFailed, RunError
from .group import StageGroup
from .instruction import Flow, Instr, Op, Schedule, Value, makes, moved, reads
from .links import Link
from .sharing import Sharing
from .stage import Part, StageState, ValueSpec

Stage = StageState | StageGroup
"""A stage on this rank, or on all ranks of a process."""

Reduce = Callable[[Stage], None]
"""Adds up what a stage shares with others (tied parameters, replicas), before the optimizer."""


class Stamp(NamedTuple):
    """When an instruction ran: its turn came (``ready``), its value was there (``start``), it was done (``stop``), in seconds."""

    instr: Instr
    ready: float
    start: float
    stop: float


@dataclass
class PipelineRank:
    """One rank of a pipeline.

    states: stage -> its state; link: its messages; eager_weights: run W while waiting; reduce, sharing: what REDUCE does, for one
    stage, and for all stages of a row of REDUCE; stamps: set it to a list to record every instruction.
    """

    schedule: Schedule
    rank: int
    states: Mapping[int, Stage]
    link: Link
    eager_weights: bool = True
    reduce: Reduce | None = None
    sharing: Sharing | None = None
    stamps: list[Stamp] | None = None
    _loop: _Loop = field(init=False, repr=False)

    def __post_init__(self) -> None:
        missing = [stage for stage in self.schedule.stages_of(self.rank) if stage not in self.states]
        if missing:
            raise InputError(f"rank {self.rank} runs the stages {list(self.schedule.stages_of(self.rank))}; it has no {missing}")
        for stage in self.schedule.stages_of(self.rank):
            _check_pieces(self.schedule, self.states[stage])
        self._loop = _Loop(self)

    def step(self, given: Sequence[Mapping[str, torch.Tensor]]) -> list[dict[str, torch.Tensor]]:
        """Run the schedule once; blocks. given: per micro-batch, inputs, tangents and seeds by name. Returns the outputs of each.

        Raises RankFailed naming the instruction where a part raises; RunErrors of the link pass.
        """
        with torch.no_grad(), torch._C._DisableAutocast():
            for _ in self.steps(given):
                pass
        return self.outputs()

    def outputs(self) -> list[dict[str, torch.Tensor]]:
        """What the stages of this rank returned, per micro-batch."""
        found: list[dict[str, torch.Tensor]] = [{} for _ in range(self.schedule.micro_batches)]
        for state in self.states.values():
            for micro_batch, outputs in state.outputs.items():
                found[micro_batch].update(outputs)
        return found

    def steps(self, given: Sequence[Mapping[str, torch.Tensor]]) -> Iterator[int]:
        """The loop. Yields the tag of a message it will wait for when it is resumed.

        Whoever drives it turns gradients and autocast off: a generator must not, since modes of interleaved ones would mix.
        """
        if len(given) != self.schedule.micro_batches:
            raise InputError(f"the schedule runs {self.schedule.micro_batches} micro-batches, found inputs for {len(given)}")
        for state in self.states.values():
            state.begin(given)
        yield from self._loop.run()
        self.link.finish()


def _check_pieces(schedule: Schedule, state: Stage) -> None:
    code, wanted = state.code, schedule.pieces[state.code.stage]
    if schedule.training and wanted != max(1, len(code.weights)):
        raise InputError(
            f"stage {code.stage}: the schedule runs {wanted} pieces of its weight gradient, it has {len(code.weights)}"
        )


class _Loop:
    """What a rank needs to know of its list, worked out once."""

    def __init__(self, rank: PipelineRank) -> None:
        self.rank = rank
        instructions = rank.schedule.ranks[rank.rank]
        stages = rank.schedule.stages
        receives = {moved(instr): instr.tag for instr in instructions if instr.op is Op.RECV}
        self.instructions = instructions
        self.tags = [receives.get(value) if (value := reads(instr, stages)) is not None else None for instr in instructions]
        self.recomputed = {(instr.stage, instr.micro_batch) for instr in instructions if instr.op is Op.R}
        self.added_later = {instr.stage for instr in instructions if instr.op is Op.ACC}
        self.outbox: dict[Value, list[torch.Tensor]] = {}
        self.weights = [position for position, instr in enumerate(instructions) if instr.op is Op.W]

    def run(self) -> Iterator[int]:
        """See ``PipelineRank.steps``."""
        self.outbox.clear()
        waiting = deque(self.weights)
        ahead: set[int] = set()
        started: set[tuple[int, int]] = set()
        for position, instr in enumerate(self.instructions):
            if position in ahead:
                continue
            ready = time.perf_counter()
            tag = self.tags[position]
            if tag is not None:
                if self.rank.eager_weights:
                    self._fill(tag, waiting, ahead, started)
                yield tag
                self._take(instr, tag)
            if instr.op is Op.REDUCE and self.rank.sharing is not None:
                row = list(itertools.takewhile(lambda other: other.op is Op.REDUCE, self.instructions[position:]))
                ahead.update(range(position, position + len(row)))
                yield from self._share({other.stage for other in row}, ready)
                continue
            if instr.op is Op.W:
                waiting.remove(position)
            self._guarded(instr, ready)
            if instr.op is Op.I:
                started.add((instr.stage, instr.micro_batch))

    def _share(self, stages: set[int], ready: float) -> Iterator[int]:
        """A row of REDUCE: these stages and all others of the pipeline tell each other what their optimizers need."""
        rank, start = self.rank, time.perf_counter()
        assert rank.sharing is not None, "only a pipeline that shares something comes here"
        states = {stage: rank.states[stage] for stage in sorted(stages)}
        yield from rank.sharing.run(rank.schedule, rank.rank, states, rank.link)
        if rank.stamps is not None:
            rank.stamps.append(Stamp(Instr(Op.REDUCE, min(stages)), ready, start, time.perf_counter()))

    def _fill(self, tag: int, waiting: deque[int], ahead: set[int], started: set[tuple[int, int]]) -> None:
        """Weight gradients of inputs gradients that are done, one after the other, until the value is there."""
        while self.rank.link.ready(tag) is False:
            for position in waiting:
                instr = self.instructions[position]
                if (instr.stage, instr.micro_batch) in started:
                    break
            else:
                return
            waiting.remove(position)
            ahead.add(position)
            self._guarded(instr, time.perf_counter())

    def _take(self, instr: Instr, tag: int) -> None:
        state = self.rank.states[instr.stage]
        code = state.at(instr.micro_batch)
        specs = code.receives if instr.op is Op.F else code.receives_back
        state.receive(instr.micro_batch, specs, self.rank.link.take(tag))

    def _guarded(self, instr: Instr, ready: float) -> None:
        start = time.perf_counter()
        try:
            self._perform(instr)
        except RunError:
            raise
        except Exception as error:
            rank = self.rank.rank
            raise RankFailed(f"rank {rank} failed in {instr}: {error}", rank=rank, instruction=str(instr)) from error
        if self.rank.stamps is not None:
            self.rank.stamps.append(Stamp(instr, ready, start, time.perf_counter()))

    def _perform(self, instr: Instr) -> None:
        state, m = self.rank.states[instr.stage], instr.micro_batch
        match instr.op:
            case Op.F:
                self._forward(state, m)
                self._after(instr, state, state.at(m).forward)
            case Op.I | Op.B:
                self._backward(instr, state)
            case Op.W if state.code.weights:
                self._weight(state, state.at(m).weights[instr.piece], m, instr.piece)
            case Op.SEND | Op.COPY:
                self._move(instr)
            case Op.RECV:
                specs = state.at(m).receives if instr.flow is Flow.ACTIVATION else state.at(m).receives_back
                self.rank.link.post(instr.tag, instr.peer, specs)
            case _:
                self._weights_and_sums(instr, state)

    def _weights_and_sums(self, instr: Instr, state: Stage) -> None:
        match instr.op:
            case Op.R:
                state.recompute(instr.micro_batch)
            case Op.ACC:
                state.add(instr.micro_batch, instr.piece)
            case Op.REDUCE if self.rank.reduce is not None:
                self.rank.reduce(state)
            case Op.OPT:
                state.optimize()
            case Op.STASH:
                state.stash(instr.micro_batch)
            case Op.DROP:
                state.unstash(instr.micro_batch)
            case _:
                pass  # W of a stage whose weights are frozen, REDUCE where nothing is shared

    def _forward(self, state: Stage, m: int) -> None:
        if (state.code.stage, m) in self.recomputed:
            state.forward_for_later(m)
        else:
            state.run(state.at(m).forward, m)

    def _backward(self, instr: Instr, state: Stage) -> None:
        """A first stage may have nothing but weight gradients: then I does nothing, and B only those."""
        code = state.at(instr.micro_batch)
        if code.backward is not None:
            state.run(code.backward, instr.micro_batch)
            self._after(instr, state, code.backward)
        if instr.op is Op.B:
            for piece, part in enumerate(code.weights):
                self._weight(state, part, instr.micro_batch, piece)

    def _weight(self, state: Stage, part: Part, m: int, piece: int) -> None:
        state.run(part, m, piece if state.code.stage in self.added_later else None)
        state.drop(part, m)

    def _after(self, instr: Instr, state: Stage, part: Part) -> None:
        """Put the message aside until its SEND or COPY, and forget what is not needed any more."""
        m, made = instr.micro_batch, makes(instr, self.rank.schedule.stages)
        if made is not None:
            specs = state.at(m).sends if made.flow is Flow.ACTIVATION else state.at(m).sends_back
            self.outbox[made] = state.message(m, specs)
        if part is state.at(m).forward and (state.code.stage, m) in self.recomputed:
            state.forget_forward(m)
        else:
            state.drop(part, m)

    def _move(self, instr: Instr) -> None:
        value: Value = moved(instr)
        maker, m = self.rank.states[value.maker], value.micro_batch
        forward = value.flow is Flow.ACTIVATION
        tensors = self.outbox.pop(value)
        if instr.op is Op.SEND:
            specs: Sequence[ValueSpec] = maker.at(m).sends if forward else maker.at(m).sends_back
            self.rank.link.send(instr.tag, instr.peer, specs, tensors)
        else:
            reader = self.rank.states[value.reader]
            reader.receive(m, reader.at(m).receives if forward else reader.at(m).receives_back, tensors)
