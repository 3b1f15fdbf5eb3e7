"""Recurrent layers on a GPU beside cuDNN: chains as the solver decides, and sweeps captured in a CUDA graph.

A captured sweep is one launch: warm starts and one pass over all blocks. What is read back is one number, by how much the ends of
the blocks differ from the starts that were used. Times are wall times between synchronisations.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import torch
from chain_layers import whole_layer
from common import Row, Sample, at_most, progress, take_turns, versus
from torch import Tensor

from hocket.runtime.fixedpoint import decide
from hocket.runtime.fixedpoint.hoist import hoist
from hocket.runtime.fixedpoint.how import read_how
from hocket.runtime.fixedpoint.solvers import by_step, in_order, shifted
from hocket.runtime.fixedpoint.steps import Chain

DECIDED = "recurrent layers on a GPU, forward, beside cuDNN"
CAPTURED = "the same, sweeps captured in a CUDA graph"
EQUAL = "on a GPU, results differ from cuDNN's by, relative to the largest"
WINDOWS, CALLS = (16, 32, 64, 128, 256), 10
WARM = {"RNN": 64, "GRU": 96}
"""Steps that layers as torch initialises them remember, with room: the captured sweep tests that it was enough."""


def rows(*, quick: bool) -> list[Row]:
    """Nothing where there is no CUDA device."""
    if not torch.cuda.is_available():
        progress("the GPU section is left out: torch finds no CUDA device")
        return []
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    found: list[Row] = []
    for kind in ("RNN",) if quick else ("RNN", "GRU"):
        for steps in (1000,) if quick else (1000, 10000):
            for width in (64,) if quick else (64, 256, 512):
                found += _case(kind, steps, width)
    return found


def _case(kind: str, steps: int, width: int) -> list[Row]:
    name = f"nn.{kind}, T={steps}, B=1, H={width}"
    progress(f"{name}, on the GPU")
    with torch.no_grad():
        layer = whole_layer(kind, (steps, 1, width), "cuda")
        chain = layer.chain
        expected = layer.module(layer.x)[0]

        for _ in range(decide.SETTLING):
            ours = layer.solved()[-1]
        sweeps = {window: Sweep(chain, window, min(WARM[kind], window)) for window in WINDOWS if window < steps}
        best = min(sweeps, key=lambda window: min(_seconds(sweeps[window].replay, 3)))
        contenders: dict[str, Callable[[], Sequence[float]]] = {
            "ours": lambda: _seconds(layer.solved, CALLS),
            "captured": lambda: _seconds(sweeps[best].replay, CALLS),
            "cuDNN": lambda: _seconds(lambda: layer.module(layer.x), CALLS),
        }
        times = take_turns(contenders, 3)
        states = sweeps[best].states
    case = f"{name}; blocks of {best}, ends off by {sweeps[best].residual():.0e}"
    return [
        versus(DECIDED, f"{name}; {decide.knowledge(chain, read_how(layer.how)).reason}", times["ours"], "cuDNN", times["cuDNN"]),
        versus(CAPTURED, case, times["captured"], "cuDNN", times["cuDNN"]),
        at_most(EQUAL, f"{name}, as decided", Sample((_difference(ours, expected),), ""), 5e-5),
        at_most(EQUAL, case, Sample((_difference(states, expected),), ""), 5e-5),
    ]


class Sweep:
    """One pass over all blocks of a chain, from warm starts, as a CUDA graph. states: ``[count, *shape]`` of the first carry."""

    def __init__(self, chain: Chain, window: int, warm: int) -> None:
        self.chain, self.window, self.warm = chain, window, warm
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):  # plans, and memory, are made outside of the graph
                self._sweep()
        torch.cuda.current_stream().wait_stream(side)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.states, self.change = self._sweep()

    def _sweep(self) -> tuple[Tensor, Tensor]:
        inner = hoist(self.chain)
        number = -(-inner.count // self.window)
        lanes = inner.lanes(number)
        columns = [by_step(lanes, stream, self.window) for stream in inner.streams]
        slices = [[column[t] for column in columns] for t in range(self.window)]
        zeros = [torch.cat([first[None], first.new_zeros((number - 1, *first.shape))]) for first in inner.init]
        led = lanes.sweep(lanes.pack(zeros), slices[self.window - self.warm :], keep=False)
        starts = shifted(inner.init, lanes.unpack([s[-1] for s in led]))
        stored = lanes.sweep(lanes.pack(starts), slices)
        ends = shifted(inner.init, lanes.unpack([s[-1] for s in stored]))
        change = torch.stack([(a - b).abs().amax() for a, b in zip(ends, starts, strict=True)]).amax()
        return in_order(lanes, stored[0], inner.count), change

    def replay(self) -> None:
        """Solve once more."""
        self.graph.replay()

    def residual(self) -> float:
        """By how much the ends of the blocks differ from the starts that were used: the one number that is read back."""
        return float(self.change)


def _seconds(work: Callable[[], object], calls: int) -> list[float]:
    work()
    found = []
    for _ in range(calls):
        torch.cuda.synchronize()
        start = time.perf_counter()
        work()
        torch.cuda.synchronize()
        found.append(time.perf_counter() - start)
    return found


def _difference(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().amax() / expected.abs().amax())
