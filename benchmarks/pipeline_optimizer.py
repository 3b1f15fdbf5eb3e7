"""The optimizer on the stages of a pipeline, and replicas of stages: what they cost and save at the door.

A step with the optimizer on the stages against the same stages with torch's AdamW stepped by the caller, in turns on two ranks; and
how many collectives the gradients of two replicas take in a step, counted in the programs that the ranks would run.
"""

from __future__ import annotations

import copy
import gc
import time
from collections.abc import Callable

import torch
from common import Row, Sample, versus

import hocket
from hocket.compiler.demo.llama import Llama, LlamaConfig
from hocket.compiler.demo.text import batches
from hocket.compiler.stages import ONCE, Pipeline

CLAIM = "the optimizer on the stages"


def rows(config: LlamaConfig, *, quick: bool) -> list[Row]:
    """All rows."""
    return [_step_row(config, 5 if quick else 15), *_sum_rows()]


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
    goal = f"<= {parameters}, one for each parameter"
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
            made <= parameters,
            text=text,
        )
    ]


def _collectives(cut: Pipeline) -> int:
    programs = [part.program for stage in cut.stages for part in stage.parts if part.kind in ONCE]
    return sum("all_reduce" in str(node.target) for program in programs for node in program.nodes if node.op == "call_function")
