"""The pipelines of ``torch.distributed.pipelining`` on the same model, for two ranks of one thread each."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.pipelining import (
    PipelineStage,
    Schedule1F1B,
    ScheduleDualPipeV,
    ScheduleGPipe,
    ScheduleInterleaved1F1B,
    ScheduleInterleavedZeroBubble,
    ScheduleLoopedBFS,
    ScheduleZBVZeroBubble,
)

from hocket.compiler.demo.llama import Llama

RANKS = 2

SCHEDULES = {
    "GPipe": (ScheduleGPipe, "straight"),
    "1F1B": (Schedule1F1B, "straight"),
    "ZB1P": (ScheduleInterleavedZeroBubble, "straight"),
    "LoopedBFS": (ScheduleLoopedBFS, "loop"),
    "Interleaved1F1B": (ScheduleInterleaved1F1B, "loop"),
    "InterleavedZeroBubble": (ScheduleInterleavedZeroBubble, "loop"),
    "ZBV": (ScheduleZBVZeroBubble, "v"),
    "DualPipeV": (ScheduleDualPipeV, "v"),
}
"""Every schedule that torch 2.13 has."""


class LlamaStage(nn.Module):
    """Some layers of the demo's model, with the embedding before the first and the head behind the last."""

    def __init__(self, model: Llama, layers: range) -> None:
        super().__init__()
        self.embedding = model.embedding if layers.start == 0 else None
        self.layers = nn.ModuleList(model.layers[i] for i in layers)
        last = layers.stop == len(model.layers)
        self.norm, self.head = (model.norm, model.head) if last else (None, None)
        self.register_buffer("cos", model.cos, persistent=False)
        self.register_buffer("sin", model.sin, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.embedding is not None:
            x = self.embedding(x)
        for layer in self.layers:
            x = layer(x, self.cos, self.sin)
        return x if self.head is None or self.norm is None else self.head(self.norm(x))


@dataclass
class Peer:
    """One schedule of torch on this rank: ``step`` runs it once."""

    name: str
    stages: list[LlamaStage]
    step: Callable[[], None]


def layer_ranges(layers: int, stages: int) -> list[range]:
    """Layers of each stage, as even as can be."""
    bounds = [layers * stage // stages for stage in range(stages + 1)]
    return [range(a, b) for a, b in itertools.pairwise(bounds)]


def loss_of(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy."""
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


COMPILED = ("1F1B", "Interleaved1F1B")
"""Schedules that also run on stages compiled by torch; those that split the backward refuse them."""


def peers(rank: int, model: Llama, tokens: Tensor, targets: Tensor, *, compiled: bool = False) -> list[Peer]:
    """All schedules that exist for this number of micro-batches (one row of ``tokens`` each). compiled: those of COMPILED too."""
    found = _peers(rank, model, (tokens, targets), tuple(SCHEDULES), compiled=False)
    return found + (_peers(rank, model, (tokens, targets), COMPILED, compiled=True) if compiled else [])


def _peers(rank: int, model: Llama, data: tuple[Tensor, Tensor], names: tuple[str, ...], *, compiled: bool) -> list[Peer]:
    logging.getLogger("torch.distributed.pipelining").setLevel(logging.ERROR)
    count, found = data[0].shape[0], []
    for name in names:
        schedule, placement = SCHEDULES[name]
        number = RANKS if placement == "straight" else 2 * RANKS
        mine = {"straight": [rank], "loop": [rank, rank + RANKS], "v": [rank, number - 1 - rank]}[placement]
        ranges = layer_ranges(len(model.layers), number)
        modules = [LlamaStage(model, ranges[stage]) for stage in mine]
        callables: list[nn.Module] = [torch.compile(module) if compiled else module for module in modules]  # type: ignore[misc]
        stages = [PipelineStage(one, stage, number, torch.device("cpu")) for one, stage in zip(callables, mine, strict=True)]
        single = schedule in (ScheduleGPipe, Schedule1F1B)
        try:
            runner = schedule(stages[0] if single else stages, count, loss_fn=loss_of, scale_grads=False)  # type: ignore[arg-type]
        except ValueError:
            continue  # DualPipeV needs as many micro-batches as stages
        step = _step_of(runner, modules, 0 in mine, number - 1 in mine, data)
        found.append(Peer(f"{name}, compiled" if compiled else name, modules, step))
    return found


def _step_of(runner: object, modules: list[LlamaStage], first: bool, last: bool, data: tuple[Tensor, Tensor]) -> Callable[[], None]:
    def step() -> None:
        for module in modules:
            module.zero_grad(set_to_none=True)
        arguments = (data[0],) if first else ()
        known = {"target": data[1], "losses": []} if last else {}
        runner.step(*arguments, **known, return_outputs=False)  # type: ignore[attr-defined]

    return step
