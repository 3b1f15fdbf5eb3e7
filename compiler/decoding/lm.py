"""A causal language model behind one call: the logits of some new tokens, from a cache whose rows stand at different positions."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import InputError
from .kv import RowCache

NEEDED = ("input_ids", "attention_mask", "position_ids", "past_key_values", "use_cache")
ATTENTION_KINDS = ("full_attention", "sliding_attention")


class CachedLM:
    """See the module. rows: how many sequences are decoded at once; limit: no token of interest stands at this position or later.

    Raises InputError for a model that does not take ``transformers``' arguments, keeps recurrent state (which cannot go back), or
    attends through a kernel that takes no mask.
    """

    def __init__(self, lm: nn.Module, rows: int, limit: int) -> None:
        _check(lm, limit)
        self._lm = lm
        self._config = getattr(lm, "config", None)
        tensor = next(lm.parameters(), None)
        self.device = tensor.device if tensor is not None else torch.device("cpu")
        self.dtype = tensor.dtype if tensor is not None and tensor.is_floating_point() else torch.float32
        self._limit = limit
        self._keeps = "logits_to_keep" in inspect.signature(lm.forward).parameters
        self.cache = RowCache(rows, self.device)

    def logits(self, tokens: Tensor, keep: int | None = None) -> Tensor:
        """float32 logits ``[rows, keep, vocabulary]`` of new tokens ``[rows, new]``; keep: only those of the last so many."""
        new = tokens.shape[1]
        first = torch.tensor(self.cache.positions, device=self.device)
        position_ids = (first[:, None] + torch.arange(new, device=self.device)).clamp_max_(self._limit - 1)
        outputs = self._lm(
            input_ids=tokens,
            attention_mask=self._masks(new, position_ids),
            position_ids=position_ids,
            past_key_values=self.cache,
            use_cache=True,
            **({"logits_to_keep": keep} if keep and self._keeps else {}),
        )
        logits: Tensor = outputs.logits
        return logits[:, -(keep or new) :].float()

    def _masks(self, new: int, position_ids: Tensor) -> Tensor | dict[str, Tensor]:
        """Additive masks ``[rows, 1, new, seen]``, one per kind of attention where the model has several."""
        full = self.cache.visible(new)
        window = _sliding_window(self._config)
        if window is None:
            return self._additive(full)
        behind = position_ids[:, :, None] - torch.arange(full.shape[2], device=self.device)
        sliding = self._additive(full & (behind < window))
        kinds = set(getattr(self._config, "layer_types", None) or ())
        if len(kinds) < 2:
            return self._additive(full) if kinds == {"full_attention"} else sliding
        return {"full_attention": self._additive(full), "sliding_attention": sliding}

    def _additive(self, allowed: Tensor) -> Tensor:
        mask = torch.zeros(allowed.shape, dtype=self.dtype, device=self.device)
        return mask.masked_fill_(~allowed, torch.finfo(self.dtype).min)[:, None]


def _sliding_window(config: Any) -> int | None:
    if getattr(config, "use_sliding_window", True) is False:
        return None
    window = getattr(config, "sliding_window", None)
    return int(window) if window else None


def _check(lm: object, limit: int) -> None:
    if not isinstance(lm, nn.Module):
        raise InputError(f"expected a causal language model (an nn.Module), found {type(lm).__name__}")
    takes = inspect.signature(lm.forward).parameters
    anything = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in takes.values())
    missing = [name for name in NEEDED if name not in takes and not anything]
    if missing:
        raise InputError(
            f"{type(lm).__name__}.forward takes no {missing[0]!r}; hocket.generate calls a model as transformers does, with "
            f"{', '.join(NEEDED)}, and reads .logits of what it returns"
        )
    if lm.training:
        raise InputError(f"{type(lm).__name__} is in training mode, where dropout makes decoding random; call .eval() first")
    config = getattr(lm, "config", None)
    longest = getattr(config, "max_position_embeddings", None)
    if longest is not None and limit > longest:
        raise InputError(f"prompt and new tokens together are {limit} long; {type(lm).__name__} has positions for {longest}")
    foreign = sorted(set(getattr(config, "layer_types", None) or ()) - set(ATTENTION_KINDS))
    if foreign:
        raise InputError(
            f"{type(lm).__name__} has layers of kind {foreign[0]!r}; only attention's cache can go back over tokens that "
            "turned out wrong. Decode this model with its own generate()"
        )
    attention = str(getattr(config, "_attn_implementation", "sdpa") or "sdpa")
    if "flash" in attention or "flex" in attention:
        raise InputError(
            f'{type(lm).__name__} attends through {attention}, which takes no mask per row; load it with attn_implementation="sdpa"'
        )
