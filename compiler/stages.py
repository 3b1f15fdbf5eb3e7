"""Programs of pipeline stages: what ``passes.pipeline`` makes of one micro-batch's program and a pipeline executor runs.

    part F   forward                      reads activations from the stage before, sends activations to the stage after
    part I   backward, input gradients    reads gradients from the stage after, sends gradients to the stage before
    part W   backward, weight gradients   in pieces 0, 1, ...; reads and sends nothing, so it may run at any time after I
    part S   what others need of it      once a step, from the accumulated gradients: squares of norms, say; sent to every stage
    part O   optimizer                    once a step, on the accumulated gradients and on what all S have sent

Every part is an ordinary ``Program``; what its inputs and outputs are is said by their roles:

    inputs   PARAM, BUFFER, STATE, CONSTANT   tensors the stage holds
             INPUT, SEED                      of the micro-batch, by the names of the program that was cut
             VALUE                            by name, from the values this stage holds for this micro-batch
             GRADIENT                         (parts S and O) the accumulated gradient of the parameter of that name
    outputs  VALUE                            joins the values this stage holds for this micro-batch (part S: for this step)
             OUTPUT                           a result of the micro-batch
             UPDATE                           new value of a BUFFER (part F, micro-batches in order), of a PARAM or STATE (part O)
             GRADIENT                         to be added to the accumulated gradient of that parameter, micro-batches in order
                                              (part O: the gradient itself, made from what was accumulated: summed over replicas)

So a stage keeps, for every micro-batch, one dictionary from names to tensors. A message is an ordered tuple of names; after a
receive they are in the dictionary, a send takes them from it. A value that skips a stage is carried along: it stands in the message
to that stage and in the message from it. ``drops`` of a part names the values nobody at this stage needs once the part has run and
the message that follows it (``sends`` after F, ``sends_back`` after I) has been sent.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from .program import Program, RoleKind


class PartKind(enum.StrEnum):
    """Which share of a stage's work a part is. A whole backward is I followed by every piece of W."""

    FORWARD = "F"
    BACKWARD_INPUT = "I"
    BACKWARD_WEIGHT = "W"
    SHARE = "S"
    OPTIMIZER = "O"


ONCE = frozenset({PartKind.SHARE, PartKind.OPTIMIZER})
"""Parts that run once a step rather than for every micro-batch."""


@dataclass(frozen=True)
class Value:
    """A tensor that passes between parts.

    name: unique over all stages; shape: of one rank's piece where the program is lowered; stride: in elements, as the part that
    makes the value leaves it: a receiver that keeps to it (``torch.empty_strided``) gets the same bits out of every kernel.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    stride: tuple[int, ...]

    @property
    def bytes(self) -> int:
        """Size in memory and on the wire."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class StagePart:
    """One program that a schedule's instruction runs.

    piece: 0 except for W. drops: see the module. flops: floating-point operations; bytes_moved: read and written, both roughly,
    for a first cost before anything is measured.
    """

    program: Program
    kind: PartKind
    stage: int
    piece: int = 0
    drops: tuple[str, ...] = ()
    flops: float = 0.0
    bytes_moved: float = 0.0

    @property
    def takes(self) -> tuple[str, ...]:
        """Names of the values it reads, in port order."""
        return tuple(role.name for role in self.program.signature.inputs if role.kind is RoleKind.VALUE)

    @property
    def gives(self) -> tuple[str, ...]:
        """Names of the values it makes, in port order."""
        return tuple(role.name for role in self.program.signature.outputs if role.kind is RoleKind.VALUE)

    @property
    def gradients(self) -> tuple[str, ...]:
        """Parameters whose gradient it contributes to, in port order."""
        return tuple(role.name for role in self.program.signature.outputs if role.kind is RoleKind.GRADIENT)

    def __str__(self) -> str:
        return f"{self.kind}{self.stage}" + (f".{self.piece}" if self.kind is PartKind.BACKWARD_WEIGHT else "")


@dataclass(frozen=True)
class StageProgram:
    """All parts of one stage, in an order in which they can run, and its messages.

    receives, sends: activations from stage - 1 and to stage + 1; receives_back, sends_back: gradients from stage + 1 and to
    stage - 1. ``sends`` of a stage equals ``receives`` of the next, ``sends_back`` equals ``receives_back`` of the one before.
    parameters: those whose values the stage reads. values: everything that stands in its dictionary at some time, by name.
    """

    stage: int
    parts: tuple[StagePart, ...]
    receives: tuple[Value, ...] = ()
    sends: tuple[Value, ...] = ()
    receives_back: tuple[Value, ...] = ()
    sends_back: tuple[Value, ...] = ()
    parameters: tuple[str, ...] = ()
    values: Mapping[str, Value] | None = None

    def of(self, kind: PartKind) -> tuple[StagePart, ...]:
        """The parts of one kind: one F, at most one I, S and O, any number of W."""
        return tuple(part for part in self.parts if part.kind is kind)

    def held_after(self, kind: PartKind) -> tuple[Value, ...]:
        """Values that stay in the dictionary of a micro-batch once the last part of that kind has run and its message is out."""
        alive: dict[str, None] = {value.name: None for value in self.receives}
        for part in self.parts:
            if part.kind in ONCE:
                continue
            if part.kind is PartKind.BACKWARD_INPUT:
                alive.update((value.name, None) for value in self.receives_back)
            alive.update(dict.fromkeys(part.gives))
            for name in part.drops:
                alive.pop(name, None)
            if part.kind is kind and part is self.of(kind)[-1]:
                break
        values = self.values or {}
        return tuple(values[name] for name in alive)


@dataclass(frozen=True)
class TiedGroup:
    """A parameter that several stages read.

    Each stage accumulates its own contributions; once a step they are added, the last stage's first, and part O of the first of
    them updates the parameter. stages: that read it or contribute to its gradient; givers: those that contribute.
    """

    parameter: str
    stages: tuple[int, ...]
    givers: tuple[int, ...] = ()


@dataclass(frozen=True)
class Pipeline:
    """A program cut into stages.

    program: the one that was cut (one micro-batch, with its decisions); stages: in the order of the data.
    """

    program: Program
    stages: tuple[StageProgram, ...]
    tied: tuple[TiedGroup, ...] = ()
