"""What stages tell each other before the optimizer runs: the same for any placement of stages on ranks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hocket.runtime.schedule.instruction import Instr, Op, Schedule
from hocket.runtime.schedule.loopback import LoopbackPipeline
from hocket.runtime.schedule.sharing import Sharing, Tie
from hocket.runtime.schedule.stage import Part, Port, StageCode, StageState, ValueSpec


class Started(StageState):
    """A stage whose gradients are there when a step begins."""

    def begin(self, given: Sequence[Mapping[str, torch.Tensor]]) -> None:
        super().begin(given)
        self.filled = set(self.gradients)


def stage(number: int, gradients: dict[str, torch.Tensor], readers: tuple[str, ...]) -> StageState:
    """A stage whose gradients are there; S squares one of its own, O adds up what all stages have shared."""
    nothing = Part(lambda _: [], (), ())
    mine = f"square {number}"
    share = Part(lambda a: [(a[0] * a[0]).sum()], (Port("gradient", f"own {number}"),), (Port("value", mine),))
    update = Part(
        lambda a: [torch.stack(list(a)).sum()], tuple(Port("value", name) for name in readers), (Port("update", f"total {number}"),)
    )
    state = Started(
        StageCode(number, nothing, nothing, (nothing,), share, update),
        {Port("state", f"total {number}"): torch.zeros(())},
        {name: value.clone() for name, value in gradients.items()},
    )
    return state


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_ties_are_summed_last_stage_first_and_scalars_reach_every_stage(data: st.DataObject) -> None:
    stages = data.draw(st.integers(1, 5), "stages")
    ranks = data.draw(st.integers(1, stages), "ranks")
    placement = [*range(ranks), *(data.draw(st.integers(0, ranks - 1)) for _ in range(stages - ranks))]
    placement = data.draw(st.permutations(placement))
    givers = sorted(data.draw(st.sets(st.integers(0, stages - 1), min_size=min(2, stages)), "givers"))
    torch.manual_seed(stages)
    parts = {s: torch.randn(3, 2) * 10.0**s for s in givers}
    readers = tuple(f"square {s}" for s in range(stages))
    states = []
    for s in range(stages):
        gradients = {f"own {s}": torch.full((2,), float(s + 1))}
        if s in parts:
            gradients["tied"] = parts[s].t() if s % 2 else parts[s].t().contiguous()
        states.append(stage(s, gradients, readers))
    ends = [[Instr(op, s, 0) for op in (Op.REDUCE, Op.OPT) for s in range(stages) if placement[s] == r] for r in range(ranks)]
    schedule = Schedule(tuple(placement), 1, (1,) * stages, tuple(map(tuple, ends)))
    ties = (Tie("tied", tuple(givers)),) if len(givers) > 1 else ()
    scalars = {s: (ValueSpec(f"square {s}", (), torch.float32, ()),) for s in range(stages)}
    pipeline = LoopbackPipeline(schedule, states, sharing=Sharing(ties, scalars))
    pipeline.step([{}])
    if ties:
        total = parts[givers[-1]].t()
        for s in reversed(givers[:-1]):
            total = total + parts[s].t()
        assert torch.equal(states[givers[0]].gradients["tied"], total)
    expected = float(sum(2 * (s + 1) ** 2 for s in range(stages)))
    for s, state in enumerate(states):
        assert float(state.held[Port("state", f"total {s}")]) == expected
