"""The one error for an op that raises on a rank."""

from __future__ import annotations

import traceback

from ..errors import RankFailed
from ..program import RankProgram


def place(program: RankProgram, index: int) -> str:
    """``instruction 7: %9 = aten.mm.default(%3, %5), from model.py:41 self.o(h)``."""
    return f"instruction {index}: {program.describe(index)}, from {program.source(index) or 'an unknown line'}"


def rank_failed(program: RankProgram, rank: int, index: int, error: Exception) -> RankFailed:
    """RankFailed for an exception inside instruction ``index``."""
    first = (str(error).strip().splitlines() or [""])[0]
    return RankFailed(
        f"rank {rank} failed at {place(program, index)}: {type(error).__name__}: {first}",
        rank=rank,
        instruction=program.describe(index),
        source=program.source(index),
        remote="".join(traceback.format_exception(error)),
    )
