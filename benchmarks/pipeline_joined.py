"""One product for the weight gradients of several micro-batches: what it saves in time, and what it keeps in memory.

Two ranks train the same Llama-like model with the same schedule, in turns, with a product for every micro-batch and with one for
four of them, for short and for long micro-batches. Bytes are those that the simulator counts for activations.
"""

from __future__ import annotations

import contextlib
import copy

import torch
from common import Row, Sample, versus
from pipeline_optimizer import in_turns

import hocket
from hocket.compiler.demo.llama import Llama, LlamaConfig
from hocket.compiler.demo.text import batches
from hocket.compiler.doors.module import session_of
from hocket.compiler.doors.pipeline.session import PipelineSession
from hocket.runtime.schedule.verify import peak_memory

CLAIM = "weight gradients of four micro-batches by one product"
COUNT, GROUP = 8, 4


def rows(*, quick: bool) -> list[Row]:
    """Time and bytes."""
    found = []
    for tokens in (16,) if quick else (16, 64, 256):
        config = LlamaConfig(vocabulary=256, width=256, layers=4, heads=4, kv_heads=4, hidden=688, context=tokens)
        found += _rows(config, 5 if quick else 15)
    return found


def _rows(config: LlamaConfig, repeats: int) -> list[Row]:
    torch.manual_seed(0)
    model = Llama(config)
    data = next(batches(COUNT, config.context))
    with contextlib.ExitStack() as stack:
        steps, held = [], []
        for joined in (GROUP, 1):
            tactic = hocket.PipelineParallel(microbatches=COUNT, schedule="zb-h1", joined=joined)
            stages = stack.enter_context(hocket.parallelize(copy.deepcopy(model), "pp=2", tactics=[tactic], verify="types"))
            stages.train_step(*data)
            session = session_of(stages)
            assert isinstance(session, PipelineSession)
            held.append(max(peak_memory(session.compiled.costs.applied(session.compiled.schedule))))
            steps.append(lambda stages=stages: stages.train_step(*data))
        ours, theirs = (Sample(tuple(seconds)) for seconds in in_turns(steps, repeats))
    case = f"two real ranks, m = {COUNT}, {config.context} tokens per micro-batch"
    text = f"{held[0] / 2**20:.1f} MiB vs {held[1] / 2**20:.1f} MiB held for gradients on the fullest rank"
    more = Row(
        CLAIM, f"{case}: activations held", held[0], "B", {"a product each": held[1]}, held[1] / held[0], simulated=True, text=text
    )
    return [versus(CLAIM, f"{case}: a step", ours, "a product each", theirs), more]
