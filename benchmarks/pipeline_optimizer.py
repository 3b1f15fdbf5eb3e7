"""The optimizer on the stages of a pipeline, and replicas of stages: what they cost and save at the door.

A step with the optimizer on the stages against the same stages with torch's AdamW stepped by the caller, in turns on two ranks; and
how many collectives the gradients of two replicas take in a step, counted in the programs that the ranks would run.
"""

from __future__ import annotations

import contextlib
import copy
import gc
import time
from collections.abc import Callable

import torch
from common import Row, Sample, versus

import hocket
from hocket.compiler.demo.llama import Llama, LlamaConfig
from hocket.compiler.demo.text import batches
from hocket.compiler.doors.module import session_of
from hocket.compiler.doors.pipeline.session import PipelineSession
from hocket.compiler.stages import ONCE, Pipeline

CLAIM = "the optimizer on the stages"


def rows(config: LlamaConfig, *, quick: bool) -> list[Row]:
    """All rows."""
    return [_step_row(config, 5 if quick else 15), *_sum_rows(), *_bucket_rows(5 if quick else 25)]


def _step_row(config: LlamaConfig, repeats: int) -> Row:
    torch.manual_seed(0)
    model = Llama(config)
    twin = copy.deepcopy(model)
    tokens, targets = next(batches(4, config.context))
    pipeline = hocket.PipelineParallel(microbatches=4)
    outside = torch.optim.AdamW(twin.parameters(), 1e-4)
    inside = torch.optim.AdamW(model.parameters(), 1e-4)
    with (
        hocket.train_step(model, "pp=2", inside, tactics=[pipeline], verify="types") as step,
        hocket.parallelize(twin, "pp=2", tactics=[pipeline], verify="types") as stages,
    ):

        def plain() -> None:
            outside.zero_grad()
            stages.train_step(tokens, targets)
            outside.step()

        found = in_turns([lambda: step(tokens, targets), plain], repeats)
    ours, theirs = (Sample(tuple(seconds)) for seconds in found)
    name = "torch's AdamW beside the same stages"
    return versus(CLAIM, "two real ranks, m = 4, a whole step", ours, name, theirs, 1.0)


def in_turns(steps: list[Callable[[], object]], repeats: int) -> list[list[float]]:
    """Seconds of each, one after the other in every round; the first two rounds warm up."""
    found: list[list[float]] = [[] for _ in steps]
    gc.collect()
    for number in range(repeats + 2):
        for one, seconds in zip(steps, found, strict=True):
            start = time.perf_counter()
            one()
            if number > 1:
                seconds.append(time.perf_counter() - start)
    return found


def _sum_rows() -> list[Row]:
    """Collectives of a step with two replicas of two stages; a deterministic count."""
    config = LlamaConfig(vocabulary=256, width=32, layers=4, heads=2, kv_heads=2, hidden=64, context=32)
    torch.manual_seed(0)
    model = Llama(config)
    count = 8
    pipeline = hocket.PipelineParallel(microbatches=count, schedule="1f1b")
    optimizer = torch.optim.AdamW(model.parameters())
    with hocket.train_step(model, "pp=2,dp=2", optimizer, engine="sim", tactics=[pipeline], verify="types") as step:
        step(*next(batches(2 * count, config.context)))
        cut = step.compiled.pipeline
    parameters = sum(1 for _ in model.parameters())
    made, naive = _collectives(cut), count * parameters
    stages = len(cut.stages)
    goal = f"<= {stages}, one for each stage"
    text = f"{made} collectives for {parameters} gradients and {count} micro-batches; for every micro-batch they would be {naive}"
    case = f"pp=2,dp=2, m = {count}: sums of gradients in a step"
    return [
        Row(
            "replicas of stages",
            case,
            float(made),
            "",
            {"every micro-batch": float(naive)},
            None,
            goal,
            made <= stages,
            text=text,
        )
    ]


def _bucket_rows(repeats: int) -> list[Row]:
    """Two replicas of one stage, with one sum for all small gradients and with one for each: the same bytes, fewer collectives."""
    config = LlamaConfig(vocabulary=256, width=64, layers=8, heads=4, kv_heads=4, hidden=172, context=16)
    torch.manual_seed(0)
    model, data = Llama(config), next(batches(4, config.context))
    with contextlib.ExitStack() as stack:
        steps, sent = [], []
        for buckets in (True, False):
            tactic = hocket.PipelineParallel(microbatches=2, schedule="1f1b", buckets=buckets)
            twin = copy.deepcopy(model)
            stages = stack.enter_context(hocket.parallelize(twin, "pp=1,dp=2", tactics=[tactic], verify="types"))
            stages.train_step(*data)
            session = session_of(stages)
            assert isinstance(session, PipelineSession)
            sent.append(_reduced(session.compiled.pipeline))
            steps.append(lambda stages=stages: stages.train_step(*data))
        ours, theirs = (Sample(tuple(seconds)) for seconds in in_turns(steps, repeats))
    (count, size), (counts, sizes) = sent
    case = "two real replicas of one stage, 8 layers of width 64"
    text = f"{count} collectives of {size:,} bytes in all, {counts} of {sizes:,}"
    same = Row("replicas of stages", f"{case}: sums of gradients", float(size), "B", {"one each": float(sizes)}, None, text=text)
    return [versus("replicas of stages", f"{case}: a step", ours, "a sum for each gradient", theirs), same]


def _reduced(cut: Pipeline) -> tuple[int, int]:
    """How many sums of gradients there are in a step, and their bytes."""
    nodes = [node for stage in cut.stages for part in stage.parts if part.kind in ONCE for node in part.program.nodes]
    sums = [node.meta["val"] for node in nodes if node.target is torch.ops._c10d_functional.all_reduce.default]
    return len(sums), sum(value.numel() * value.element_size() for value in sums)


def _collectives(cut: Pipeline) -> int:
    programs = [part.program for stage in cut.stages for part in stage.parts if part.kind in ONCE]
    return sum("all_reduce" in str(node.target) for program in programs for node in program.nodes if node.op == "call_function")
