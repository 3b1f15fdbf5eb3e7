"""Pictures of a simulated (or stamped) schedule: a Gantt chart as SVG, and a trace for Perfetto or chrome://tracing.

One row per rank: forwards blue, input gradients green, weight gradients orange, whole backwards teal, messages grey; what is empty
is bubble. Below each row its memory. The title says that the figures are simulated.
"""

from __future__ import annotations

import json
from html import escape
from typing import Any

from ....runtime.schedule.instruction import Op
from .simulate import Simulation, Span

COLOURS = {
    Op.F: "#4c78a8",
    Op.I: "#54a24b",
    Op.B: "#439894",
    Op.W: "#f58518",
    Op.R: "#9ecae9",
    Op.SEND: "#bab0ac",
    Op.RECV: "#bab0ac",
    Op.OPT: "#b279a2",
    Op.REDUCE: "#b279a2",
}
_LEFT, _ROW, _BAR, _MEMORY = 64, 52, 28, 16


def gantt(simulation: Simulation, width: int = 1200) -> str:
    """The SVG text of a Gantt chart."""
    schedule, seconds = simulation.schedule, simulation.seconds or 1.0
    scale = (width - _LEFT - 8) / seconds
    height = 40 + _ROW * len(simulation.spans) + 24
    title = (
        f"{schedule.name or 'schedule'}: {schedule.stages} stages on {len(simulation.spans)} ranks, {schedule.micro_batches} "
        f"micro-batches; simulated {seconds:.4g} s, bubble {simulation.bubble:.1%}, peak {max(simulation.peaks):,.4g} bytes"
    )
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif" font-size="11">',
        f"<title>{escape(title)}</title>",
        f'<rect width="{width}" height="{height}" fill="white"/>',
        f'<text x="8" y="18" font-size="13">{escape(title)}</text>',
    ]
    most = max(max(simulation.peaks), 1e-30)
    for rank, spans in enumerate(simulation.spans):
        top = 32 + rank * _ROW
        parts.append(f'<text x="8" y="{top + 18}">rank {rank}</text>')
        parts.append(f'<rect x="{_LEFT}" y="{top}" width="{seconds * scale:.2f}" height="{_BAR}" fill="#f4f4f4"/>')
        parts += [_bar(span, top, scale) for span in spans if span.stop > span.start]
        parts.append(_memory(simulation, rank, top + _BAR + _MEMORY, scale, most))
    parts += _axis(seconds, scale, height)
    return "\n".join([*parts, "</svg>"]) + "\n"


def _bar(span: Span, top: float, scale: float) -> str:
    instr = span.instr
    x, wide = _LEFT + span.start * scale, (span.stop - span.start) * scale
    label = f"{instr} [{span.start:.6g} s, {span.stop - span.start:.6g} s]"
    colour = COLOURS.get(instr.op, "#dddddd")
    shade = 1.0 if instr.stage < 1 or instr.op not in COLOURS else max(0.55, 1.0 - 0.06 * (instr.micro_batch % 8))
    place = f'x="{x:.2f}" y="{top}" width="{wide:.2f}" height="{_BAR}"'
    box = f'<rect {place} fill="{colour}" fill-opacity="{shade:.2f}" stroke="white" stroke-width="0.4">'
    text = f'<text x="{x + wide / 2:.2f}" y="{top + 18}" text-anchor="middle" fill="white">{instr.micro_batch}</text>'
    return f"{box}<title>{escape(label)}</title></rect>" + (text if wide > 14 else "")


def _memory(simulation: Simulation, rank: int, bottom: float, scale: float, most: float) -> str:
    points = [f"{_LEFT},{bottom}"]
    before = 0.0
    for when, size in simulation.memory(rank):
        x = _LEFT + when * scale
        points += [f"{x:.2f},{bottom - before / most * _MEMORY:.2f}", f"{x:.2f},{bottom - size / most * _MEMORY:.2f}"]
        before = size
    points.append(f"{_LEFT + simulation.seconds * scale:.2f},{bottom}")
    return f'<polygon points="{" ".join(points)}" fill="#e45756" fill-opacity="0.35"/>'


def _axis(seconds: float, scale: float, height: float) -> list[str]:
    step = 10.0 ** len(str(int(seconds))) / 10 if seconds >= 1 else seconds / 8
    while seconds / step > 12:
        step *= 2
    marks = []
    for tick in range(int(seconds / step) + 1):
        x = _LEFT + tick * step * scale
        marks.append(f'<text x="{x:.1f}" y="{height - 8}" text-anchor="middle" fill="#666">{tick * step:.4g}</text>')
    return marks


def trace_events(simulation: Simulation) -> str:
    """JSON in the trace event format that Perfetto and chrome://tracing read: a track per rank, and its memory as a counter."""
    events: list[dict[str, Any]] = []
    for rank, spans in enumerate(simulation.spans):
        events.append({"ph": "M", "name": "thread_name", "pid": 0, "tid": rank, "args": {"name": f"rank {rank} (simulated)"}})
        for span in spans:
            if span.stop > span.start:
                arguments = {"stage": span.instr.stage, "micro_batch": span.instr.micro_batch, "piece": span.instr.piece}
                events.append(
                    {
                        "ph": "X",
                        "name": str(span.instr),
                        "cat": span.instr.op.value,
                        "pid": 0,
                        "tid": rank,
                        "ts": span.start * 1e6,
                        "dur": (span.stop - span.start) * 1e6,
                        "args": arguments,
                    }
                )
        name = f"memory of rank {rank}"
        events += [{"ph": "C", "name": name, "pid": 0, "ts": t * 1e6, "args": {"bytes": b}} for t, b in simulation.memory(rank)]
    return json.dumps({"traceEvents": events, "displayTimeUnit": "ms"})
