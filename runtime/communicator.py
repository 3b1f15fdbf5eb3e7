# ruff: noqa: ARG002  (the communicator of one rank implements a protocol whose arguments it has no use for)
"""What an executor asks of the network, for one rank. Axes are mesh-axis names; peers and sources are indices on the axis.

Every operation returns a ``Pending`` at once. It may read its input until it is waited for or flushed: programs are functional,
so nothing overwrites a value. ``wait`` gives the result. The counter ``wire`` holds the bytes that this rank sends by the standard
formulas of bandwidth-optimal algorithms (Patarasso and Yuan 2009; ring), whatever the transport really does:

    all_gather       (p-1) * input bytes           reduce_scatter   (p-1)/p * input bytes
    all_reduce     2*(p-1)/p * input bytes         all_to_all       bytes meant for other ranks
    broadcast        input bytes, on the source    send             input bytes
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Protocol

import torch

from .mesh import Mesh

REDUCE_OPS = ("sum", "avg", "max", "min", "product")


class Pending(Protocol):
    """A result on its way. Only the communicator that made it can read it."""


@dataclass
class Wire:
    """Bytes and calls of one rank, by kind of collective."""

    sent: dict[str, Fraction] = field(default_factory=dict)
    calls: dict[str, int] = field(default_factory=dict)

    def count(self, kind: str, sent: Fraction | int) -> None:
        """Add one call."""
        self.sent[kind] = self.sent.get(kind, Fraction(0)) + sent
        self.calls[kind] = self.calls.get(kind, 0) + 1

    @property
    def total(self) -> Fraction:
        """All bytes sent; a fraction, since 2*(p-1)/p of a size need not be whole."""
        return sum(self.sent.values(), Fraction(0))


def wire_bytes(kind: str, tensor: torch.Tensor, parts: int) -> Fraction:
    """Bytes one rank sends for a collective of ``parts`` ranks on its input (not for all_to_all, which depends on the splits)."""
    size = tensor.numel() * tensor.element_size()
    match kind:
        case "all_gather":
            return Fraction((parts - 1) * size)
        case "reduce_scatter":
            return Fraction((parts - 1) * size, parts)
        case "all_reduce":
            return Fraction(2 * (parts - 1) * size, parts)
        case _:
            return Fraction(size)


class Communicator(Protocol):
    """One rank's end of every group it belongs to."""

    mesh: Mesh
    rank: int
    wire: Wire

    def all_reduce(self, tensor: torch.Tensor, op: str, axis: str) -> Pending:
        """Elementwise ``op`` (one of REDUCE_OPS) over the axis; same shape."""
        ...

    def all_gather(self, tensor: torch.Tensor, axis: str) -> Pending:
        """Equal pieces concatenated along dimension 0."""
        ...

    def reduce_scatter(self, tensor: torch.Tensor, op: str, axis: str) -> Pending:
        """Reduced, then cut into equal pieces along dimension 0."""
        ...

    def all_to_all(self, tensor: torch.Tensor, output_splits: Sequence[int], input_splits: Sequence[int], axis: str) -> Pending:
        """``input_splits[j]`` rows go to index j; ``output_splits[i]`` rows come from index i; along dimension 0."""
        ...

    def broadcast(self, tensor: torch.Tensor, source: int, axis: str) -> Pending:
        """The tensor of index ``source``; the other ranks' tensors only give shape and dtype."""
        ...

    def send(self, tensor: torch.Tensor, peer: int, tag: int, axis: str) -> Pending:
        """Start sending; its result is the tensor itself. Completion need not be waited for before ``flush``."""
        ...

    def recv(self, like: torch.Tensor, peer: int, tag: int, axis: str) -> Pending:
        """Start receiving a tensor of the shape, dtype and device of ``like``."""
        ...

    def wait(self, pending: Pending) -> torch.Tensor:
        """The result; blocks until it is there."""
        ...

    def flush(self) -> None:
        """Block until everything sent has left this rank."""
        ...

    def barrier(self) -> None:
        """Block until every rank of the mesh is here."""
        ...


@dataclass
class SingleCommunicator:
    """The communicator of a mesh of one rank: nothing moves."""

    mesh: Mesh = field(default_factory=lambda: Mesh((("d", 1),)))
    rank: int = 0
    wire: Wire = field(default_factory=Wire)

    def all_reduce(self, tensor: torch.Tensor, op: str, axis: str) -> Pending:
        """The input."""
        return tensor

    def all_gather(self, tensor: torch.Tensor, axis: str) -> Pending:
        """The input."""
        return tensor

    def reduce_scatter(self, tensor: torch.Tensor, op: str, axis: str) -> Pending:
        """The input."""
        return tensor

    def all_to_all(self, tensor: torch.Tensor, output_splits: Sequence[int], input_splits: Sequence[int], axis: str) -> Pending:
        """The input."""
        return tensor

    def broadcast(self, tensor: torch.Tensor, source: int, axis: str) -> Pending:
        """The input."""
        return tensor

    def send(self, tensor: torch.Tensor, peer: int, tag: int, axis: str) -> Pending:
        """Impossible: there is nobody to send to."""
        raise ValueError(f"a mesh of one rank has no peer {peer} on axis {axis!r}")

    def recv(self, like: torch.Tensor, peer: int, tag: int, axis: str) -> Pending:
        """Impossible: there is nobody to receive from."""
        raise ValueError(f"a mesh of one rank has no peer {peer} on axis {axis!r}")

    def wait(self, pending: Pending) -> torch.Tensor:
        """The tensor itself."""
        assert isinstance(pending, torch.Tensor)
        return pending

    def flush(self) -> None:
        """Nothing was sent."""

    def barrier(self) -> None:
        """Alone, always there."""
