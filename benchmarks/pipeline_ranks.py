"""Real steps of a Llama-like model on two ranks of one thread each: hocket's schedules, and all of torch.distributed.pipelining.

Every contender takes its turn in each round. hocket plans from the costs that it traced during the first steps, before it is timed.
"""

from __future__ import annotations

import os
import socket
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.queues import Queue
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from pipeline_models import CASES
from pipeline_ours import Cut, cut_by_traces, cut_evenly, cut_llama, link_costs, new_link, placement, run, traced_costs
from pipeline_peers import peers

from hocket.compiler.demo.llama import Llama, LlamaConfig
from hocket.compiler.plan.pipeline.costs import PipelineCosts, StageCosts
from hocket.compiler.plan.pipeline.forms import closed_form
from hocket.compiler.plan.pipeline.improve import Effort
from hocket.compiler.plan.pipeline.problem import Problem
from hocket.compiler.plan.pipeline.simulate import simulate
from hocket.compiler.plan.pipeline.synthesise import synthesise
from hocket.runtime.schedule.instruction import Schedule
from hocket.runtime.schedule.run import Stamp
from hocket.runtime.schedule.text import format_schedule, parse_schedule

HAND = {"1f1b": "straight", "1f1b-2bp": "straight", "zb-h1": "straight", "interleaved": "loop", "zb-v": "v", "zb-v, own v": "own v"}
"""Form -> stages; "own v" are cut where hocket cuts them, all others between layers as torch's are."""
TRACED = {"straight": "zb-h1", "v": "zb-v", "own v": "zb-v", "wave": ""}
"""The schedules that costs are traced in, by placement; where no form is known, one that is made for stages of a Llama."""

TRIED, TRIALS = 5, 4
"""The schedules of the least predicted time that take a trial, and its steps. The slower half then leaves, and so on, by the median
of all their steps; the last one is chosen (successive halving; Karnin et al., ICML 2013)."""

TABLE = (("naive", 1), ("gpipe", 2), ("1f1b", 2), ("1f1b", 4))
"""2BP's rows at two stages: naive, GPipe, 1F1B-1 and 1F1B-2."""

STAGES = {"straight": 2, "loop": 4, "v": 4, "own v": 4, "wave": 8}


@dataclass(frozen=True)
class Setting:
    """One measurement.

    config: of the model; micro_batches: each one sequence; rounds: timed; seconds: of search for a schedule; table: the rows of
    2BP instead of all schedules, for that model ("": not); inductor: compile every part (two stages a rank only).
    """

    config: LlamaConfig
    micro_batches: int
    rounds: int
    seconds: float = 4.0
    table: str = ""
    inductor: bool = False


@dataclass
class Found:
    """What a contest found.

    seconds: of every contender's steps; predicted: before they ran, in_situ: with the costs that they had while they ran; bound: no
    schedule is faster; chosen: what hocket would run; gradients_agree: largest relative difference of a norm from torch's;
    deeper: of 2BP's rows at more stages, simulated: gain and the most it can be.
    """

    seconds: dict[str, list[float]]
    predicted: dict[str, float]
    in_situ: dict[str, float]
    bound: float
    chosen: str
    gradients_agree: float
    deeper: dict[str, tuple[float, float]] = field(default_factory=dict)


def measure(setting: Setting) -> Found:
    """Run it on two processes."""
    context = mp.get_context("spawn")
    queue: Any = context.Queue()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    folder = "/dev/shm" if os.path.isdir("/dev/shm") else None
    with tempfile.NamedTemporaryFile(dir=folder, prefix="hocket-bench-") as shared:
        ranks = [context.Process(target=_rank, args=(rank, (port, shared.name), setting, queue)) for rank in range(2)]
        for process in ranks:
            process.start()
        try:
            found = queue.get(timeout=900)
        finally:
            for process in ranks:
                process.join(timeout=60)
                process.terminate()
    if isinstance(found, str):
        raise RuntimeError(found)
    assert isinstance(found, Found)
    return found


def _rank(rank: int, where: tuple[int, str], setting: Setting, queue: Queue[Any]) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(where[0]), GLOO_SOCKET_IFNAME="lo")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=2)
    try:
        contest = _Table(rank, setting, where[1]) if setting.table else _Contest(rank, setting, where[1])
        found = contest.run()
        if rank == 0:
            queue.put(found)
    except BaseException as error:
        queue.put(f"rank {rank}: {type(error).__name__}: {error}")
        raise
    dist.barrier()
    dist.destroy_process_group()


