"""A symmetric buffer as this rank sees it, the same for every transport."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Any

import torch

from .transport import SLOTS, Symmetric, TransportError


@dataclass(eq=False)
class SharedBuffer:
    """See ``Symmetric``. tensors: the copies of all ranks of the group, by index; where: what its transport gives back with it;
    sees_all: False where only this rank's own copy can be seen."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    axis: str
    own: int
    tensors: tuple[torch.Tensor, ...]
    where: Any = None
    sees_all: bool = True

    @property
    def local(self) -> torch.Tensor:
        """See ``Symmetric``."""
        return self.tensors[self.own]

    def at(self, peer: int) -> torch.Tensor:
        """See ``Symmetric``."""
        if peer != self.own and not self.sees_all:
            raise TransportError(
                f"this transport gives no view of remote memory: buffer {self.name!r} of index {peer} is out of reach"
            )
        return self.tensors[peer]


class ThroughViews:
    """Transports whose ranks see each other's memory: what moves data is a copy."""

    def put(self, buffer: Symmetric, peer: int, source: torch.Tensor, row: int = 0) -> None:
        """See ``Transport``."""
        buffer.at(peer).narrow(0, row, source.shape[0]).copy_(source)

    def accumulate(self, buffer: Symmetric, peer: int, source: torch.Tensor, row: int = 0) -> None:
        """See ``Transport``."""
        buffer.at(peer).narrow(0, row, source.shape[0]).add_(source)

    def get(self, buffer: Symmetric, peer: int, out: torch.Tensor, row: int = 0) -> torch.Tensor:
        """See ``Transport``."""
        return out.copy_(buffer.at(peer).narrow(0, row, out.shape[0]))


def over(memory: Any, start: int, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """The tensor that lies in some memory from a byte on."""
    if not prod(shape):
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(memory, dtype=dtype, count=prod(shape), offset=start).view(shape)


def checked_slot(slot: int) -> int:
    """The slot; TransportError for one that no rank has."""
    if not 0 <= slot < SLOTS:
        raise TransportError(f"expected a signal slot from 0 to {SLOTS - 1}, found {slot}")
    return slot
