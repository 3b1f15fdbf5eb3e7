"""What stages tell each other once a step, after the last micro-batch and before the optimizer.

    ties      g = g_last + .. + g_first      a parameter that several stages read: the first adds up, the last one's share first
    scalars   S of every stage               squares of norms, say: every rank gets those of all stages

All of it travels as messages of the pipeline's link, posted before anything is sent, so that nothing can deadlock.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from .group import StageGroup
from .instruction import Schedule
from .links import Link
from .stage import StageState, ValueSpec


@dataclass(frozen=True)
class Tie:
    """A parameter whose gradient several stages contribute to. givers: those stages, ascending; the first one adds up."""

    parameter: str
    givers: tuple[int, ...]


@dataclass(frozen=True)
class Sharing:
    """ties: see ``Tie``; scalars: stage -> what its part S makes, for those that have one."""

    ties: tuple[Tie, ...] = ()
    scalars: Mapping[int, tuple[ValueSpec, ...]] | None = None

    def run(self, schedule: Schedule, rank: int, states: Mapping[int, StageState | StageGroup], link: Link) -> Iterator[int]:
        """Bring every stage of a rank to the point where its optimizer can run. Yields the tag of a message it will wait for."""
        yield from _Exchange(self, schedule, rank, states, link).run()


@dataclass
class _Exchange:
    sharing: Sharing
    schedule: Schedule
    rank: int
    states: Mapping[int, StageState | StageGroup]
    link: Link

    def run(self) -> Iterator[int]:
        arriving = self._post()
        for tie in self.sharing.ties:
            self._hand_out(tie)
        for tie in self.sharing.ties:
            if tie.givers[0] in self.states:
                yield from self._add_up(tie, arriving)
        for stage, specs in (self.sharing.scalars or {}).items():
            if stage in self.states:
                self._tell(stage, specs)
        for stage, specs in (self.sharing.scalars or {}).items():
            if stage not in self.states:
                yield arriving[stage]
                found = [_unpacked(packed, specs) for packed in self.link.take(arriving[stage])]
                for state in self.states.values():
                    state.learn(found)

    def _post(self) -> dict[object, int]:
        """Post every message that this rank will get; what it is for -> its tag."""
        arriving: dict[object, int] = {}
        for number, tie in enumerate(self.sharing.ties):
            owner = tie.givers[0]
            for giver in tie.givers[1:] if owner in self.states else ():
                if giver not in self.states:
                    arriving[tie, giver] = tag = self._tie_tag(number, giver)
                    self.link.post(tag, self.schedule.placement[giver], _contiguous(self.states[owner].summands(tie.parameter)))
        copies = max((len(state.summands()) for state in self.states.values()), default=1)
        for stage, specs in (self.sharing.scalars or {}).items():
            if stage not in self.states:
                arriving[stage] = tag = self._scalar_tag(stage, self.rank)
                self.link.post(tag, self.schedule.placement[stage], [_packed_spec(specs)] * copies)
        return arriving

    def _hand_out(self, tie: Tie) -> None:
        owner = tie.givers[0]
        for giver in tie.givers[1:]:
            if giver in self.states and owner not in self.states:
                mine = self.states[giver].summands(tie.parameter)
                tag = self._tie_tag(self.sharing.ties.index(tie), giver)
                self.link.send(tag, self.schedule.placement[owner], _contiguous(mine), [one.contiguous() for one in mine])

    def _add_up(self, tie: Tie, arriving: Mapping[object, int]) -> Iterator[int]:
        total: list[torch.Tensor] = []
        for giver in reversed(tie.givers):
            if giver in self.states:
                share: Sequence[torch.Tensor] = self.states[giver].summands(tie.parameter)
            else:
                yield arriving[tie, giver]
                share = self.link.take(arriving[tie, giver])
            total = [one + other for one, other in zip(total, share, strict=True)] if total else list(share)
        for target, value in zip(self.states[tie.givers[0]].summands(tie.parameter), total, strict=True):
            target.copy_(value)

    def _tell(self, stage: int, specs: Sequence[ValueSpec]) -> None:
        found = self.states[stage].share()
        for other in self.states.values():
            other.learn(found)
        packed = [_packed(values, specs) for values in found]
        for rank in range(len(self.schedule.ranks)):
            if rank != self.rank:
                self.link.send(self._scalar_tag(stage, rank), rank, [_packed_spec(specs)] * len(packed), packed)

    def _tie_tag(self, number: int, giver: int) -> int:
        """Above the tags of all values (``instruction.Value.tag``)."""
        return (2 * self.schedule.micro_batches + number) * self.schedule.stages + giver

    def _scalar_tag(self, stage: int, receiver: int) -> int:
        above = (2 * self.schedule.micro_batches + len(self.sharing.ties)) * self.schedule.stages
        return above + stage * len(self.schedule.ranks) + receiver


def _contiguous(tensors: Sequence[torch.Tensor]) -> list[ValueSpec]:
    """Descriptions of tensors as they travel, row by row, whatever their own strides are."""
    like = [torch.empty(tensor.shape, dtype=tensor.dtype, device="meta") for tensor in tensors]
    return [ValueSpec("a share of a gradient", tuple(one.shape), one.dtype, one.stride()) for one in like]


def _packed_spec(specs: Sequence[ValueSpec]) -> ValueSpec:
    return ValueSpec("scalars of a stage", (sum(spec.nbytes for spec in specs),), torch.uint8, (1,))


def _packed(values: Mapping[str, torch.Tensor], specs: Sequence[ValueSpec]) -> torch.Tensor:
    """The values as bytes, one after the other."""
    return torch.cat([values[spec.name].reshape(-1).view(torch.uint8) for spec in specs])


def _unpacked(packed: torch.Tensor, specs: Sequence[ValueSpec]) -> dict[str, torch.Tensor]:
    found = {}
    parts = packed.split([spec.nbytes for spec in specs])
    for spec, part in zip(specs, parts, strict=True):
        found[spec.name] = spec.new().copy_(part.clone().view(spec.dtype).reshape(spec.shape))
    return found
