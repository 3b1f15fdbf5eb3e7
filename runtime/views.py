"""The pieces of tensors that a rank reads and writes in the controller's memory."""

from __future__ import annotations

import torch

from .ports import Piece
from .segments import Location, MappedSegments

_MOST = 4096
"""Views kept at a time."""


class PieceViews:
    """Views of pieces, kept: blocks of memory are used again and again. device: where a rank computes."""

    def __init__(self, segments: MappedSegments, device: torch.device) -> None:
        self._segments = segments
        self._device = device
        self._kept: dict[tuple[int, int, int], torch.Tensor] = {}

    def clear(self) -> None:
        """Forget every view; whoever drops a program must, since views are known by the identity of its pieces."""
        self._kept.clear()

    def view(self, piece: Piece, segment: int, offset: int) -> torch.Tensor:
        """A piece of the tensor that begins at that place."""
        key = (id(piece), segment, offset)
        found = self._kept.get(key)
        if found is None:
            if len(self._kept) >= _MOST:
                self._kept.clear()
            found = self._kept[key] = self.fresh(piece, segment, offset)
        return found

    def fresh(self, piece: Piece, segment: int, offset: int) -> torch.Tensor:
        """The same, not kept."""
        where = Location(segment, offset + piece.offset)
        return self._segments.tensor(where, piece.shape, piece.stride, piece.dtype)

    def value(self, piece: Piece, segment: int, offset: int) -> torch.Tensor:
        """What a rank computes with: the piece where it computes, or what stands for it there (see ``Piece.fill``)."""
        if piece.fill is not None:
            return torch.full(piece.shape, piece.fill, dtype=piece.dtype, device=self._device)
        view = self.view(piece, segment, offset)
        return view if self._device.type == "cpu" else view.to(self._device)
