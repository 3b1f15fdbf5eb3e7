"""Where an index lies when what it counts is cut in pieces: the piece that holds it, and its place there."""

from __future__ import annotations

from typing import Any

import torch
import torch.fx as fx

from .chain.batch import Inserter

aten = torch.ops.aten


def places_in_pieces(insert: Inserter, indices: Any, dim: int, total: int, parts: int) -> tuple[fx.Node, fx.Node]:
    """For indices 0 .. total-1, a node of size 1 along ``dim``: whether each piece holds them, and where in it (anywhere, if not).

    Both have size ``parts`` along ``dim``; ``parts`` divides ``total``.
    """
    known, rows = indices.meta["val"], total // parts
    starts = insert.call(aten.arange.start_step, 0, total, rows, dtype=known.dtype, device=known.device, pin_memory=False)
    along = insert.call(aten.view.default, starts, [parts if d == dim else 1 for d in range(known.dim())])
    within = insert.call(aten.sub.Tensor, indices, along)
    place = insert.call(aten.clamp.default, within, 0, rows - 1)
    return insert.call(aten.eq.Tensor, within, place), place
