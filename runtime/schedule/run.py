"""The loop of one rank: run its instructions in order, wait only where a value has not arrived.

``PipelineRank.steps`` is a generator that yields the tag it is about to wait for, so that one loop serves both a rank that may
block and many ranks that take turns in one process. While a value is on its way, weight gradients that are ready run ahead of their
place, where the link knows that it is not there yet. Their order among themselves, and so every sum, stays as the schedule has it.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from ..errors import InputError, RankFailed, RunError
from .instruction import Flow, Instr, Op, Schedule, Value, makes, moved, reads
from .links import Link
from .stage import Part, StageState, ValueSpec

Reduce = Callable[[StageState], None]
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

    states: stage -> its state; link: its messages; eager_weights: run W while waiting; reduce: what REDUCE does;
    stamps: set it to a list to record every instruction.
    """

    schedule: Schedule
    rank: int
    states: Mapping[int, StageState]
    link: Link
    eager_weights: bool = True
    reduce: Reduce | None = None
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


def _check_pieces(schedule: Schedule, state: StageState) -> None:
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
            elif instr.op is Op.W:
                waiting.remove(position)
            self._guarded(instr, ready)
            if instr.op is Op.I:
                started.add((instr.stage, instr.micro_batch))

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
        specs = state.code.receives if instr.op is Op.F else state.code.receives_back
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
                self._after(instr, state, state.code.forward)
            case Op.I | Op.B:
                self._backward(instr, state)
            case Op.W if state.code.weights:
                self._weight(state, state.code.weights[instr.piece], m, instr.piece)
            case Op.SEND | Op.COPY:
                self._move(instr)
            case Op.RECV:
                specs = state.code.receives if instr.flow is Flow.ACTIVATION else state.code.receives_back
                self.rank.link.post(instr.tag, instr.peer, specs)
            case _:
                self._weights_and_sums(instr, state)

    def _weights_and_sums(self, instr: Instr, state: StageState) -> None:
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

    def _forward(self, state: StageState, m: int) -> None:
        if (state.code.stage, m) in self.recomputed:
            state.forward_for_later(m)
        else:
            state.run(state.code.forward, m)

    def _backward(self, instr: Instr, state: StageState) -> None:
        """A first stage may have nothing but weight gradients: then I does nothing, and B only those."""
        if state.code.backward is not None:
            state.run(state.code.backward, instr.micro_batch)
            self._after(instr, state, state.code.backward)
        if instr.op is Op.B:
            for piece, part in enumerate(state.code.weights):
                self._weight(state, part, instr.micro_batch, piece)

    def _weight(self, state: StageState, part: Part, m: int, piece: int) -> None:
        state.run(part, m, piece if state.code.stage in self.added_later else None)
        state.drop(part, m)

    def _after(self, instr: Instr, state: StageState, part: Part) -> None:
        """Put the message aside until its SEND or COPY, and forget what is not needed any more."""
        m, made = instr.micro_batch, makes(instr, self.rank.schedule.stages)
        if made is not None:
            specs = state.code.sends if made.flow is Flow.ACTIVATION else state.code.sends_back
            self.outbox[made] = state.message(m, specs)
        if part is state.code.forward and (state.code.stage, m) in self.recomputed:
            state.forget_forward(m)
        else:
            state.drop(part, m)

    def _move(self, instr: Instr) -> None:
        value: Value = moved(instr)
        maker, m = self.rank.states[value.maker], value.micro_batch
        forward = value.flow is Flow.ACTIVATION
        tensors = self.outbox.pop(value)
        if instr.op is Op.SEND:
            specs: Sequence[ValueSpec] = maker.code.sends if forward else maker.code.sends_back
            self.rank.link.send(instr.tag, instr.peer, specs, tensors)
        else:
            reader = self.rank.states[value.reader]
            reader.receive(m, reader.code.receives if forward else reader.code.receives_back, tensors)
