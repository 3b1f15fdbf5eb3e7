"""What no order can beat: lower bounds of the step time for given stages, placement and costs.

For a rank: nothing starts before the first value has come down the pipeline, then all its work has to be done,

    T >= head + sum of all its work

and when its last I of stage s is done, all its forwards and the I of its stages from s on are done, and the gradient still has to
go back to stage 0:

    T >= head + forwards + I of stages >= s + I of stages s-1 .. 0 + W of stage 0

and the critical path of one micro-batch. Memory limits only make things longer, so the bounds hold with them too.
"""

from __future__ import annotations

from .problem import Arrays


def lower_bound(found: Arrays) -> float:
    """Seconds that every schedule of the problem takes at least."""
    problem = found.problem
    best = max(found.tail[f] for f in found.forward[0])
    heads = [min(_head(found, stage, m) for m in range(problem.micro_batches)) for stage in range(len(found.forward))]
    for rank in range(problem.ranks):
        mine = [stage for stage, holder in enumerate(problem.placement) if holder == rank]
        head = min(heads[stage] for stage in mine)
        work = sum(found.seconds[n] + found.early[n] for n, holder in enumerate(found.rank) if holder == rank)
        best = max(best, head + work)
        forwards = sum(found.seconds[n] for stage in mine for n in found.forward[stage])
        for stage in mine:
            inputs = sum(found.seconds[n] + found.early[n] for later in mine if later >= stage for n in found.backward[later])
            back = min(_way_back(found, stage, m) for m in range(problem.micro_batches))
            best = max(best, head + forwards + inputs + back)
    return best


def _head(found: Arrays, stage: int, micro_batch: int) -> float:
    """Earliest arrival of a micro-batch at a stage."""
    chain = [found.forward[before][micro_batch] for before in range(stage)]
    arriving = found.lag[found.forward[stage][micro_batch]] if stage else 0.0
    return sum(found.seconds[n] + found.lag[n] for n in chain) + arriving


def _way_back(found: Arrays, stage: int, micro_batch: int) -> float:
    """From the end of I at a stage to the end of the last W that depends on it."""
    last = found.backward[stage][micro_batch]
    return found.tail[last] - found.seconds[last]
