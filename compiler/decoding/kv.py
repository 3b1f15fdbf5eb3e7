"""A key-value cache whose rows stand at different positions and can go back: what is not committed is overwritten."""

from __future__ import annotations

import torch
from torch import Tensor


class RowCache:
    """Keys and values of every layer, one write position per row of the batch.

    It is what ``transformers`` models expect of ``past_key_values``: ``update`` stores the entries of new tokens and returns all
    that a query may look at (which of them it does is the mask's business), ``get_seq_length`` says how many are there. Entries are
    written at the committed positions and beyond; ``commit`` advances a row over those of its new tokens that turned out right.
    Buffers grow by doubling.
    """

    def __init__(self, rows: int, device: torch.device) -> None:
        self.positions: list[int] = [0] * rows
        self._device = device
        self._keys: list[Tensor | None] = []
        self._values: list[Tensor | None] = []
        self._where: Tensor | None = None

    def update(self, keys: Tensor, values: Tensor, layer_idx: int, *_: object, **__: object) -> tuple[Tensor, Tensor]:
        """Store keys and values ``[rows, heads, new, width]`` of one layer; everything stored so far, ``[rows, heads, seen,
        width]``.
        """
        while len(self._keys) <= layer_idx:
            self._keys.append(None)
            self._values.append(None)
        stop = max(self.positions) + keys.shape[2]
        all_keys = self._keys[layer_idx] = self._stored(self._keys[layer_idx], keys, stop)
        all_values = self._values[layer_idx] = self._stored(self._values[layer_idx], values, stop)
        return all_keys[:, :, :stop], all_values[:, :, :stop]

    def get_seq_length(self, _layer: int = 0) -> int:
        """The furthest committed position."""
        return max(self.positions)

    def visible(self, new: int) -> Tensor:
        """Which stored entries each of ``new`` tokens may look at, causally: bool ``[rows, new, seen]``."""
        first = torch.tensor(self.positions, device=self._device)
        queries = first[:, None] + torch.arange(new, device=self._device)
        return torch.arange(max(self.positions) + new, device=self._device) <= queries[:, :, None]

    def commit(self, counts: list[int]) -> None:
        """Keep the first ``counts[row]`` of each row's new entries."""
        self.positions = [position + count for position, count in zip(self.positions, counts, strict=True)]
        self._where = None

    def keep_rows(self, rows: list[int]) -> None:
        """Drop all other rows."""
        index = torch.tensor(rows, device=self._device)
        self.positions = [self.positions[row] for row in rows]
        self._keys = [None if held is None else held.index_select(0, index) for held in self._keys]
        self._values = [None if held is None else held.index_select(0, index) for held in self._values]
        self._where = None

    def _stored(self, held: Tensor | None, new: Tensor, stop: int) -> Tensor:
        if held is None or held.shape[2] < stop:
            room = max(64, 2 * stop)
            grown = new.new_zeros((new.shape[0], new.shape[1], room, new.shape[3]))
            if held is not None:
                grown[:, :, : held.shape[2]] = held
            held = grown
        start, count = self.positions[0], new.shape[2]
        if len(set(self.positions)) == 1:
            held[:, :, start : start + count] = new
            return held
        if self._where is None or self._where.shape[1] != count:
            first = torch.tensor(self.positions, device=new.device)
            self._where = first[:, None] + torch.arange(count, device=new.device)
        held[torch.arange(new.shape[0], device=new.device)[:, None], :, self._where] = new.transpose(1, 2)
        return held
