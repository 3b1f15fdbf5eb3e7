"""Tables for a terminal, and the same as plain text for ``explain()``."""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from ..doors.hall import Compiled
from ..program import Decision, RoleKind
from .rows import activation_groups, parameter_groups, pattern


def explain(compiled: Compiled, topic: str = "", *, width: int = 140) -> str:
    """Everything known about a compiled program as text. topic: only decisions whose node, reason or source contains it."""
    parts: list[RenderableType] = [captured(compiled)]
    if not topic:
        parts += [plan_table(compiled), passes_table(compiled), *(record.verdict for record in compiled.records)]
    parts.append(decisions_table(every_decision(compiled), topic))
    buffer = io.StringIO()
    Console(file=buffer, width=width, force_terminal=False, color_system=None).print(Group(*parts))
    return buffer.getvalue()


def captured(compiled: Compiled) -> Text:
    """One line: what was traced, from what, how long each stage took."""
    program = compiled.program
    parameters = [n for n, r in zip(program.placeholders, program.signature.inputs, strict=True) if r.kind is RoleKind.PARAM]
    count = sum(node.meta["val"].numel() for node in parameters)
    sizes = ", ".join(f"{name}={size}" for name, size in program.sizes.items())
    stages = ", ".join(f"{name} {seconds:.2f} s" for name, seconds in compiled.seconds.items())
    front = next((d.reason for d in program.decisions if d.by == "capture"), "")
    what = f"captured {len(program.nodes)} nodes, {len(parameters)} parameter tensors ({count:,} numbers), sizes {sizes or 'none'}"
    return Text(f"{what}; {front}\ntime: {stages}")


def plan_table(compiled: Compiled) -> RenderableType:
    """Parameters, inputs and activations by module with their placements, and why."""
    program, plan = compiled.program, compiled.plan
    table = Table(title=f"plan for mesh {plan.mesh} (R whole on every rank, S(d) cut along dimension d)", title_justify="left")
    for heading, justify in (
        ("tensor", "left"),
        ("copies", "right"),
        ("shape", "left"),
        (",".join(plan.mesh.names), "left"),
        ("why", "left"),
    ):
        table.add_column(heading, justify=justify, overflow="fold")  # type: ignore[arg-type]
    for title, groups in (
        ("parameters, buffers and inputs", parameter_groups(program, plan)),
        ("activations (what each submodule hands on)", activation_groups(program, plan)),
    ):
        table.add_section()
        table.add_row(Text(title, style="bold"))
        for group in groups:
            table.add_row(group.name, str(group.count), "x".join(map(str, group.shape)) or "scalar", group.layout, group.why)
    return Group(table, Text(cost_line(compiled)))


def cost_line(compiled: Compiled) -> str:
    """Predicted time, wire bytes and memory of a step, with the certificate."""
    cost, certificate = compiled.plan.cost, compiled.plan.certificate
    return (
        f"predicted per rank and step: {float(cost.seconds) * 1e3:.2f} ms, {float(cost.bytes_on_wire):,.0f} bytes on the wire, "
        f"{float(cost.peak_bytes) / 2**20:,.1f} MiB at the peak\n"
        f"gap to the lower bound {100 * certificate.gap:.1f} % ({certificate.method})"
    )


def passes_table(compiled: Compiled) -> Table:
    """Every pass with its counts, its verdict and its times."""
    table = Table(title="passes", title_justify="left")
    for heading in ("pass", "nodes", "applied", "kept", "proof", "rewriting", "proving"):
        table.add_column(heading, overflow="fold")
    for record in compiled.records:
        before, after = record.nodes
        table.add_row(
            record.name,
            f"{before} -> {after}",
            str(record.applied),
            str(record.decisions - record.applied),
            str(record.verdict.status),
            f"{record.seconds:.2f} s",
            f"{record.verdict.seconds:.2f} s",
        )
    return table


def decisions_table(decisions: Sequence[Decision], topic: str = "", *, most: int = 200) -> RenderableType:
    """Decisions, those of repeated blocks merged into one row; ``topic`` keeps the ones that mention it."""
    kept = [d for d in decisions if topic in d.node or topic in d.reason or topic in d.source]
    if topic and not kept:
        return Text(f"no decision mentions {topic!r}; explain() lists all {len(decisions)}")
    table = Table(title=f"decisions{f' about {topic}' if topic else ''}", title_justify="left")
    for heading in ("by", "done", "what and why", "times", "gain", "where"):
        table.add_column(heading, overflow="fold")
    rows = _merge(kept)
    for decision, count in rows[:most]:
        gain = "" if decision.gain is None else f"{decision.gain * 1e3:+.3f} ms"
        done = "yes" if decision.applied else "no"
        table.add_row(decision.by, done, decision.reason, str(count), gain, decision.source)
    if len(rows) > most:
        return Group(table, Text(f"... and {len(rows) - most} more; explain(topic) narrows them down"))
    return table


def _merge(decisions: Iterable[Decision]) -> list[tuple[Decision, int]]:
    merged: dict[tuple[str, bool, str, str], tuple[Decision, int]] = {}
    for decision in decisions:
        key = (decision.by, decision.applied, pattern(decision.reason.split(",")[0]), pattern(decision.source))
        first, count = merged.get(key, (decision, 0))
        merged[key] = (first, count + 1)
    return list(merged.values())


def every_decision(compiled: Compiled) -> list[Decision]:
    """Decisions of capture, plan and passes, each once."""
    own = compiled.program.decisions
    return [*own, *compiled.plan.decisions, *compiled.lowered.decisions[len(own) :]]
