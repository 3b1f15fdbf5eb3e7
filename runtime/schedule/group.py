"""One stage on several ranks of one process: every part runs for all of them together, since its collectives need them all.

    state of the group = one state for each rank, with the rank's pieces; a message = the messages of all ranks, one after the other

The loop of a pipeline rank (``run``) does not notice: it asks of a group what it asks of a stage.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import torch

from ..mesh import Mesh
from ..pieces import assemble, cut
from .stage import ONCE, Part, StageCode, StageState, ValueSpec, named

T = TypeVar("T")
Row = Sequence[torch.Tensor]
Together = Callable[[Sequence[Row]], Sequence[Sequence[torch.Tensor | None]]]
"""A part for all ranks: their arguments in, their results out."""

Layouts = Mapping[str, tuple[str, ...]]


@dataclass
class StageGroup:
    """A stage of all ranks of a mesh.

    code: with the messages of all ranks; members: the state of each rank; together: by the id of each part of the code, see
    ``Together``; given, returned: layouts of inputs of a micro-batch and of its outputs, by name; variants: micro-batches of
    another size -> their code.
    """

    code: StageCode
    mesh: Mesh
    members: Sequence[StageState]
    together: Mapping[int, Together]
    given: Layouts
    returned: Layouts
    variants: Mapping[int, StageCode] = field(default_factory=dict)

    def at(self, micro_batch: int) -> StageCode:
        """The code for a micro-batch."""
        return self.variants.get(micro_batch, self.code)

    def begin(self, given: Sequence[Mapping[str, torch.Tensor]]) -> None:
        """See ``StageState``; inputs are whole and are cut here."""
        pieces = [
            {name: cut(value, self.given[name], self.mesh) for name, value in batch.items() if name in self.given}
            for batch in given
        ]
        for rank, member in enumerate(self.members):
            member.begin([{name: found[rank] for name, found in batch.items()} for batch in pieces])

    def receive(self, micro_batch: int, specs: Sequence[ValueSpec], tensors: Sequence[torch.Tensor]) -> None:
        """See ``StageState``."""
        for member, some, theirs in zip(self.members, self._shares(specs), self._shares(tensors), strict=True):
            member.receive(micro_batch, some, theirs)

    def message(self, micro_batch: int, specs: Sequence[ValueSpec]) -> list[torch.Tensor]:
        """See ``StageState``."""
        shares = zip(self.members, self._shares(specs), strict=True)
        return [tensor for member, some in shares for tensor in member.message(micro_batch, some)]

    def run(self, part: Part, micro_batch: int, piece: int | None = None) -> None:
        """See ``StageState``."""
        results = self.together[id(part)]([member.arguments(part, micro_batch) for member in self.members])
        for member, found in zip(self.members, results, strict=True):
            member.take(part, micro_batch, found, piece)

    def add(self, micro_batch: int, piece: int) -> None:
        """See ``StageState``."""
        for member in self.members:
            member.add(micro_batch, piece)

    def forward_for_later(self, micro_batch: int) -> None:
        """See ``StageState``."""
        for member in self.members:
            member.keep_buffers(micro_batch)
        self.run(self.at(micro_batch).forward, micro_batch)

    def forget_forward(self, micro_batch: int) -> None:
        """See ``StageState``."""
        for member in self.members:
            member.forget_forward(micro_batch)

    def recompute(self, micro_batch: int) -> None:
        """See ``StageState``."""
        part = self.at(micro_batch).forward
        results = self.together[id(part)]([member.arguments(part, micro_batch) for member in self.members])
        for member, found in zip(self.members, results, strict=True):
            member.take_again(micro_batch, found)

    def drop(self, part: Part, micro_batch: int) -> None:
        """See ``StageState``."""
        for member in self.members:
            member.drop(part, micro_batch)

    def stash(self, micro_batch: int) -> None:
        """See ``StageState``."""
        for member in self.members:
            member.stash(micro_batch)

    def unstash(self, micro_batch: int) -> None:
        """See ``StageState``."""
        for member in self.members:
            member.unstash(micro_batch)

    def summands(self, name: str | None = None) -> list[torch.Tensor]:
        """See ``StageState``."""
        return [tensor for member in self.members for tensor in member.summands(name)]

    def share(self) -> list[dict[str, torch.Tensor]]:
        """See ``StageState``."""
        part = self.code.share
        assert part is not None, "only a stage with a part S shares something"
        results = self.together[id(part)]([member.arguments_once(part) for member in self.members])
        return [named(part, found) for found in results]

    def learn(self, found: Sequence[Mapping[str, torch.Tensor]]) -> None:
        """See ``StageState``."""
        for member, mine in zip(self.members, found, strict=True):
            member.values.setdefault(ONCE, {}).update(mine)

    def optimize(self) -> None:
        """See ``StageState``."""
        part = self.code.optimizer
        if part is None:
            results: Sequence[Sequence[torch.Tensor | None]] = [()] * len(self.members)
        else:
            results = self.together[id(part)]([member.arguments_once(part) for member in self.members])
        for member, found in zip(self.members, results, strict=True):
            member.finish(found)

    @property
    def outputs(self) -> dict[int, dict[str, torch.Tensor]]:
        """Whole outputs per micro-batch."""
        first, *_ = self.members
        return {
            m: {name: self._whole([member.outputs[m][name] for member in self.members], self.returned[name]) for name in found}
            for m, found in first.outputs.items()
        }

    def _whole(self, pieces: Sequence[torch.Tensor], layout: tuple[str, ...]) -> torch.Tensor:
        return assemble(pieces, layout, self.mesh)

    def _shares(self, entries: Sequence[T]) -> list[Sequence[T]]:
        """The entries of each rank."""
        each = len(entries) // len(self.members)
        return [entries[rank * each : (rank + 1) * each] for rank in range(len(self.members))]
