"""What a user may conclude from the verdicts of ``hocket verify``: what was shown, what was not, and the exit status."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from ..verify.report import Outcome, Status, Verdict

_SHOWN = {
    "types": "the distribution is right on all ranks at once: every partial sum is completed, every collective is there once",
    "ring": "both programs are equal over the ring, with the bound above",
    "float": "both programs agree in float64, and float32 errors do not grow",
}
_ROUNDING = "rounding, the kernels themselves, and branches that depend on data and were not taken"


@dataclass(frozen=True)
class Conclusion:
    """ok: nothing wrong was found and the level that was asked for has shown what it can show."""

    ok: bool
    shown: str
    not_shown: str

    def __str__(self) -> str:
        return f"shown: {self.shown or 'nothing'}\nnot shown: {self.not_shown}"

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)


def conclude(level: str, verdicts: Mapping[str, Verdict]) -> Conclusion:
    """From the verdict of every pass, by name. level: what was asked for; ``types`` needs no proof of equal values."""
    held = [set(_held(verdict)) for verdict in verdicts.values()]
    everywhere = set.intersection(*held) if held else set()
    faults = [f"{name} is {v.status}" for name, v in verdicts.items() if v.refused or v.status is Status.UNSUPPORTED]
    equal = bool(verdicts) and all(verdict.status is Status.EQUAL for verdict in verdicts.values())
    ok = equal or (level == "types" and not faults and "types" in everywhere)
    shown = "; ".join(text for name, text in _SHOWN.items() if name in everywhere and not faults)
    if faults:
        missing = f"equality: {'; '.join(faults)}"
    elif equal:
        missing = _ROUNDING
    elif ok:
        missing = "that the values are the same: nothing was computed (--level ring or full does)"
    else:
        open_passes = ", ".join(name for name, verdict in verdicts.items() if verdict.status is not Status.EQUAL)
        missing = f"that the values are the same, for {open_passes or 'any pass'}: no level could look"
    return Conclusion(ok, shown, missing)


def _held(verdict: Verdict) -> list[str]:
    return [level.level for level in verdict.levels if level.outcome in (Outcome.PASSED, Outcome.PROVED)]
