"""Real English text that ships with Python: the language reference behind ``help("topics")``."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor


def text_bytes() -> Tensor:
    """All of ``pydoc_data.topics`` as bytes: int64 tensor of shape (N,), values below 256, some hundred thousand long."""
    from pydoc_data.topics import topics

    text = "\n".join(topics[name] for name in sorted(topics))
    return torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8).long()


def batches(batch: int, length: int, *, seed: int = 0, text: Tensor | None = None) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless (tokens, targets), each int64 of shape (batch, length): random windows of the text, targets shifted by one byte."""
    data = text_bytes() if text is None else text
    generator = torch.Generator().manual_seed(seed)
    while True:
        starts = torch.randint(len(data) - length - 1, (batch,), generator=generator)
        windows = torch.stack([data[start : start + length + 1] for start in starts.tolist()])
        yield windows[:, :-1].contiguous(), windows[:, 1:].contiguous()
