"""What every benchmark shares: rows, repeated measurements in alternating blocks, and the three outputs (table, JSON, page).

A row compares one case of ours with peers that were measured in the same run. Contenders take turns, block by block, so that all of
them meet the same state of the machine; figures are medians, and the spread beside them is that of the repeats.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

DOCS = Path(__file__).resolve().parent.parent / "docs" / "benchmarks"
_SCALES = {"s": ((1e-3, 1e6, "us"), (1.0, 1e3, "ms"), (float("inf"), 1.0, "s"))}


@dataclass(frozen=True)
class Sample:
    """Repeated measurements of one quantity, in one unit."""

    values: tuple[float, ...]
    unit: str = "s"

    @property
    def median(self) -> float:
        """The figure that counts."""
        return statistics.median(self.values)

    def percentile(self, percent: float) -> float:
        """Nearest-rank percentile."""
        ordered = sorted(self.values)
        return ordered[min(len(ordered) - 1, int(len(ordered) * percent / 100))]

    @property
    def spread(self) -> float:
        """Half the distance between the quartiles, relative to the median."""
        return (self.percentile(75) - self.percentile(25)) / 2 / self.median if self.median else 0.0

    def __str__(self) -> str:
        return f"{show(self.median, self.unit)} ±{self.spread * 100:.0f}%"


@dataclass(frozen=True)
class Row:
    """One line of the result.

    claim: the group it belongs to; ours: the figure, in ``unit``; peers: name -> figure in the same unit; ratio: how many times
    better than the peer that the goal speaks of, None without one; goal: "" where there is none; met: None without a goal;
    simulated: whether the figure comes from a model of a machine; text: the figures as a person reads them.
    """

    claim: str
    case: str
    ours: float
    unit: str = "s"
    peers: Mapping[str, float] = field(default_factory=dict)
    ratio: float | None = None
    goal: str = ""
    met: bool | None = None
    simulated: bool = False
    spread: float = 0.0
    text: str = ""

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        names = ("claim", "case", "ours", "unit", "ratio", "goal", "met", "simulated", "spread")
        return {**{name: getattr(self, name) for name in names}, "peers": dict(self.peers)}


def versus(claim: str, case: str, ours: Sample, peer: str, theirs: Sample, at_least: float | None = None) -> Row:
    """Times against a peer's: the ratio says how many times faster we are."""
    ratio = theirs.median / ours.median
    goal, met = ("", None) if at_least is None else (f">= {at_least:g}x", ratio >= at_least)
    text = f"{ours} vs {theirs}"
    return Row(claim, case, ours.median, ours.unit, {peer: theirs.median}, ratio, goal, met, spread=ours.spread, text=text)


def at_most(claim: str, case: str, ours: Sample, limit: float, *, percent: float = 50) -> Row:
    """A figure with an upper limit in its own unit. percent: which percentile counts."""
    figure = ours.percentile(percent) if percent != 50 else ours.median
    goal = f"<= {show(limit, ours.unit)}"
    return Row(claim, case, figure, ours.unit, goal=goal, met=figure <= limit, spread=ours.spread, text=show(figure, ours.unit))


def equal(claim: str, case: str, ours: float, unit: str, expected: float, what: str) -> Row:
    """A figure that must equal another one exactly."""
    text = f"{ours:,.6g} {unit}" if ours != int(ours) else f"{int(ours):,} {unit}"
    return Row(claim, case, ours, unit, {what: expected}, None, f"= {expected:,.0f} {unit}", ours == expected, text=text)


def show(figure: float, unit: str) -> str:
    """Three significant digits and a unit a person likes."""
    for limit, factor, name in _SCALES.get(unit, ()):
        if abs(figure) < limit:
            return f"{figure * factor:.3g} {name}"
    return f"{figure:.3g} {unit}"


def take_turns(contenders: Mapping[str, Callable[[], Sequence[float]]], repeats: int) -> dict[str, Sample]:
    """Run every contender's block ``repeats`` times, one contender after another in each round; a block returns its figures."""
    found: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(repeats):
        for name, block in contenders.items():
            found[name] += block()
    return {name: Sample(tuple(values)) for name, values in found.items()}


