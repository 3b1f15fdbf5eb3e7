"""Claim 4: a large vocabulary under tensor parallelism, its logits left cut, beside torch's ``loss_parallel``."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import ExitStack

import torch
from common import Row, Sample, progress, take_turns, versus
from step_model import RATE, Case
from step_peers import Peer

import hocket
from hocket.compiler.plan.tactics import RewriteTactic, Tactic, TensorParallel

CLAIM = "large vocabulary, tensor parallel, 2 ranks"
WITH, WITHOUT = "VocabularyParallel", "logits gathered"
PEER, WHOLE = "DTensor with loss_parallel", "DTensor, logits gathered"
PLANS: dict[str, tuple[Tactic | RewriteTactic, ...]] = {
    WITHOUT: (TensorParallel("d"),),
    WITH: (TensorParallel("d"), hocket.VocabularyParallel("d")),
}


def rows(*, quick: bool) -> list[Row]:
    """Whole steps with AdamW, in turns; then what travels and what is held, by the plan."""
    case = Case(256, 688, 2, 4, 64, 8192) if quick else Case(256, 688, 2, 8, 128, 16384)
    with ExitStack() as stack:
        blocks: dict[str, Callable[[], list[float]]] = {}
        progress(f"vocabulary: starting {PEER}, and without")
        for name, kind in ((PEER, "vocabulary"), (WHOLE, "tensor")):
            peer = stack.enter_context(Peer(kind, case, 2))
            expected = peer.losses(2)
            blocks[name] = lambda peer=peer: peer.block(1)  # type: ignore[misc]
        costs = {}
        for name, tactics in PLANS.items():
            progress(f"vocabulary: compiling, {name}")
            model = case.model()
            optimizer = torch.optim.AdamW(model.parameters(), lr=RATE)
            step = stack.enter_context(hocket.train_step(model, "d=2", optimizer, case.data(), tactics=tactics))
            found = [float(step(*case.data())) for _ in range(2)]
            if any(abs(mine - theirs) > 1e-4 * abs(theirs) for mine, theirs in zip(found, expected, strict=True)):
                raise AssertionError(f"{name}: losses {found}, where DTensor has {expected}")
            costs[name] = step.compiled.plan.cost
            data = case.data()
            blocks[name] = lambda step=step, data=data: _timed(step, data)  # type: ignore[misc]
        progress(f"vocabulary: {len(blocks)} contenders take turns")
        samples = take_turns(blocks, 3 if quick else 7)
    sent, held = (
        {name: Sample((float(getattr(cost, what)),), "bytes") for name, cost in costs.items()}
        for what in ("bytes_on_wire", "peak_bytes")
    )
    return [
        *(versus(CLAIM, f"{case}: {WITH} vs {name}", samples[WITH], name, samples[name]) for name in (PEER, WHOLE, WITHOUT)),
        versus(CLAIM, "bytes on the wire a step, by the plan", sent[WITH], WITHOUT, sent[WITHOUT]),
        versus(CLAIM, "bytes held at once, by the plan", held[WITH], WITHOUT, held[WITHOUT]),
    ]


def _timed(step: Callable[..., object], data: tuple[torch.Tensor, ...]) -> list[float]:
    start = time.perf_counter()
    float(step(*data))  # type: ignore[arg-type]
    return [time.perf_counter() - start]
