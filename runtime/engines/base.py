"""The interface of every engine: load a program once, then run its segments on global tensors.

The caller sees global tensors only; an engine cuts them by the layouts of the ports, runs every rank, and assembles the results.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch

from ..mesh import Mesh
from ..program import RankProgram

Bindings = Mapping[tuple[str, str], torch.Tensor]
"""(kind, name) of an input port -> the user's own global tensor, read in place at every call."""

Handle = Any
"""A loaded program, opaque to the caller."""

Ticket = Any
"""One forward whose saved values are alive, opaque to the caller."""


class Engine(Protocol):
    """Owns the ranks of one mesh.

    Programs have either one segment (``forward`` or ``step``), or ``forward`` and ``backward``.
    """

    mesh: Mesh

    def load(self, program: RankProgram, bindings: Bindings) -> Handle:
        """Place a program on the ranks. ``bindings`` names the ports that keep their tensor from call to call: parameters, buffers,
        states, constants. InputError when a binding does not fit its port."""
        ...

    def forward(self, handle: Handle, inputs: Sequence[torch.Tensor]) -> tuple[Ticket, list[torch.Tensor | None]]:
        """Run the first segment.

        inputs: values of the unbound ports of that segment (``segments[0].inputs`` less the bound ones), in port order. Returns a
        ticket for the saved values and the global outputs in the order of ``segment_outputs``. An UPDATE whose param, buffer or
        state of that name is bound is written into the bound tensor, which is then the returned value.
        """
        ...

    def backward(self, handle: Handle, ticket: Ticket, tangents: Sequence[torch.Tensor | None]) -> list[torch.Tensor | None]:
        """Run the second segment of a train program and release the ticket.

        tangents: one per port of ``segments[1].inputs``, None for zeros. Returns gradients (and updates) in the order of
        ``segment_outputs("backward")``; None where a gradient does not exist.
        """
        ...

    def release(self, ticket: Ticket) -> None:
        """Drop the saved values of a forward whose backward will not come. Releasing twice is harmless."""
        ...

    def close(self) -> None:
        """End the ranks. Closing twice is harmless."""
        ...