class _Contest:
    """All contenders on one rank."""

    def __init__(self, rank: int, setting: Setting, shared: str) -> None:
        self.rank, self.setting = rank, setting
        torch.manual_seed(0)
        self.model = Llama(setting.config)
        shape = (setting.micro_batches, setting.config.context)
        self.tokens = torch.randint(0, setting.config.vocabulary, shape)
        self.targets = torch.randint(0, setting.config.vocabulary, shape)
        self.link = new_link(shared)
        example = (self.tokens[:1], self.targets[:1])
        mine = {name: [s for s, r in enumerate(placement(name)) if r == rank] for name in STAGES}
        inductor = setting.inductor
        v = cut_llama(self.model, example, 4, sorted({*mine["v"], *(() if inductor else mine["loop"])}), inductor=inductor)
        self.cuts: dict[str, Cut] = {"v": v} if inductor else {"v": v, "loop": v}
        if not inductor:
            self.cuts["straight"] = cut_llama(self.model, example, 2, mine["straight"])
            if setting.config.layers >= STAGES["wave"]:
                self.cuts["wave"] = cut_llama(self.model, example, STAGES["wave"], mine["wave"])
        self.stamps: dict[str, list[Stamp]] = {}

    def run(self) -> Found:
        """Trace, plan, measure."""
        m = self.setting.micro_batches
        size = self.setting.config.context * self.setting.config.width * 4
        link = link_costs(self.link, size)
        costs = {name: self.traced(self.first_schedule(name), name, link) for name in TRACED if name in self.cuts}
        if not self.setting.inductor:
            mine = [s for s, r in enumerate(placement("own v")) if r == self.rank]
            self.cuts["own v"] = cut_by_traces(self.cuts["v"], costs["v"], self.model, mine)
            costs["own v"] = self.traced(self.first_schedule("own v"), "own v", link)
        schedules = {name: (closed_form(name.partition(",")[0], 2, m), where) for name, where in HAND.items() if where in self.cuts}
        predicted = {name: simulate(s, costs["v" if w == "loop" else w]).seconds for name, (s, w) in schedules.items()}
        bound = float("inf")
        for where in costs:
            schedule, seconds, least = self.planned(costs[where], where)
            schedules[f"synthesised, {where}"], predicted[f"synthesised, {where}"] = (schedule, where), seconds
            bound = min(bound, least)
        contenders: dict[str, Callable[[], object]] = {}
        for name, (schedule, where) in schedules.items():
            cut = self.cuts[where]
            self.stamps[name] = []
            runner, given = run(schedule, cut, self.link, self.stamps[name]), cut.given(self.tokens, self.targets)
            contenders[f"hocket {name}"] = lambda runner=runner, given=given: runner.step(given)  # type: ignore[misc]
        likely = sorted(predicted, key=lambda name: predicted[name])[:TRIED]
        chosen = fastest({name: contenders[f"hocket {name}"] for name in likely})
        for peer in peers(self.rank, self.model, self.tokens, self.targets, compiled=self.setting.inductor):
            contenders[f"torch {peer.name}"] = peer.step
        agree = self.agreement(contenders[f"hocket {chosen}"], self.cuts[schedules[chosen][1]], contenders["torch 1F1B"])
        for stamps in self.stamps.values():
            stamps.clear()
        seconds = timed(contenders, self.setting.rounds)
        again = {name: self.predict_again(name, *schedules[name], link) for name in schedules}
        return Found(seconds, predicted, again, bound, chosen, agree)

    def predict_again(self, name: str, schedule: Schedule, where: str, link: Any) -> float:
        """The simulator's seconds with the costs that this very schedule had while it was timed."""
        costs = traced_costs(self.cuts[where], self.stamps[name], link, statistics.fmean)
        return simulate(schedule, costs).seconds

    def traced(self, schedule: Schedule, where: str, link: Any) -> PipelineCosts:
        """Costs of the third and fourth step, after two that warm up."""
        cut, stamps = self.cuts[where], list[Stamp]()
        runner = run(schedule, cut, self.link)
        given = cut.given(self.tokens, self.targets)
        for step in range(5):
            runner.stamps = stamps if step >= 2 else None
            dist.barrier()
            runner.step(given)
        return traced_costs(cut, stamps, link)

    def planned(self, costs: PipelineCosts, where: str) -> tuple[Schedule, float, float]:
        """The schedule found on rank 0, its predicted seconds, and the bound."""
        message: list[Any] = [None]
        if self.rank == 0:
            problem = Problem(costs, placement(where), self.setting.micro_batches)
            found = synthesise(problem, Effort(self.setting.seconds))
            message = [(format_schedule(found.schedule), found.seconds, found.bound)]
        dist.broadcast_object_list(message, 0)
        text, seconds, bound = message[0]
        return parse_schedule(text), seconds, bound

    def agreement(self, ours: Callable[[], object], cut: Cut, theirs: Callable[[], object]) -> float:
        """Largest relative difference of a gradient's norm between hocket and torch, over the parameters of both ranks."""
        ours()
        mine: dict[str, float] = {}
        for state in cut.states.values():
            for name in state.filled:
                mine[name] = float(state.gradients[name].double().norm())
        theirs()
        other = {name: float(p.grad.double().norm()) for name, p in self.model.named_parameters() if p.grad is not None}
        everyone: list[Any] = [None, None]
        dist.all_gather_object(everyone, (mine, other))
        left, right = everyone[0][0] | everyone[1][0], everyone[0][1] | everyone[1][1]
        assert left.keys() == right.keys()
        return max(abs(left[name] / right[name] - 1) for name in left)

    def first_schedule(self, where: str) -> Schedule:
        """One to trace costs in."""
        if TRACED[where]:
            return closed_form(TRACED[where], 2, self.setting.micro_batches)
        like_a_llama = StageCosts(5e-3, 6e-3, (4e-3,))
        return self.planned(PipelineCosts((like_a_llama,) * STAGES[where]), where)[0]


