"""Whether a model can be decoded by windows at all, and how far its kernels round: measured once per model and weights."""

from __future__ import annotations

import weakref
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..errors import InputError
from .lm import CachedLM

TOKENS = 9  # on which a window is compared with one token at a time
TOLERANCE = 2048  # units of the dtype's rounding, relative to the logits, and at most a tenth of them: more is another function


@dataclass(frozen=True)
class Probe:
    """rounding: largest difference of the logits between a window and one token at a time; vocabulary: number of logits.

    versions: of the parameters that were probed.
    """

    rounding: float
    vocabulary: int
    versions: tuple[int, ...]


_KNOWN: weakref.WeakKeyDictionary[nn.Module, Probe] = weakref.WeakKeyDictionary()


def probed(lm: nn.Module, rows: Tensor) -> Probe:
    """Compare window, steps and plain forward on the beginning of a prompt ``[rows, tokens]``.

    Raises InputError where the three are not one function.
    """
    versions = tuple(parameter._version for parameter in lm.parameters()) if isinstance(lm, nn.Module) else ()
    known = _KNOWN.get(lm) if isinstance(lm, nn.Module) else None
    if known is None or known.versions != versions:
        known = _measured(lm, rows, versions)
        _KNOWN[lm] = known
    return known


def _measured(lm: nn.Module, rows: Tensor, versions: tuple[int, ...]) -> Probe:
    windowed, stepped = CachedLM(lm, 1, TOKENS), CachedLM(lm, 1, TOKENS)
    tokens = rows[:1].repeat(1, -(-TOKENS // rows.shape[1]))[:, :TOKENS].to(windowed.device)
    at_once = windowed.logits(tokens)
    steps = []
    for position in range(TOKENS):
        steps.append(stepped.logits(tokens[:, position : position + 1]))
        stepped.cache.commit([1])
    one_by_one = torch.cat(steps, dim=1)
    plain: Tensor = lm(input_ids=tokens).logits.float()
    allowed = min(0.1, TOLERANCE * torch.finfo(windowed.dtype).eps) * float(plain.abs().max())
    if not (one_by_one - plain).abs().max() <= allowed or not (at_once - plain).abs().max() <= allowed:
        raise InputError(
            f"{type(lm).__name__} gives other logits with a cache and masks per row than without: it does not follow transformers' "
            "conventions for position_ids, 4-dimensional attention masks or past_key_values, so it can't be decoded by windows"
        )
    return Probe(float((at_once - one_by_one).abs().max()), plain.shape[-1], versions)
