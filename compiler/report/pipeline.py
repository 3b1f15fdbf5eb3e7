"""What was decided for a pipeline, as text: stages, messages, schedule, proofs, decisions."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from ..stages import ONCE, PartKind, StageProgram

if TYPE_CHECKING:
    from ..doors.pipeline.compile import CompiledPipeline


def explain_pipeline(compiled: CompiledPipeline, topic: str = "", *, width: int = 140) -> str:
    """Everything known about a compiled pipeline. topic: only decisions whose node, reason or source contains it."""
    parts: list[RenderableType] = [] if topic else [_summary(compiled), _stages(compiled), *(str(r) for r in compiled.records)]
    parts.append(_decisions(compiled, topic))
    buffer = io.StringIO()
    Console(file=buffer, width=width, force_terminal=False, color_system=None).print(Group(*parts))
    return buffer.getvalue()


def _summary(compiled: CompiledPipeline) -> Text:
    schedule = compiled.schedule
    seconds = ", ".join(f"{name} {value:.2f} s" for name, value in compiled.seconds.items())
    inner = compiled.order.inner
    ranks = f"{len(schedule.ranks)} ranks" if inner is None else f"{len(schedule.ranks)} groups of {inner.size} ranks ({inner})"
    rows = f"{len(compiled.rows)} micro-batches of {', '.join(map(str, dict.fromkeys(compiled.rows)))} rows"
    if len(set(compiled.rows)) > 1:
        rows = f"micro-batches of {', '.join(map(str, compiled.rows))} rows"
    return Text(f"{schedule.stages} stages on {ranks}, {rows}; schedule: {compiled.how}\ntime: {seconds}")


def _stages(compiled: CompiledPipeline) -> Table:
    table = Table(title="stages (predicted milliseconds and bytes for one micro-batch)", title_justify="left")
    for heading in ("stage", "F", "I", "W", "held to I", "held to W", "sends on", "sends back", "parameters"):
        table.add_column(heading, justify="left" if heading == "parameters" else "right", overflow="fold")
    for stage, cost in zip(compiled.pipeline.stages, compiled.costs.stages, strict=True):
        table.add_row(
            str(stage.stage),
            f"{cost.forward * 1e3:.2f}",
            f"{cost.backward_input * 1e3:.2f}",
            f"{sum(cost.backward_weight) * 1e3:.2f}",
            f"{cost.activation:,.0f}",
            f"{sum(cost.held):,.0f}",
            f"{sum(value.bytes for value in stage.sends):,}",
            f"{sum(value.bytes for value in stage.sends_back):,}",
            _parameters(stage),
        )
    return table


def _parameters(stage: StageProgram) -> str:
    names = stage.parameters
    pieces = len(stage.of(PartKind.BACKWARD_WEIGHT))
    ends = f"{names[0]} .. {names[-1]}" if len(names) > 2 else ", ".join(names) or "none"
    once = "".join(f"; {kind.value} once a step" for kind in PartKind if kind in ONCE and stage.of(kind))
    return f"{ends} ({len(names)}; {pieces} W{once})"


def _decisions(compiled: CompiledPipeline, topic: str) -> Table:
    table = Table(title="decisions", title_justify="left")
    for heading in ("by", "applied", "why", "source"):
        table.add_column(heading, overflow="fold")
    for decision in compiled.joined.decisions:
        if not topic or any(topic in text for text in (decision.by, decision.node, decision.reason, decision.source)):
            table.add_row(decision.by, "yes" if decision.applied else "no", Text(decision.reason), Text(decision.source))
    return table
