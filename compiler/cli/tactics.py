"""``--tactic`` on the command line: ``DataParallel(dp)``, ``Zero(dp, 3)``."""

from __future__ import annotations

import re
from collections.abc import Sequence

from ..errors import InputError
from ..plan.tactics import Auto, DataParallel, SequenceParallel, Tactic, TensorParallel, Zero

_TACTIC = re.compile(r"""(\w+)\(\s*(["']?)(\w+)\2(?:,\s*(?:stage=)?(\d))?\s*\)""")
_KINDS = {
    "Auto": Auto,
    "DataParallel": DataParallel,
    "SequenceParallel": SequenceParallel,
    "TensorParallel": TensorParallel,
    "Zero": Zero,
}


def parse_tactics(texts: Sequence[str]) -> list[Tactic] | str:
    """Tactics from texts, "auto" where there are none; quotes around the axis are as good as none. Raises InputError."""
    return [_tactic(text) for text in texts] or "auto"


def _tactic(text: str) -> Tactic:
    match = _TACTIC.fullmatch(text.strip())
    if match is None or match[1] not in _KINDS:
        raise InputError(
            f"--tactic {text!r}: expected one of {', '.join(f'{name}(axis)' for name in _KINDS)}, such as DataParallel(dp)"
        )
    kind, _, axis, stage = match.groups()
    if stage is None:
        return _KINDS[kind](axis)
    if kind != "Zero":
        raise InputError(f"--tactic {text!r}: only Zero has stages, such as Zero(dp, 3)")
    return Zero(axis, stage=int(stage))