def timed(contenders: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of the slower rank, contender after contender in every round; the first two rounds warm up."""
    found: dict[str, list[float]] = {name: [] for name in contenders}
    for round_ in range(rounds + 2):
        for name, step in contenders.items():
            dist.barrier()
            start = time.perf_counter()
            step()
            took = torch.tensor(time.perf_counter() - start, dtype=torch.float64)
            dist.all_reduce(took, dist.ReduceOp.MAX)
            if round_ >= 2:
                found[name].append(float(took))
    return found


def fastest(contenders: dict[str, Callable[[], object]]) -> str:
    """The name of the contender that takes the least time, by trials that the slower half leaves."""
    left, found = dict(contenders), {name: list[float]() for name in contenders}
    while len(left) > 1:
        for name, seconds in timed(left, TRIALS).items():
            found[name] += seconds
        ordered = sorted(left, key=lambda name: statistics.median(found[name]))
        left = {name: left[name] for name in ordered[: max(1, len(ordered) // 2)]}
    return next(iter(left))


class _Table:
    """2BP's four rows on one rank, with and without the split."""

    def __init__(self, rank: int, setting: Setting, shared: str) -> None:
        self.setting = setting
        torch.manual_seed(0)
        self.link = new_link(shared)
        if setting.table == "Llama":
            model = Llama(setting.config)
            shape = (setting.micro_batches, setting.config.context)
            self.data = tuple(torch.randint(0, setting.config.vocabulary, shape) for _ in range(2))
            self.cut = cut_llama(model, (self.data[0][:1], self.data[1][:1]), 2, [rank])
        else:
            case = CASES[setting.table]
            self.data = case.data(case.rows * setting.micro_batches)
            example = (self.data[0][: case.rows], self.data[1][: case.rows])
            self.cut = cut_evenly(case.model(), example, 2, [rank])

    def run(self) -> Found:
        """Measure, then predict from the costs that the steps had; the same for more stages like these."""
        contenders: dict[str, Callable[[], object]] = {}
        schedules, stamps = {}, {}
        for name, count in TABLE:
            for form in (name, f"{name}-2bp"):
                label = f"{form} m={count}"
                schedules[label], stamps[label] = closed_form(form, 2, count), list[Stamp]()
                runner = run(schedules[label], self.cut, self.link, stamps[label])
                given = self.cut.given(*(one[: count * self.cut.rows] for one in self.data))
                contenders[label] = lambda runner=runner, given=given: runner.step(given)  # type: ignore[misc]
        link = link_costs(self.link, sum(value.bytes for value in self.cut.pipeline.stages[0].sends))
        seconds = timed(contenders, self.setting.rounds)
        costs = traced_costs(self.cut, [stamp for found in stamps.values() for stamp in found], link)
        both = {label: simulate(schedule, costs).seconds for label, schedule in schedules.items()}
        return Found(seconds, both, both, 0.0, "", 0.0, deeper(costs))


def deeper(costs: PipelineCosts) -> dict[str, tuple[float, float]]:
    """Gain of the split at four and eight stages like the mean of these, and what no schedule with the split can exceed."""
    both = costs.stages
    f, i, w = (
        sum(stage.forward for stage in both) / len(both),
        sum(stage.backward_input for stage in both) / len(both),
        sum(sum(stage.backward_weight) for stage in both) / len(both),
    )
    one = StageCosts(f, i, (w,))
    found = {}
    for p in (4, 8):
        for name, m in (("naive", 1), ("gpipe", p), ("1f1b", p), ("1f1b", 2 * p)):
            deep = PipelineCosts((one,) * p, costs.link)
            base, split = (simulate(closed_form(form, p, m), deep).seconds for form in (name, f"{name}-2bp"))
            least = {
                "naive": p * (f + i) + w,
                "gpipe": (m + p - 1) * (f + i) + m * w,
                "1f1b": (2 * p - 1) * (f + i) + w if m == p else m * (f + i + w) + (p - 1) * f,
            }[name]
            found[f"{p} stages, {name}, m = {m}"] = (base / split, (m + p - 1) * (f + i + w) / least)
        better = synthesise(Problem(deep, tuple(range(p)), m), Effort(1.0))  # 2BP's order is not the best one there
        found[f"{p} stages, hocket's schedule for 1f1b, m = {m}"] = (base / better.seconds, base / better.bound)
    return found
