"""The model that the step benchmark trains: the demo's Llama, byte tokens of English text, AdamW with torch's defaults."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hocket.compiler.demo.llama import Llama, LlamaConfig

RATE = 1e-3


@dataclass(frozen=True)
class Case:
    """Sizes of one measurement: B sequences of S tokens through ``layers`` blocks of the given width; vocabulary: 256 for bytes."""

    width: int = 512
    hidden: int = 1376
    layers: int = 4
    batch: int = 8
    length: int = 128
    vocabulary: int = 256

    def __str__(self) -> str:
        words = "" if self.vocabulary == 256 else f", {self.vocabulary:,} words"
        return f"d={self.width}, {self.layers} layers, B={self.batch}, S={self.length}{words}"

    def model(self) -> Llama:
        """The same weights in every process."""
        torch.manual_seed(0)
        sizes = LlamaConfig(self.vocabulary, self.width, self.layers, hidden=self.hidden, context=self.length)
        return Llama(sizes)

    def data(self) -> tuple[Tensor, Tensor]:
        """One batch of tokens and targets, the same in every process."""
        draw = torch.Generator().manual_seed(1)
        tokens = torch.randint(self.vocabulary, (self.batch, self.length + 1), generator=draw)
        return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
