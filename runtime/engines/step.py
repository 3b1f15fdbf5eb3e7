"""What a caller of the local engine holds: a loaded program, a forward whose saved values are alive, a step under way."""

from __future__ import annotations

import struct
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import torch

from ..memory import BlockPlan
from ..ports import PortMap
from ..program import RankProgram
from .binding import Binding


@dataclass(eq=False)
class LocalHandle:
    """A program on the ranks of one engine."""

    number: int
    program: RankProgram
    ports: PortMap
    bindings: list[Binding]
    fed: list[BlockPlan]
    out: list[BlockPlan]
    packers: list[struct.Struct]
    home: torch.device
    runs: int = 0


@dataclass(eq=False)
class LocalTicket:
    """A forward whose saved values are alive on the ranks. ``inputs``: blocks that the ranks still read."""

    number: int
    handle: LocalHandle
    inputs: list[torch.Tensor]
    dropped: deque[int]
    released: bool = False

    def drop(self) -> None:
        """The saved values are no longer wanted. Takes no lock: it runs in whatever thread the last reference dies."""
        if not self.released:
            self.released = True
            self.dropped.append(self.number)
            self.inputs = []

    def __del__(self) -> None:
        self.drop()


class Step:
    """A segment under way on the ranks. ``result()`` waits for it; call it once."""

    def __init__(self, settle: Callable[[Step], None], handle: LocalHandle, segment: int, sequence: int) -> None:
        self._settle, self._handle, self._segment, self._sequence = settle, handle, segment, sequence
        self.ticket: LocalTicket
        self.values: list[torch.Tensor | None] = []
        self.blocks: list[torch.Tensor] = []
        self.settled = False

    def result(self) -> list[torch.Tensor | None]:
        """The results, in the order of ``segment_outputs``. Raises RunError as ``forward`` and ``backward`` do."""
        self._settle(self)
        return self.values

    @property
    def updates(self) -> bool:
        """Whether parameters, buffers or states get new values, which must be written before anything else runs."""
        return any(result.bound is not None for result in self._handle.ports.results[self._segment])

    def finish(self) -> None:
        """The ranks are done: updated tensors of the user change their version, and results go where the user's tensors are."""
        bound = dict(zip(self._handle.ports.bound, self._handle.bindings, strict=True))
        results = self._handle.ports.results[self._segment]
        for index, result in enumerate(results):
            value = self.values[index]
            if result.bound is not None:
                bound[result.bound].publish()
            elif value is not None and self._handle.home.type != "cpu":
                self.values[index] = value.to(self._handle.home)
        self.blocks = []
        self.settled = True

    @property
    def handle(self) -> LocalHandle:
        """The program that runs."""
        return self._handle

    @property
    def sequence(self) -> int:
        """Number of the message that started it."""
        return self._sequence
