"""Memory that solvers use and do not give out, kept from solve to solve.

Fresh memory of some megabytes comes page by page from the system, which for a chain of small steps costs as much as the steps. A
solver takes what it needs, and gives it back when nothing that it returns lies in there. What is kept belongs to one thread and is
bounded; an accelerator's allocator keeps its own.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence

import torch
from torch import Tensor

MOST_BYTES = 64 << 20
"""Kept by a thread, at most."""

_Form = tuple[tuple[int, ...], torch.dtype]


class _Kept(threading.local):
    def __init__(self) -> None:
        self.tensors: dict[_Form, list[Tensor]] = {}
        self.bytes = 0


_KEPT = _Kept()


class Scratch:
    """What one solve has taken."""

    def __init__(self) -> None:
        self._taken: list[Tensor] = []

    def take(self, size: Sequence[int], like: Tensor) -> Tensor:
        """A tensor of that size with any values, of the dtype and on the device of another one."""
        if like.device.type != "cpu":
            return like.new_empty(size)
        free = _KEPT.tensors.get((tuple(size), like.dtype))
        if free:
            found = free.pop()
            _KEPT.bytes -= found.nbytes
        else:
            with torch.inference_mode(mode=False):  # else it could not be written to outside of that mode
                found = torch.empty(tuple(size), dtype=like.dtype)
        self._taken.append(found)
        return found

    def give_back(self) -> None:
        """Keep all of it for the next solve. No view of it may be in use."""
        for tensor in self._taken:
            if tensor.nbytes > MOST_BYTES:
                continue
            while _KEPT.bytes + tensor.nbytes > MOST_BYTES:
                _drop_oldest()
            _KEPT.tensors.setdefault((tuple(tensor.shape), tensor.dtype), []).append(tensor)
            _KEPT.bytes += tensor.nbytes
        self._taken = []


def _drop_oldest() -> None:
    form = next(iter(_KEPT.tensors))
    free = _KEPT.tensors[form]
    if free:
        _KEPT.bytes -= free.pop().nbytes
    if not free:
        del _KEPT.tensors[form]
