"""Claim 2, on real ranks: starting them, dispatching a step to them, loading a program."""

from __future__ import annotations

import time

import torch
from common import Row, Sample, at_most, cpu_seconds, progress, versus
from step_echo import echo
from step_model import Case
from torch import Tensor, nn

from hocket.compiler.capture import capture
from hocket.compiler.doors.hall import Options, compile_program
from hocket.runtime.engines.local import LocalEngine
from hocket.runtime.load import load
from hocket.runtime.mesh import Mesh
from hocket.runtime.program import RankProgram

CLAIM = "starting, dispatching, loading"
TWO = Mesh.parse("d=2")


def rows(*, quick: bool) -> list[Row]:
    """Measure everything."""
    progress("runtime: warm starts")
    start = starts(6 if quick else 15)
    progress("runtime: dispatch")
    step, window = dispatch(300 if quick else 3000)
    floor = echo(300 if quick else 3000)
    progress("runtime: program load")
    instructions, loading = loads(3 if quick else 9)
    return [
        at_most(CLAIM, "warm start of 2 ranks, groups up", start, 0.15),
        at_most(CLAIM, "dispatch of a trivial step and its answer, 2 ranks, median", step, 50e-6),
        at_most(CLAIM, "the same, 10th percentile", step, 50e-6, percent=10),
        versus(CLAIM, "the same, and two bare processes that answer packets on sockets (a floor)", step, "bare sockets", floor),
        at_most(CLAIM, "a trivial step among 16 under way, median", window, 50e-6),
        at_most(CLAIM, f"program load per instruction ({instructions} instructions, CPU time of one rank)", loading, 5e-6),
    ]


def starts(repeats: int) -> Sample:
    """Seconds until two ranks are up, after a first pair has paid for the import of torch."""
    LocalEngine(TWO, threads=1).close()
    values = []
    for _ in range(repeats):
        begin = time.perf_counter()
        engine = LocalEngine(TWO, threads=1)
        values.append(time.perf_counter() - begin)
        engine.close()
    return Sample(tuple(values))


class AddOne(nn.Module):
    """A step with nothing to do."""

    def forward(self, x: Tensor) -> Tensor:
        return x + 1


def dispatch(repeats: int) -> tuple[Sample, Sample]:
    """Seconds of a step that adds one to four numbers: one after another, and with 16 of them under way."""
    x = torch.zeros(4)
    compiled = compile_program(capture(AddOne(), (x,), {}, train=False), Options(TWO))
    values, together = [], []
    with LocalEngine(TWO, threads=1) as engine:
        handle = engine.load(compiled.instructions, {})
        for _ in range(repeats + 50):
            begin = time.perf_counter()
            ticket, (result,) = engine.forward(handle, [x])
            values.append(time.perf_counter() - begin)
            engine.release(ticket)
            assert result is not None
            assert result[0] == 1
        for _ in range(repeats // 16 + 3):
            begin = time.perf_counter()
            steps = [engine.submit_forward(handle, [x]) for _ in range(16)]
            for step in steps:
                step.result()
            together.append((time.perf_counter() - begin) / 16)
    return Sample(tuple(values[50:])), Sample(tuple(together[3:]))


def loads(repeats: int) -> tuple[int, Sample]:
    """CPU seconds per instruction from JSON text to an executable program, and how many instructions there were."""
    case = Case(width=64, hidden=128, layers=8, batch=2, length=16)
    program = capture(case.model(), case.data(), {}, train=True)
    text = compile_program(program, Options(TWO, level="off")).instructions.to_json()
    count = len(RankProgram.from_json(text).instructions)
    sample = cpu_seconds(lambda: load(RankProgram.from_json(text), 0), repeats)
    return count, Sample(tuple(value / count for value in sample.values))
