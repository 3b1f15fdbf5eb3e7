"""Watches every op of a trace: notes on its nodes, random ops made counter-based, batch-norm statistics made visible.

A backward op has no frame of the user's on the stack. Autograd gives every node of its own graph a sequence number; the op that
created number n in the forward pass is remembered, and whatever runs while autograd executes node n carries the same note.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.fx as fx
from torch.utils._python_dispatch import TorchDispatchMode

from ..program import NOTE, Note, Phase
from .counter_random import CounterRandom, is_random
from .sources import SourceFinder

_aten = torch.ops.aten


def _last_sequence_number() -> int:
    return int(torch.autograd._get_sequence_nr()) - 1  # type: ignore[attr-defined]


def in_backward() -> bool:
    """True while autograd's engine runs."""
    return bool(torch._C._current_graph_task_id() != -1)


class Recorder(TorchDispatchMode):
    """Sits above make_fx's own mode: sees each ATen op before it becomes a node of ``graph``."""

    supports_higher_order_operators = True

    def __init__(self, graph: fx.Graph, finder: SourceFinder, random: CounterRandom) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.graph = graph
        self.finder = finder
        self.random = random
        self._by_sequence: dict[int, tuple[str, str]] = {}
        self._around = torch._C._current_graph_task_id()  # a block may be traced while the backward of its model runs

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        last = next(iter(reversed(self.graph.nodes)), None)
        found = self._note(sys._getframe(1))
        result = self._run(func, args, kwargs or {}, found.source)
        for node in reversed(self.graph.nodes):
            if node is last:
                break
            node.meta.setdefault(NOTE, found)
        return result

    def _run(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], source: str) -> Any:
        if func is _aten.native_batch_norm.default and args[5] and args[3] is not None:
            return _batch_norm(*args)
        if is_random(func):
            return self.random.run(func, args, kwargs, source)
        return func(*args, **kwargs)

    def _note(self, frame: Any) -> Note:
        backward = torch._C._current_graph_task_id() not in (-1, self._around)
        source, module = self.finder.locate(frame, outer=0 if backward else self.finder.outer)
        if not backward:
            # The node of autograd's graph is created just before its op is dispatched, so its number is the last one given.
            self._by_sequence.setdefault(_last_sequence_number(), (source, module))
            return Note(source=source, module=module)
        current = torch._C._current_autograd_node()
        inherited = self._by_sequence.get(current._sequence_nr()) if current is not None else None
        if source:  # recomputation, or a backward formula of the user's own: it has its own line, and creates numbers of its own
            self._by_sequence.setdefault(_last_sequence_number(), (source, module))
            return Note(source=source, module=module or (inherited[1] if inherited else ""), phase=Phase.BACKWARD_INPUT)
        source, module = inherited or ("", "")
        return Note(source=source, module=module, phase=Phase.BACKWARD_INPUT)


def _batch_norm(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    mean: torch.Tensor,
    var: torch.Tensor,
    training: bool,  # noqa: FBT001 - the op's own signature
    momentum: float,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """``native_batch_norm`` changes the statistics without its schema saying so; this spells the change out."""
    y, saved_mean, saved_rstd, new_mean, new_var = _aten._native_batch_norm_legit_functional.default(
        x, weight, bias, mean, var, training, momentum, eps
    )
    mean.copy_(new_mean)
    var.copy_(new_var)
    return y, saved_mean, saved_rstd
