"""What can be planned for more ranks than there are here: simulated, with costs that differ from stage to stage."""

from __future__ import annotations

import random
import statistics
import time

from common import Row

from hocket.compiler.plan.pipeline.chain import Chain
from hocket.compiler.plan.pipeline.costs import LinkCosts, PipelineCosts, StageCosts
from hocket.compiler.plan.pipeline.forms import NAMES, closed_form
from hocket.compiler.plan.pipeline.improve import Effort
from hocket.compiler.plan.pipeline.joint import Space, search_jointly
from hocket.compiler.plan.pipeline.problem import Problem
from hocket.compiler.plan.pipeline.simulate import simulate
from hocket.compiler.plan.pipeline.synthesise import synthesise
from hocket.compiler.plan.pipeline.taper import tapers
from hocket.errors import InputError

HELD = 0.73
"""Share of the activations kept between I and W, as measured for Llama."""


def uneven_chain(ranks: int, seed: int) -> Chain:
    """Four units a rank whose costs differ, an embedding without an input gradient before and a large head behind."""
    rng = random.Random(seed)
    units = []
    for _ in range(4 * ranks):
        forward, kept = 0.25 * rng.uniform(0.6, 1.4), 0.25 * rng.uniform(0.7, 1.3)
        backward, weight = forward * rng.uniform(1.0, 1.35), forward * rng.uniform(0.4, 0.8)
        units.append(StageCosts(forward, backward, (weight,), None, forward, kept, (HELD * kept,), 0.1 * kept))
    first, last = units[0], units[-1]
    units[0] = StageCosts(
        first.forward, 0.1 * first.forward, (first.forward,), None, first.forward, first.activation, first.held, first.stash
    )
    heavy = 2 * last.forward
    units[-1] = StageCosts(heavy, heavy, (heavy,), None, heavy, last.activation, last.held, last.stash)
    return Chain(tuple(units), LinkCosts(latency=0.02, send=0.01, receive=0.01), fixed=0.02)


def by_hand(chain: Chain, ranks: int, micro_batches: int, limit: float) -> dict[str, float]:
    """Simulated seconds of every closed form that fits into the limit, on stages balanced by work."""
    found = {}
    for name in NAMES:
        try:
            schedule = closed_form(name, ranks, micro_batches)
        except InputError:
            continue
        result = simulate(schedule, chain.cut(chain.balanced(schedule.stages)))
        if max(result.peaks) <= limit * (1 + 1e-9):
            found[name] = result.seconds
    return found


def synthesis_rows(*, quick: bool) -> list[Row]:
    """Synthesised against the best schedule by hand, at equal memory."""
    cases = [(4, 8), (4, 16), (8, 16), (8, 32), (16, 32)] if not quick else [(4, 8)]
    rows, ratios = [], []
    for ranks, micro_batches in cases:
        chain = uneven_chain(ranks, ranks * 100 + micro_batches)
        one = max(simulate(closed_form("1f1b", ranks, micro_batches), chain.cut(chain.balanced(ranks))).peaks)
        for memory in (1.0, 1.5):
            limit = one * memory
            hand = by_hand(chain, ranks, micro_batches, limit)
            best = min(hand, key=lambda name: hand[name])
            plan = search_jointly(
                chain, ranks, micro_batches, (limit,) * ranks, Space(granularity=4), Effort(3.0 if quick else 8.0)
            )
            ours = plan.synthesis.seconds
            ratios.append(hand[best] / ours)
            case = f"{ranks} ranks, {micro_batches} micro-batches, {memory:g}x the memory of 1F1B; best by hand: {best}"
            text = f"{ours:.2f} vs {hand[best]:.2f}, gap to the bound {plan.synthesis.gap:.1%}"
            rows.append(Row("schedules by search", case, ours, "units", {best: hand[best]}, ratios[-1], simulated=True, text=text))
    mean = statistics.fmean(ratios)
    rows.append(
        Row(
            "schedules by search",
            "mean of these",
            mean,
            "x",
            {},
            mean,
            ">= 1.05x",
            mean >= 1.05,
            simulated=True,
            text=f"{mean:.3f}x",
        )
    )
    return rows


def taper_rows() -> list[Row]:
    """Uneven micro-batches of the same total against ZB-H1 on even ones; an instruction costs 5 % of a full forward besides.

    The gain comes from the bubble, so it depends on the costs: both those of a Llama and equal ones are shown.
    """
    rows = []
    for label, one in (
        ("costs of a Llama", StageCosts(1.0, 1.27, (0.59,), held=(HELD,))),
        ("equal costs", StageCosts(1, 1, (1,), held=(HELD,))),
    ):
        rows += [_taper_row(ranks, one, label) for ranks in (4, 8)]
    return rows


def _taper_row(ranks: int, one: StageCosts, label: str) -> Row:
    total = 2 * ranks
    costs = PipelineCosts((one,) * ranks, LinkCosts(), fixed=0.05)
    even = simulate(closed_form("zb-h1", ranks, total), costs)
    best, sizes = float("inf"), ()
    for candidate in tapers(total, granularity=8, most=2 * ranks - 2):
        problem = Problem(costs, tuple(range(ranks)), len(candidate), tuple(even.peaks), candidate)
        found = synthesise(problem, Effort(1.0, moves=4000))
        if found.seconds < best:
            best, sizes = found.seconds, candidate
    ratio = even.seconds / best
    text = f"{best:.2f} vs {even.seconds:.2f}; sizes {' '.join(f'{size:g}' for size in sizes)}"
    case, peers = f"{ranks} ranks, {total} full micro-batches in all, the memory of ZB-H1, {label}", {"ZB-H1": even.seconds}
    return Row("tapered micro-batches", case, best, "units", peers, ratio, ">= 1.1x", ratio >= 1.1, simulated=True, text=text)


def speed_rows() -> list[Row]:
    """How long the planning of a large pipeline takes."""
    rows = []
    for name in ("straight", "v"):
        ranks, count = 16, 64
        stages = ranks if name == "straight" else 2 * ranks
        placement = tuple(range(ranks)) if name == "straight" else (*range(ranks), *reversed(range(ranks)))
        one = StageCosts(1.0, 1.2, (0.6,), held=(HELD,))
        problem = Problem(PipelineCosts((one,) * stages, LinkCosts(0.02)), placement, count, (float(2 * ranks),) * ranks)
        start = time.perf_counter()
        found = synthesise(problem, Effort(6.0))
        took = time.perf_counter() - start
        text = f"{took:.1f} s, at most {found.gap:.1%} above the optimum"
        rows.append(
            Row(
                "planning time",
                f"{ranks} ranks x {count} micro-batches, {name}",
                took,
                "s",
                goal="<= 10 s",
                met=took <= 10,
                text=text,
            )
        )
    return rows
