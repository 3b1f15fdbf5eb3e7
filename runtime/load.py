"""From instruction list to callables on one rank."""

from __future__ import annotations

from dataclasses import dataclass

from .program import RankProgram


@dataclass(frozen=True)
class LoadedProgram:
    """A program made ready for one rank."""

    program: RankProgram
    rank: int


def load(program: RankProgram, rank: int) -> LoadedProgram:
    """Resolve ops, fold rank-dependent integers, build argument lists."""
    return LoadedProgram(program, rank)
