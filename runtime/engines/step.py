"""What a caller of the local engine holds: a loaded program, a forward whose saved values are alive, a step under way."""

from __future__ import annotations

import struct
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import EllipsisType

import torch

from ..errors import InputError
from ..memory import BlockPlan
from ..ports import PortMap, check_value, torch_dtype
from ..program import PortSpec, RankProgram
from ..regions import Report
from .binding import Binding

Blocks = tuple[list[torch.Tensor], list[int]]
"""Tensors in shared memory, and (segment, byte offset) of each, flat."""


@dataclass(eq=False)
class SegmentPlan:
    """What a step of one segment needs, worked out once.

    ports: specifications of the inputs given at each call; kinds: their shapes and dtypes; fed, out: their blocks and those of the
    results; packer: of the message, which holds an epoch and the place of every block; slots: per result the tensor of the user
    that it updates, None where there is no value, or ``...`` for the next block of ``out``; updated: the bindings that get a new
    value; spare: blocks of inputs that no step uses now, with their places.
    """

    name: str
    ports: tuple[PortSpec, ...]
    kinds: tuple[tuple[tuple[int, ...], torch.dtype], ...]
    fed: BlockPlan
    out: BlockPlan
    packer: struct.Struct
    slots: tuple[torch.Tensor | EllipsisType | None, ...]
    updated: tuple[Binding, ...]
    spare: list[Blocks] = field(default_factory=list)

    @classmethod
    def of(cls, program: RankProgram, ports: PortMap, bindings: Sequence[Binding], segment: int) -> SegmentPlan:
        """The plan of segment number ``segment``."""
        bound = dict(zip(ports.bound, bindings, strict=True))
        results = ports.results[segment]
        given = tuple(program.inputs[i] for i in ports.fed[segment])
        made = [program.outputs[r.port] for r in results if not r.absent and r.bound is None]
        kinds = tuple((port.shape, torch_dtype(port.dtype)) for port in given)
        fed = BlockPlan.of(kinds)
        out = BlockPlan.of([(port.shape, torch_dtype(port.dtype)) for port in made])
        packer = struct.Struct(f"<q{2 * (len(given) + len(made))}q")
        slots = tuple(None if r.absent else bound[r.bound].user if r.bound is not None else ... for r in results)
        updated = tuple(bound[r.bound] for r in results if r.bound is not None)
        return cls(program.segments[segment].name, given, kinds, fed, out, packer, slots, updated)

    def check(self, given: Sequence[torch.Tensor | None], *, optional: bool) -> None:
        """InputError unless every value fits its port; with ``optional``, None fits every port."""
        if len(given) != len(self.ports):
            raise InputError(f"expected {len(self.ports)} inputs of {self.name}, found {len(given)}")
        for port, (shape, dtype), value in zip(self.ports, self.kinds, given, strict=True):
            if value is None and optional:
                continue
            if not isinstance(value, torch.Tensor) or value.shape != shape or value.dtype is not dtype:
                check_value(port, value, "input")

    def results(self, outputs: list[torch.Tensor]) -> list[torch.Tensor | None]:
        """What the caller gets, from the blocks of ``out``."""
        if len(outputs) == len(self.slots):
            return list(outputs)
        fresh = iter(outputs)
        return [next(fresh) if slot is ... else slot for slot in self.slots]


@dataclass(eq=False)
class LocalHandle:
    """A program on the ranks of one engine. home: where the user's tensors are; fusion: what Inductor made of it, if asked."""

    number: int
    program: RankProgram
    ports: PortMap
    bindings: list[Binding]
    segments: list[SegmentPlan]
    home: torch.device
    runs: int = 0
    fusion: Report | None = None


@dataclass(eq=False)
class LocalTicket:
    """A forward whose saved values are alive on the ranks. inputs: blocks that the ranks still read."""

    number: int
    handle: LocalHandle
    dropped: deque[int]
    released: bool
    inputs: Blocks | None = None

    def drop(self) -> None:
        """The saved values are no longer wanted. Takes no lock: it runs in whatever thread the last reference dies."""
        if not self.released:
            self.released = True
            self.dropped.append(self.number)
            self.inputs = None

    def __del__(self) -> None:
        self.drop()


class Step:
    """A segment under way on the ranks. ``result()`` waits for it."""

    __slots__ = ("_settle", "blocks", "handle", "kept", "plan", "sequence", "settled", "ticket", "values")

    def __init__(self, settle: Callable[[Step], None], handle: LocalHandle, plan: SegmentPlan, ticket: LocalTicket) -> None:
        self._settle = settle
        self.handle, self.plan, self.ticket = handle, plan, ticket
        self.sequence = 0
        self.values: list[torch.Tensor | None] = []
        self.blocks: Blocks | None = None
        self.kept: Blocks | None = None
        self.settled = False

    def result(self) -> list[torch.Tensor | None]:
        """The results, in the order of ``segment_outputs``. Raises RunError as ``forward`` and ``backward`` do."""
        if not self.settled:
            self._settle(self)
        return self.values

    def finish(self) -> None:
        """The ranks are done: updated tensors of the user change their version, results go where the user's tensors are, and blocks
        of inputs that no saved value refers to can serve the next step."""
        for binding in self.plan.updated:
            binding.publish()
        if self.handle.home.type != "cpu":
            home = self.handle.home
            self.values = [None if value is None else value.to(home) for value in self.values]
        first = self.plan is self.handle.segments[0]
        if self.blocks is not None and (len(self.handle.segments) == 1 or not first):
            self.plan.spare.append(self.blocks)
        if self.kept is not None:
            self.handle.segments[0].spare.append(self.kept)
        self.blocks = self.kept = None
        self.settled = True
