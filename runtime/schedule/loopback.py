"""All ranks of a pipeline in one process, taking turns wherever one waits: for exact tests of any number of stages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from ..errors import RunError
from .instruction import Schedule
from .links import LocalLink
from .run import PipelineRank, Reduce, Stage
from .sharing import Sharing
from .stage import StageState


class LoopbackPipeline:
    """Runs a schedule with all its stages here. states: one per stage, in order.

    ``step`` gives the outputs of every micro-batch; gradients and held tensors are read from the states.
    """

    def __init__(
        self,
        schedule: Schedule,
        states: Sequence[Stage],
        reduce: Reduce | None = None,
        sharing: Sharing | None = None,
    ) -> None:
        mailbox: dict[tuple[int, int], list[torch.Tensor]] = {}
        self.schedule = schedule
        self.states = tuple(states)
        self.ranks = [
            PipelineRank(
                schedule,
                rank,
                {stage: states[stage] for stage in schedule.stages_of(rank)},
                LocalLink(rank, mailbox),
                reduce=reduce,
                sharing=sharing,
            )
            for rank in range(len(schedule.ranks))
        ]
        self._mailbox = mailbox

    def step(self, given: Sequence[Mapping[str, torch.Tensor]]) -> list[dict[str, torch.Tensor]]:
        """Run the schedule once. given: per micro-batch, inputs, tangents and seeds by name. RunError where it deadlocks."""
        with torch.no_grad(), torch._C._DisableAutocast():
            self._take_turns(given)
        outputs: list[dict[str, torch.Tensor]] = [{} for _ in range(self.schedule.micro_batches)]
        for pipeline_rank in self.ranks:
            for found, mine in zip(outputs, pipeline_rank.outputs(), strict=True):
                found.update(mine)
        return outputs

    def _take_turns(self, given: Sequence[Mapping[str, torch.Tensor]]) -> None:
        self._mailbox.clear()
        loops = [rank.steps(given) for rank in self.ranks]
        blocked: dict[int, int] = {}
        running = set(range(len(loops)))
        while running:
            progress = False
            for rank in sorted(running):
                if rank in blocked and not self.ranks[rank].link.ready(blocked[rank]):
                    continue
                progress = True
                tag = next(loops[rank], None)
                if tag is None:
                    running.discard(rank)
                else:
                    blocked[rank] = tag
            if not progress:
                raise RunError(f"the ranks {sorted(running)} wait for one another: the schedule {self.schedule.name!r} deadlocks")

    def gradients(self) -> dict[str, torch.Tensor]:
        """Sums of the last step, by parameter; contributions of several stages to one are added, the last stage's first."""
        found: dict[str, torch.Tensor] = {}
        for state in reversed(self.states):
            assert isinstance(state, StageState), "the members of a group have pieces of gradients"
            for name in state.filled:
                mine = state.gradients[name]
                found[name] = found[name] + mine if name in found else mine
        return found
