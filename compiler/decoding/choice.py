"""From logits to tokens, as a function: the random numbers of position t are given, so that evaluating t twice gives the same
token.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from ..errors import InputError


@dataclass(frozen=True)
class Chosen:
    """tokens, int64 ``[rows, n]``; margins, float32 ``[rows, n]``: by how much each beat the runner-up, in units of the logits."""

    tokens: Tensor
    margins: Tensor


class Choice(Protocol):
    """Picks tokens for generated positions ``start[row] .. start[row] + n`` of the sequences ``rows``."""

    def __call__(self, logits: Tensor, rows: list[int], start: list[int]) -> Chosen:
        """logits: float32 ``[rows, n, vocabulary]``."""
        ...

    def noise(self, row: int, first: int, count: int, vocabulary: int) -> Tensor | None:
        """What is added to the logits of some positions of a row, ``[count, vocabulary]``; None where nothing is."""
        ...


@dataclass(frozen=True)
class Greedy:
    """The likeliest token."""

    def __call__(self, logits: Tensor, rows: list[int], start: list[int]) -> Chosen:  # noqa: ARG002 (no random numbers)
        """See Choice."""
        return _best(logits)

    def noise(self, row: int, first: int, count: int, vocabulary: int) -> Tensor | None:  # noqa: ARG002 (none)
        """None."""
        return None


@dataclass
class Sampled:
    """argmax(logits + temperature * g) with g standard Gumbel, which is a draw from softmax(logits / temperature).

    standard: g itself, ``[rows, positions, vocabulary]``; or None, and then g of a position comes from a generator seeded by seed,
    row and position, so that no order of evaluation changes it.
    """

    temperature: float
    seed: int = 0
    standard: Tensor | None = None
    _drawn: dict[tuple[int, int], Tensor] = field(default_factory=dict, repr=False)

    def __call__(self, logits: Tensor, rows: list[int], start: list[int]) -> Chosen:
        """See Choice."""
        count, vocabulary = logits.shape[1:]
        noise = torch.stack([self.noise(row, first, count, vocabulary) for row, first in zip(rows, start, strict=True)])
        return _best(logits + noise.to(logits.device))

    def noise(self, row: int, first: int, count: int, vocabulary: int) -> Tensor:
        """Gumbel noise in units of the logits: temperature times standard."""
        if self.standard is not None:
            return self.standard[row, first : first + count].float() * self.temperature
        for position in [p for r, p in self._drawn if r == row and p < first]:
            del self._drawn[row, position]
        return torch.stack([self._draw(row, position, vocabulary) for position in range(first, first + count)])

    def _draw(self, row: int, position: int, vocabulary: int) -> Tensor:
        if (row, position) not in self._drawn:
            generator = torch.Generator().manual_seed(((self.seed * 1_000_003 + row) * 1_000_003 + position) % 2**63)
            exponential = torch.empty(vocabulary).exponential_(generator=generator).clamp_min_(torch.finfo(torch.float32).tiny)
            self._drawn[row, position] = -exponential.log() * self.temperature
        return self._drawn[row, position]


def choice_for(temperature: float, seed: int, noise: Tensor | None, shape: tuple[int, int]) -> Choice:
    """Greedy at temperature 0. shape: rows and new tokens. Raises InputError for a negative temperature or misshapen noise."""
    if temperature < 0:
        raise InputError(f"temperature must be 0 (greedy) or positive; found {temperature}")
    if temperature == 0:
        if noise is not None:
            raise InputError("noise is given but temperature is 0, which draws nothing; set a temperature, such as 1.0")
        return Greedy()
    if noise is not None and (noise.dim() != 3 or noise.shape[0] != shape[0] or noise.shape[1] < shape[1]):
        raise InputError(
            f"noise must be standard Gumbel numbers [rows, new tokens, vocabulary], here [{shape[0]}, {shape[1]}, ...]; "
            f"found {list(noise.shape)}"
        )
    return Sampled(temperature, seed, noise)


def _best(scores: Tensor) -> Chosen:
    best, index = scores.topk(2, dim=-1)
    return Chosen(index[..., 0], best[..., 0] - best[..., 1])
