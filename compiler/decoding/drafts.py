"""Guesses for the tokens to come. A guess is never trusted, only checked: a bad one costs time, never a token.

The better a draft's distribution q agrees with the model's p, the more of its guesses are right, also where tokens are drawn: a
draft that draws from q with the very noise that the model will draw from p with is right with probability at least (1 - d) / (1 +
d), where d is the total variation distance of p and q (Gumbel coupling; Maddison et al., arXiv 1411.0030, for the noise; Leviathan
et al., arXiv 2211.17192, for drafts).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
from torch import Tensor

from ..errors import InputError

Draft = Callable[[Sequence[int], Sequence[int], int, Tensor | None], list[int]]
"""``(context, trajectory, count, noise)`` -> ``count`` guesses for what follows ``context``, all tokens settled so far.

trajectory: the last sweep's unsettled results. noise: ``[count, vocabulary]``, what will be added to the model's logits before the
largest is taken; None for greedy decoding.
"""


def repeat_draft(context: Sequence[int], trajectory: Sequence[int], count: int, _noise: Tensor | None = None) -> list[int]:
    """Plain Jacobi: the last sweep's results, and its last token repeated."""
    guess = list(trajectory[:count])
    return guess + [guess[-1] if guess else context[-1]] * (count - len(guess))


@dataclass
class PastDraft:
    """What followed the same ``order`` tokens when they came last in this very text; where they are new, ``otherwise``.

    After lookahead decoding's pool (arXiv 2402.02057), kept to the sequence's own past, prompt included.
    """

    order: int = 4
    otherwise: Draft = repeat_draft
    _followers: dict[tuple[int, ...], int] = field(default_factory=dict, repr=False)
    _read: int = 0

    def __call__(self, context: Sequence[int], trajectory: Sequence[int], count: int, noise: Tensor | None) -> list[int]:
        """See Draft."""
        for end in range(max(self._read, self.order), len(context)):
            self._followers[tuple(context[end - self.order : end])] = end
        self._read = len(context)
        found = self._followers.get(tuple(context[-self.order :]))
        if found is None:
            return self.otherwise(context, trajectory, count, noise)
        copied = list(context[found : found + count])
        while len(copied) < count:  # the match reaches the end: the text repeats with that period
            copied.append(copied[len(copied) - (len(context) - found)])
        return copied


class NGramDraft:
    """Tokens drawn from counts of a corpus: after the longest context that occurs in it, up to ``order - 1`` tokens.

    corpus: int64 ``[tokens]``, text like that to come, such as what the model was trained on; a million tokens take about a second
    and 40 bytes a token and order. Greedy decoding takes the commonest follower; drawing adds the model's own noise to the
    logarithms of the counts.
    """

    def __init__(self, corpus: Tensor, order: int = 6) -> None:
        if not isinstance(corpus, Tensor) or corpus.dim() != 1 or corpus.is_floating_point() or len(corpus) <= order or order < 2:
            raise InputError(
                "NGramDraft takes a corpus of tokens, an integer tensor [tokens] longer than its order, and an order from 2 up"
            )
        tokens = corpus.cpu().numpy().astype(np.int64)
        self._tables = [_Counts(tokens, length) for length in range(order - 1, -1, -1)]

    def __call__(self, context: Sequence[int], _trajectory: Sequence[int], count: int, noise: Tensor | None) -> list[int]:
        """See Draft."""
        numbers = None if noise is None else noise.cpu().numpy()
        text = list(context[-len(self._tables) :])
        guesses = []
        for i in range(count):
            guesses.append(self._next(text, None if numbers is None else numbers[i]))
            text.append(guesses[-1])
        return guesses

    def _next(self, text: list[int], noise: np.ndarray | None) -> int:
        for table in self._tables:
            found = table.followers(text)
            if found is not None:
                tokens, scores = found
                known = tokens if noise is None else tokens[tokens < len(noise)]
                if len(known):
                    return int(known[np.argmax(scores[: len(known)] + (0 if noise is None else noise[known]))])
        return text[-1]


class _Counts:
    """Followers of every context of one length: sorted keys of contexts, and for each a slice of tokens and log-counts."""

    def __init__(self, tokens: np.ndarray, length: int) -> None:
        self._length = length
        contexts = _keys(tokens, length)
        following = tokens[length:]
        order = np.lexsort((following, contexts))
        contexts, following = contexts[order], following[order]
        new = np.flatnonzero(np.r_[True, (contexts[1:] != contexts[:-1]) | (following[1:] != following[:-1])])
        counts = np.diff(np.r_[new, len(contexts)])
        self._tokens = following[new]
        starts = np.flatnonzero(np.r_[True, contexts[new][1:] != contexts[new][:-1]])
        self._keys = contexts[new][starts]
        self._bounds = np.r_[starts, len(new)]
        totals = np.add.reduceat(counts, starts)
        self._scores = np.log(counts / np.repeat(totals, np.diff(self._bounds)))

    def followers(self, text: list[int]) -> tuple[np.ndarray, np.ndarray] | None:
        """Tokens seen after the end of ``text``, ascending, and their log-frequencies; None where it never occurred."""
        if len(text) < self._length:
            return None
        key = _keys(np.array([*text[len(text) - self._length :], 0], dtype=np.int64), self._length)[0]
        place = int(np.searchsorted(self._keys, key))
        if place == len(self._keys) or self._keys[place] != key:
            return None
        part = slice(self._bounds[place], self._bounds[place + 1])
        return self._tokens[part], self._scores[part]


def _keys(tokens: np.ndarray, length: int) -> np.ndarray:
    """One number per place that has a follower, from the ``length`` tokens before it. Collisions only make a guess worse."""
    keys = np.zeros(len(tokens) - length, dtype=np.uint64)
    for offset in range(length):
        keys = keys * np.uint64(0x9E3779B97F4A7C15) + tokens[offset : offset + len(keys)].astype(np.uint64) + np.uint64(1)
    return keys


def new_draft(draft: str | Draft) -> Draft:
    """For one sequence: ``"past"``, ``"repeat"`` or a draft of your own after the sequence's past; InputError for anything else."""
    if draft == "past":
        return PastDraft()
    if draft == "repeat":
        return repeat_draft
    if isinstance(draft, NGramDraft):
        return PastDraft(order=8, otherwise=draft)
    if callable(draft):
        return draft
    raise InputError(f'draft must be "past", "repeat" or a callable (context, trajectory, count, noise) -> tokens; found {draft!r}')