def cpu_seconds(work: Callable[[], object], repeats: int) -> Sample:
    """CPU time of ``work`` in this process, after one run to warm up: what counts for single-threaded work on a busy machine."""
    work()
    values = []
    for _ in range(repeats):
        start = time.process_time()
        work()
        values.append(time.process_time() - start)
    return Sample(tuple(values))


def progress(text: str) -> None:
    """Tell a person who waits what is going on."""
    Console(stderr=True).print(f"[dim]{text}")


def machine() -> str:
    """The machine in general words."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    system = (
        f"{platform.system()} {platform.machine()}, {cores} cores, torch {torch.__version__}, Python {platform.python_version()}"
    )
    return f"{system}; load average at the start {os.getloadavg()[0]:.1f}"


def parser(description: str | None) -> argparse.ArgumentParser:
    """Knows the options that every benchmark has."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--quick", action="store_true", help="end within a minute: smaller models, fewer repeats, no page written")
    made.add_argument("--json", type=Path, metavar="FILE", help="write the rows as JSON")
    made.add_argument("--check", action="store_true", help="exit 1 where a goal is missed")
    made.add_argument("--only", metavar="TEXT", default="", help="only the group of that name, or those whose names contain TEXT")
    return made


def arguments(description: str | None) -> argparse.Namespace:
    """The options that every benchmark has."""
    return parser(description).parse_args()


def measured(groups: Mapping[str, Callable[[], Sequence[Row]]], options: argparse.Namespace) -> list[Row]:
    """The rows of the groups that ``--only`` asks for: the one of that name, else all whose names contain it."""
    names = [options.only] if options.only in groups else [name for name in groups if options.only in name]
    if not names:
        sys.exit(f"--only {options.only}: expected a part of one of {', '.join(groups)}")
    rows: list[Row] = []
    for name in names:
        progress(name)
        rows += groups[name]()
    return rows


def report(name: str, title: str, intro: str, rows: Sequence[Row], options: argparse.Namespace, where: str) -> None:
    """Print the table, write JSON and (on a full run) the page ``docs/benchmarks/NAME.md``; exit as ``--check`` asks."""
    table = Table(title=title, title_justify="left")
    for heading in ("claim", "case"):
        table.add_column(heading)
    for heading in ("measured", "ratio", "goal", ""):
        table.add_column(heading, justify="right")
    for row in rows:
        colour = {True: "[green]met", False: "[red]missed", None: ""}[row.met]
        ratio = f"{row.ratio:.2f}x" if row.ratio is not None else ""
        table.add_row(row.claim, row.case, row.text + (" (simulated)" if row.simulated else ""), ratio, row.goal, colour)
    Console().print(where, table)
    if options.json:
        options.json.write_text(json.dumps([row.to_json() for row in rows], indent=1) + "\n")
    if not options.quick and not options.only:
        _page(name, title, intro, rows, where)
    missed = [row for row in rows if row.met is False]
    if options.check and missed:
        sys.exit(1)


def _page(name: str, title: str, intro: str, rows: Sequence[Row], where: str) -> None:
    lines = [f"# {title}", "", intro.strip(), "", f"Machine: {where}.", ""]
    for claim in dict.fromkeys(row.claim for row in rows):
        lines += [f"## {claim}", "", "| case | measured | ratio | goal | met |", "|---|---:|---:|---:|:---:|"]
        for row in (row for row in rows if row.claim == claim):
            ratio = f"{row.ratio:.2f}x" if row.ratio is not None else ""
            met = {True: "yes", False: "**no**", None: ""}[row.met]
            lines.append(f"| {row.case} | {row.text}{' (simulated)' if row.simulated else ''} | {ratio} | {row.goal} | {met} |")
        lines.append("")
    DOCS.mkdir(parents=True, exist_ok=True)
    (DOCS / f"{name}.md").write_text("\n".join(lines))
