"""Guesses for the tokens to come. A guess is never trusted, only checked: a bad one costs time, never a token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from ..errors import InputError


class Draft(Protocol):
    """One per sequence."""

    def __call__(self, context: Sequence[int], trajectory: Sequence[int], count: int) -> list[int]:
        """``count`` guesses for what follows ``context`` (all tokens settled so far). trajectory: the last sweep's unsettled
        results.
        """
        ...


def trajectory_draft(context: Sequence[int], trajectory: Sequence[int], count: int) -> list[int]:
    """Plain Jacobi: the last sweep's results, and its last token repeated."""
    guess = list(trajectory[:count])
    return guess + [guess[-1] if guess else context[-1]] * (count - len(guess))


@dataclass
class NGramDraft:
    """What followed the same ``order`` tokens when they came last (prompt included); where they are new, the trajectory.

    After lookahead decoding's pool (arXiv 2402.02057), kept to the sequence's own past.
    """

    order: int = 4
    _followers: dict[tuple[int, ...], int] = field(default_factory=dict, repr=False)
    _read: int = 0

    def __call__(self, context: Sequence[int], trajectory: Sequence[int], count: int) -> list[int]:
        """See Draft."""
        for end in range(max(self._read, self.order), len(context)):
            self._followers[tuple(context[end - self.order : end])] = end
        self._read = len(context)
        found = self._followers.get(tuple(context[-self.order :]))
        if found is None:
            return trajectory_draft(context, trajectory, count)
        copied = list(context[found : found + count])
        while len(copied) < count:  # the match reaches the end: the text repeats with that period
            copied.append(copied[len(copied) - (len(context) - found)])
        return copied


def new_draft(draft: str | Draft) -> Draft:
    """``"ngram"``, ``"repeat"`` or a callable of your own; InputError for anything else."""
    if draft == "ngram":
        return NGramDraft()
    if draft == "repeat":
        return trajectory_draft
    if callable(draft):
        return draft
    raise InputError(f'draft must be "ngram", "repeat" or a callable (context, trajectory, count) -> tokens; found {draft!r}')
