"""``hocket demo``: the whole way of a model, from an ordinary module to proven ranks, with every figure on screen."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.rule import Rule
from rich.table import Table

from ...runtime.mesh import Mesh
from ..doors.module import session_of
from ..doors.parallelize import parallelize
from ..report.text import captured, decisions_table, every_decision, passes_table, plan_table
from .llama import Llama, LlamaConfig
from .race import Batch, Race, race
from .text import batches, text_bytes

BATCH, LENGTH = 16, 64
RATE = 1e-3
"""At three times this rate, plain torch drifts from plain torch that sums the batch in halves by 1e-2 within 60 steps."""


def show(console: Console, *, mesh: str, steps: int, out: Path) -> dict[str, Any]:
    """Run the demonstration; returns its figures as JSON-ready data. Raises the errors of ``parallelize``."""
    shape = Mesh.parse(mesh)
    torch.manual_seed(0)
    config = LlamaConfig(width=128, hidden=344, layers=4, heads=8, kv_heads=4, context=LENGTH)
    model = Llama(config)
    plain = copy.deepcopy(model)
    console.print(Rule("1. an ordinary nn.Module", align="left"))
    console.print(
        f"{config}\n{len(text_bytes()):,} bytes of English text (Python's own language reference), batches of {BATCH} x {LENGTH}"
    )

    console.print(Rule(f"2. hocket.parallelize(model, {str(shape)!r}, example_args=...)", align="left"))
    data = batches(BATCH, LENGTH)
    first = next(data)
    with parallelize(model, shape, first) as parallel:
        session = session_of(parallel)
        compiled = session.compiled
        console.print(captured(compiled), plan_table(compiled), passes_table(compiled))
        for record in compiled.records:
            console.print(record.verdict)
        rest = [decision for decision in every_decision(compiled) if decision.by != "plan"]  # the plan's are in its table
        console.print(decisions_table(rest))

        console.print(Rule(f"3. {steps} steps of AdamW on {shape.size} real processes, beside plain torch", align="left"))
        before = _wire(session.engine)
        rounds: Iterator[Batch] = (((x, y), {}) for x, y in itertools.chain([first], data))
        result = race(plain, parallel, rounds, steps=steps, workers=shape.size, loss_of=lambda loss: loss, rate=RATE)
        measured = _wire(session.engine) - before
        figures = _figures(result, measured, float(compiled.plan.cost.bytes_on_wire) * steps, steps)
        _print_training(console, result, figures)

        console.print(Rule("4. what is left behind", align="left"))
        files = _artefacts(parallel, session, compiled, out, first)
        for name, what in files.items():
            console.print(f"  {name}  {what}")
        figures["artefacts"] = list(files)
        figures["ok"] = figures["wire_exact"] and figures["worst_loss_difference"] < 1e-3
    return figures


def _wire(engine: Any) -> float:
    return float(engine.wire()[0].total)


def _figures(result: Race, measured: float, predicted: float, steps: int) -> dict[str, Any]:
    return {
        "steps": steps,
        "loss_plain": result.plain.losses[-1],
        "loss_ranks": result.ranks.losses[-1],
        "worst_loss_difference": result.worst_loss_difference,
        "samples_per_second": {
            **{how: BATCH / result.plain.median(how) for how in result.plain.seconds},
            **{how: BATCH / result.ranks.median(how) for how in result.ranks.seconds},
        },
        "wire_bytes_measured": measured,
        "wire_bytes_formula": predicted,
        "wire_exact": measured == predicted,
    }


def _print_training(console: Console, result: Race, figures: dict[str, Any]) -> None:
    table = Table(title="loss, step by step", title_justify="left")
    for heading in ("step", "plain torch", "ranks", "difference"):
        table.add_column(heading, justify="right")
    last = len(result.plain.losses) - 1
    for step in sorted({0, *range(0, last, max(1, last // 6)), last}):
        a, b = result.plain.losses[step], result.ranks.losses[step]
        table.add_row(str(step), f"{a:.6f}", f"{b:.6f}", f"{abs(a - b):.1e}")
    console.print(table)
    speed = Table(title="samples per second (medians of alternating blocks)", title_justify="left")
    for heading in ("how", "samples/s", "ranks are faster by"):
        speed.add_column(heading, justify="right")
    for how, value in figures["samples_per_second"].items():
        speed.add_row(how, f"{value:.1f}", "" if how == result.how_ranks else f"{result.speedup(how):.2f}x")
    console.print(speed)
    verdict = "exactly as predicted" if figures["wire_exact"] else "NOT as predicted"
    measured, formula = figures["wire_bytes_measured"], figures["wire_bytes_formula"]
    console.print(f"bytes on the wire, per rank: {measured:,.0f} measured, {formula:,.0f} by the formula: {verdict}")


def _artefacts(parallel: Any, session: Any, compiled: Any, out: Path, example: tuple[Any, ...]) -> dict[str, str]:
    out.mkdir(parents=True, exist_ok=True)
    program, code, trace = out / "program.json", out / "program.py", out / "trace.json"
    program.write_text(compiled.instructions.to_json())
    code.write_text(compiled.lowered.graph.code)
    session.engine.start_trace()
    parallel(*example).backward()
    session.engine.trace(trace)
    return {
        str(program): f"the program each rank runs ({len(compiled.instructions.instructions)} instructions)",
        str(code): "the same as readable code",
        str(trace): "one step on the time axis; open it at ui.perfetto.dev or chrome://tracing",
    }
