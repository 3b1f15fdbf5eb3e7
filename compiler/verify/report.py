"""What verification found, in honest words: what was shown, by which means, how sure, and what was not looked at."""

from __future__ import annotations

import dataclasses
import enum
import json
from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text


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


@dataclass(frozen=True)
class LevelResult:
    """One level's answer. failure: the status when it failed; bound: how sure it is; divergence: where the programs part."""

    level: str
    outcome: Outcome
    detail: str
    seconds: float = 0.0
    failure: Status = Status.DIFFERENT
    bound: str = ""
    divergence: str = ""
    growth: tuple[Growth, ...] = ()
    warnings: tuple[str, ...] = ()


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
        return f"{self.status} ({shown}){first}{bound}"

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
        lines: list[RenderableType] = [table]
        for name, text in (("first divergence", self.divergence), ("bound", self.bound), *(("warning", w) for w in self.warnings)):
            if text:
                lines.append(Text(f"{name}: {text}"))
        return Group(*lines)


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
    )
