"""What a rank runs for one stage of a pipeline: parts as callables with named ports, and the messages between them.

The ports are named by role, as ``compiler.stages`` describes them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

ONCE = -1
"""Stands for a micro-batch where values belong to the whole step: those that part S makes and part O reads."""

HELD = frozenset(("param", "buffer", "state", "constant"))
"""Kinds of ports that read tensors the stage holds."""

Run = Callable[[Sequence[torch.Tensor]], Sequence[torch.Tensor | None]]


class Port(NamedTuple):
    """An input or output of a part: what it is, and its name."""

    kind: str
    name: str


class ValueSpec(NamedTuple):
    """A tensor in a message. stride: as the maker has it, since kernels choose by strides and the reader must compute the same."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    stride: tuple[int, ...]

    @property
    def dims(self) -> list[int]:
        """The dimensions from the slowest to the fastest in memory: permuted so, a dense tensor is contiguous."""
        return sorted(range(len(self.shape)), key=lambda dim: (-self.stride[dim], -self.shape[dim], dim))

    def new(self) -> torch.Tensor:
        """A tensor of that shape, type and stride with any content."""
        return torch.empty_strided(self.shape, self.stride, dtype=self.dtype)

    def on_wire(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor as it travels: contiguous; the tensor's own memory where that has no gaps."""
        return tensor.permute(self.dims).contiguous()

    def from_wire(self, sent: torch.Tensor) -> torch.Tensor:
        """A tensor of this description from one that travelled; the same memory where this has no gaps."""
        back = sorted(range(len(self.shape)), key=self.dims.__getitem__)
        tensor = sent.permute(back)
        return tensor if tensor.stride() == self.stride or not tensor.numel() else self.new().copy_(tensor)

    @property
    def nbytes(self) -> int:
        """Size in memory and on the wire."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


@dataclass(frozen=True)
class Part:
    """A callable with named ports. drops: values nobody at the stage needs after it.

    An output of kind ``left`` is followed by one of kind ``right`` of the same name: factors of that parameter's gradient.
    """

    run: Run
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    drops: tuple[str, ...] = ()


@dataclass(frozen=True)
class StageCode:
    """What a rank needs to run a stage. weights: the pieces of W; share, optimizer: run once a step; receives_back, sends_back:
    gradients, from and to where."""

    stage: int
    forward: Part
    backward: Part | None = None
    weights: tuple[Part, ...] = ()
    share: Part | None = None
    optimizer: Part | None = None
    receives: tuple[ValueSpec, ...] = ()
    sends: tuple[ValueSpec, ...] = ()
    receives_back: tuple[ValueSpec, ...] = ()
    sends_back: tuple[ValueSpec, ...] = ()

    @property
    def parts(self) -> tuple[Part, ...]:
        """All of them, in an order in which they can run."""
        parts = (self.forward, self.backward, *self.weights, self.share, self.optimizer)
        return tuple(part for part in parts if part is not None)


def named(part: Part, results: Sequence[torch.Tensor | None]) -> dict[str, torch.Tensor]:
    """The results of a part that are there, by name."""
    return {port.name: result for port, result in zip(part.outputs, results, strict=True) if result is not None}
