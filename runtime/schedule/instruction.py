"""A pipeline schedule: one list of typed instructions per rank, as pure data.

    F  forward                          I  gradient of the inputs (p1)        SEND  hand a value to another rank
    B  both gradients at once           W  gradient of weights (p2), a piece  RECV  post the receive of a value; its reader waits
    R  recompute the forward            ACC  add a held gradient              COPY  hand a value to a stage of the same rank
    STASH  keep the weights of now      REDUCE  sum shared gradients          OPT   update the weights
    DROP   forget the kept weights

A value is named by its flow, the stage that reads it and the micro-batch: activations enter stage s from s-1, gradients from s+1.
SEND names the stage that makes the value, RECV and COPY the stage that reads it. ``RECV`` does not block: it provides the buffer,
and the F, I or B that reads the value waits for it, so that messages may be under way while the rank computes.
"""

from __future__ import annotations

import enum
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

from ..errors import HocketError, InputError


class Op(enum.StrEnum):
    """What an instruction does; see the module."""

    F = "F"
    I = "I"  # noqa: E741  (the established name of the gradient of the inputs)
    W = "W"
    B = "B"
    R = "R"
    SEND = "SEND"
    RECV = "RECV"
    COPY = "COPY"
    ACC = "ACC"
    REDUCE = "REDUCE"
    OPT = "OPT"
    STASH = "STASH"
    DROP = "DROP"


class Flow(enum.StrEnum):
    """What a SEND, RECV or COPY moves."""

    NONE = ""
    ACTIVATION = "activation"
    GRADIENT = "gradient"


COMPUTE = frozenset((Op.F, Op.I, Op.W, Op.B, Op.R))
MOVES = frozenset((Op.SEND, Op.RECV, Op.COPY))


class ScheduleError(HocketError):
    """A schedule is wrong, or cannot be read. ``problems`` lists every finding; the message shows the first few."""

    def __init__(self, message: str, problems: tuple[str, ...] = ()) -> None:
        super().__init__(message)
        self.problems = problems


class Instr(NamedTuple):
    """One instruction of one rank.

    piece: which part of a stage's weight gradients (W, ACC); flow, peer, tag: of SEND and RECV (COPY has a flow); peer is a rank;
    cost: seconds of this rank's processor; memory: change of the rank's bytes, taken when it starts where positive and when it
    ends where negative.
    """

    op: Op
    stage: int
    micro_batch: int = 0
    piece: int = 0
    flow: Flow = Flow.NONE
    peer: int = -1
    tag: int = -1
    cost: float = 0.0
    memory: float = 0.0

    def __str__(self) -> str:
        """``F s0 m3``; ``SEND activation s0 m3 to 1 tag 14``."""
        words = [self.op.value]
        if self.flow:
            words.append(self.flow.value)
        words += [f"s{self.stage}", f"m{self.micro_batch}"]
        if self.op in (Op.W, Op.ACC):
            words.append(f"p{self.piece}")
        if self.op is Op.SEND:
            words.append(f"to {self.peer} tag {self.tag}")
        elif self.op is Op.RECV:
            words.append(f"from {self.peer} tag {self.tag}")
        return " ".join(words)


class Value(NamedTuple):
    """What crosses a stage boundary: who reads it says which it is."""

    flow: Flow
    reader: int
    micro_batch: int

    @property
    def maker(self) -> int:
        """The stage that makes it."""
        return self.reader - 1 if self.flow is Flow.ACTIVATION else self.reader + 1

    def tag(self, stages: int) -> int:
        """A number no other value of a schedule of so many stages has."""
        return (self.micro_batch * stages + self.reader) * 2 + (self.flow is Flow.GRADIENT)


@dataclass(frozen=True)
class Schedule:
    """Instructions of all ranks.

    placement: stage -> rank; micro_batches: how many; pieces: per stage, into how many parts its weight gradient is cut;
    ranks: the instructions; sizes: per micro-batch, its share of a full one (empty: all 1); training: whether there is a backward.
    InputError where the parts contradict each other.
    """

    placement: tuple[int, ...]
    micro_batches: int
    pieces: tuple[int, ...]
    ranks: tuple[tuple[Instr, ...], ...]
    sizes: tuple[float, ...] = ()
    name: str = ""
    training: bool = True

    def __post_init__(self) -> None:
        if not self.placement or self.micro_batches < 1 or not self.ranks:
            raise InputError("a schedule needs at least one stage, one micro-batch and one rank")
        if any(not 0 <= rank < len(self.ranks) for rank in self.placement):
            raise InputError(f"the placement {list(self.placement)} names ranks outside 0..{len(self.ranks) - 1}")
        if len(self.pieces) != len(self.placement) or min(self.pieces) < 1:
            raise InputError(f"expected at least one piece for each of {len(self.placement)} stages, found {list(self.pieces)}")
        if self.sizes and (len(self.sizes) != self.micro_batches or min(self.sizes) <= 0):
            raise InputError(f"expected {self.micro_batches} positive sizes of micro-batches, found {list(self.sizes)}")

    @property
    def stages(self) -> int:
        """How many stages."""
        return len(self.placement)

    def size(self, micro_batch: int) -> float:
        """Share of a full micro-batch."""
        return self.sizes[micro_batch] if self.sizes else 1.0

    def stages_of(self, rank: int) -> tuple[int, ...]:
        """The stages that a rank holds, ascending."""
        return tuple(stage for stage, holder in enumerate(self.placement) if holder == rank)

    def compute(self, rank: int) -> list[Instr]:
        """Only the F, I, W, B and R of a rank."""
        return [instr for instr in self.ranks[rank] if instr.op in COMPUTE]

    def __iter__(self) -> Iterator[tuple[int, int, Instr]]:
        """(rank, position, instruction)."""
        for rank, instructions in enumerate(self.ranks):
            for position, instr in enumerate(instructions):
                yield rank, position, instr

    def with_ranks(self, ranks: list[list[Instr]] | tuple[tuple[Instr, ...], ...]) -> Schedule:
        """The same schedule with other instructions."""
        return replace(self, ranks=tuple(tuple(instructions) for instructions in ranks))


def reads(instr: Instr, stages: int) -> Value | None:
    """The boundary value that an instruction waits for, None where there is none."""
    if instr.op is Op.F and instr.stage > 0:
        return Value(Flow.ACTIVATION, instr.stage, instr.micro_batch)
    if instr.op in (Op.I, Op.B) and instr.stage < stages - 1:
        return Value(Flow.GRADIENT, instr.stage, instr.micro_batch)
    return None


def makes(instr: Instr, stages: int) -> Value | None:
    """The boundary value that an instruction makes, None where there is none."""
    if instr.op is Op.F and instr.stage < stages - 1:
        return Value(Flow.ACTIVATION, instr.stage + 1, instr.micro_batch)
    if instr.op in (Op.I, Op.B) and instr.stage > 0:
        return Value(Flow.GRADIENT, instr.stage - 1, instr.micro_batch)
    return None


def moved(instr: Instr) -> Value:
    """The value that a SEND, RECV or COPY moves."""
    if instr.op is Op.SEND:
        reader = instr.stage + 1 if instr.flow is Flow.ACTIVATION else instr.stage - 1
        return Value(instr.flow, reader, instr.micro_batch)
    return Value(instr.flow, instr.stage, instr.micro_batch)
