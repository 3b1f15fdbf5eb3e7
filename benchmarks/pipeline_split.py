"""What splitting the backward costs and holds, in one process: seconds of p1 and p2 against the whole, bytes between them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from common import Row, Sample, at_most
from pipeline_hooks import rows as hook_rows
from pipeline_ours import Cut, cut_llama

from hocket.compiler.demo.llama import Llama, LlamaConfig
from hocket.compiler.plan.pipeline.forms import closed_form
from hocket.compiler.stages import PartKind
from hocket.runtime.schedule.loopback import LoopbackPipeline
from hocket.runtime.schedule.run import Stamp


def rows(*, quick: bool) -> list[Row]:
    """Rows for the demo's Llama on one thread."""
    torch.set_num_threads(1)
    config = LlamaConfig(vocabulary=1024, width=256, layers=2 if quick else 4, heads=4, kv_heads=4, hidden=688, context=256)
    torch.manual_seed(0)
    model = Llama(config)
    tokens, targets = (torch.randint(0, config.vocabulary, (4, config.context)) for _ in range(2))
    example = (tokens[:1], targets[:1])
    split, whole = cut_llama(model, example, 1, [0]), cut_llama(model, example, 1, [0], split=False)
    times = _alternate({"split": _step(split, tokens, targets), "whole": _step(whole, tokens, targets)}, 4 if quick else 12)
    ratios = Sample(tuple(a / b for a, b in zip(times["split"], times["whole"], strict=True)), "x")
    held = split.pipeline.stages[0]
    after = {kind: sum(v.bytes for v in held.held_after(kind)) for kind in (PartKind.FORWARD, PartKind.BACKWARD_INPUT)}
    share = after[PartKind.BACKWARD_INPUT] / after[PartKind.FORWARD]
    case = f"Llama, {config.layers} layers of width {config.width}, {config.context} tokens"
    return [
        at_most("splitting the backward", f"(p1 + p2) / whole backward, {case}", ratios, 1.02),
        at_most("splitting the backward", f"held from p1 to p2 / activations, {case}", Sample((share,), "x"), 0.75),
        *hook_rows(quick=quick),
    ]


def _step(cut: Cut, tokens: torch.Tensor, targets: torch.Tensor) -> Callable[[], float]:
    """Seconds of all backward instructions of one step."""
    pipeline = LoopbackPipeline(closed_form("naive-2bp", 1, 4), [cut.states[0]])
    given, rank = cut.given(tokens, targets), pipeline.ranks[0]

    def step() -> float:
        stamps: list[Stamp] = []
        rank.stamps = stamps
        pipeline.step(given)
        return sum(s.stop - s.start for s in stamps if s.instr.op.value in ("I", "W"))

    return step


def _alternate(steps: dict[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    for step in steps.values():
        step()
    found: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            found[name].append(min(step(), step()))
    return found
