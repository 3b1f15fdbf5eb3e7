"""What verification found, in honest words: what was shown, by which means, how sure, and what was not looked at."""

from __future__ import annotations

import dataclasses
import enum
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from .counterexample import Counterexample


class Status(enum.StrEnum):
    """The answer. NOT_CHECKED is not a weak EQUAL: nobody has looked."""

    EQUAL = "equal"
    DIFFERENT = "different"
    ILL_TYPED = "ill-typed"
    UNSUPPORTED = "unsupported"
    NOT_CHECKED = "not-checked"


class Outcome(enum.StrEnum):
    """What one level found. PASSED: it holds; PROVED: it shows that the programs are equal."""

    PASSED = "passed"
    PROVED = "proved"
    FAILED = "failed"
    UNSUPPORTED = "unsupported"
    SKIPPED = "skipped"


@dataclass(frozen=True)
class Growth:
    """Error of one output in float32 against float64, relative to the same error of the original program."""

    role: str
    factor: float

    WARN = 4.0
    FAIL = 16.0

    def __str__(self) -> str:
        return f"{self.role} x{self.factor:.3g}"


RELIANCE = {
    "hash": "{} (a keyed function: identities of it are not known)",
    "root": "root (sqrt(x y) = sqrt(x) sqrt(y) holds, sqrt(x)^2 = x only in canonical form)",
    "order": "order (max, sort, comparisons: one branch an entry and draw)",
    "settle": "settle (a logarithm, equal modulo the kernel of E)",
}
"""Treatments of the ring in words. Beside an alarm: an identity that the ring does not know may be behind it."""


@dataclass(frozen=True)
class LevelResult:
    """One level's answer. failure: the status when it failed; bound: how sure it is; divergence: where the programs part;
    counterexample: the smallest piece on which they do; sensitivity: what an equality, or an alarm, relied on."""

    level: str
    outcome: Outcome
    detail: str
    seconds: float = 0.0
    failure: Status = Status.DIFFERENT
    bound: str = ""
    divergence: str = ""
    growth: tuple[Growth, ...] = ()
    warnings: tuple[str, ...] = ()
    counterexample: Counterexample | None = None
    sensitivity: tuple[str, ...] = ()


@dataclass(frozen=True)
class Verdict:
    """The answers of all levels together. seconds: CPU seconds."""

    status: Status
    levels: tuple[LevelResult, ...] = ()
    bound: str = ""
    divergence: str = ""
    growth: tuple[Growth, ...] = ()
    warnings: tuple[str, ...] = ()
    seconds: float = 0.0
    counterexample: Counterexample | None = None
    sensitivity: tuple[str, ...] = ()

    @property
    def refused(self) -> bool:
        """Whether some level found a fault."""
        return self.status in (Status.DIFFERENT, Status.ILL_TYPED)

    def also(self, level: LevelResult) -> Verdict:
        """With one more level's answer; what it could not look at is a warning."""
        together = combine((*self.levels, level))
        if level.outcome in (Outcome.SKIPPED, Outcome.UNSUPPORTED):
            return dataclasses.replace(together, warnings=(*together.warnings, f"{level.level} was not run: {level.detail}"))
        return together

    def __str__(self) -> str:
        shown = "; ".join(f"{level.level}: {level.outcome}, {level.detail}" for level in self.levels) or "no level was asked"
        first = f"; first divergence: {self.divergence}" if self.divergence else ""
        bound = f"; {self.bound}" if self.bound else ""
        smallest = f"; the smallest piece that differs:\n{self.counterexample}" if self.counterexample else ""
        return f"{self.status} ({shown}){first}{bound}{smallest}"

    def to_json(self) -> str:
        """All of it as JSON text."""
        return json.dumps(dataclasses.asdict(self), default=str)

    def __rich__(self) -> RenderableType:
        colour = {Status.EQUAL: "green", Status.DIFFERENT: "red", Status.ILL_TYPED: "red"}.get(self.status, "yellow")
        table = Table(title=Text(f"verification: {self.status}", style=f"bold {colour}"), title_justify="left")
        for heading in ("level", "outcome", "what it says", "seconds"):
            table.add_column(heading, overflow="fold")
        for level in self.levels:
            table.add_row(level.level, str(level.outcome), level.detail, f"{level.seconds:.3f}")
        texts = [
            ("first divergence", self.divergence),
            ("smallest piece that differs", "" if self.counterexample is None else str(self.counterexample)),
            ("bound", self.bound),
            ("relied on", ", ".join(RELIANCE.get(name.partition(":")[0], name).format(name) for name in self.sensitivity)),
            ("float32 error, times that of the original", ", ".join(map(str, self._worst_growth()))),
            *(("warning", warning) for warning in self.warnings),
        ]
        return Group(table, *(Text(f"{name}: {text}") for name, text in texts if text))

    def _worst_growth(self) -> list[Growth]:
        return sorted(self.growth, key=lambda growth: -growth.factor)[:3]


def combine(levels: Sequence[LevelResult]) -> Verdict:
    """The verdict that follows from the levels: a fault anywhere refuses; equality needs one level that shows it."""
    failed = [level for level in levels if level.outcome is Outcome.FAILED]
    proved = [level for level in levels if level.outcome is Outcome.PROVED]
    if failed:
        status = failed[0].failure
    elif proved:
        status = Status.EQUAL
    else:
        asked = any(level.outcome is Outcome.UNSUPPORTED for level in levels)
        status = Status.UNSUPPORTED if asked else Status.NOT_CHECKED
    return Verdict(
        status=status,
        levels=tuple(levels),
        bound="; ".join(level.bound for level in proved if level.bound) if not failed else "",
        divergence=next((level.divergence for level in (*failed, *levels) if level.divergence), ""),
        growth=tuple(growth for level in levels for growth in level.growth),
        warnings=tuple(warning for level in levels for warning in level.warnings),
        seconds=sum(level.seconds for level in levels),
        counterexample=next((level.counterexample for level in levels if level.counterexample), None),
        sensitivity=tuple(sorted({name for level in levels for name in level.sensitivity})),
    )
