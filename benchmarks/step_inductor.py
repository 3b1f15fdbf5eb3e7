"""Whether compiling the regions between collectives pays: a step of the ranks with Inductor beside the same step without."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import ExitStack

import torch
from common import Row, Sample, progress, take_turns, versus
from step_model import Case
from step_train import RANKS

import hocket
from hocket.compiler.doors.module import session_of

CLAIM = "inductor for regions between collectives"
PLAIN = "the same ranks without Inductor"


def rows(*, quick: bool) -> list[Row]:
    """Step time (forward and backward) with and without, and what compiling costs once."""
    case = Case(layers=2, batch=2) if quick else Case()
    with ExitStack() as stack:
        blocks = {}
        for name, inductor in ((PLAIN, False), ("inductor", True)):
            progress(f"inductor: compiling {name}")
            start = time.perf_counter()
            model = case.model()
            tactics = [hocket.TensorParallel("d")]
            parallel = stack.enter_context(
                hocket.parallelize(model, f"d={RANKS}", case.data(), tactics=tactics, verify="off", inductor=inductor)
            )
            once = time.perf_counter() - start
            blocks[name] = _block(parallel, case)
            fusion = session_of(parallel).latest.fusion
        assert fusion is not None, "the last engine compiles regions"
        samples = take_turns(blocks, 3 if quick else 7)
    text = f"{fusion.fused} of {fusion.instructions} instructions in {fusion.compiled} regions, {fusion.distinct} distinct"
    return [
        versus(CLAIM, f"step, {case}", samples["inductor"], PLAIN, samples[PLAIN]),
        Row(CLAIM, "compiling, all stages, once", once, text=f"{Sample((once,))}: {text}"),
    ]


def _block(parallel: torch.nn.Module, case: Case) -> Callable[[], list[float]]:
    tokens, targets = case.data()

    def block() -> list[float]:
        start = time.perf_counter()
        parallel.zero_grad()
        parallel(tokens, targets).backward()
        return [time.perf_counter() - start]

    block()
    return block
