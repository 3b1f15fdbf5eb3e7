"""The ranks of one stage among all ranks of a mesh: ``"dp=2,tp=2"`` within ``"pp=2,dp=2,tp=2"``.

A stage's programs are lowered for the axes beside the pipeline's and know nothing of that. Groups are named by axis, so they are
the same; only the mesh and the number of the rank are those of the stage.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .communicator import Communicator, Pending
from .mesh import Mesh


def mesh_without(mesh: Mesh, axis: str) -> Mesh | None:
    """The other axes, None where there are none."""
    rest = tuple(entry for entry in mesh.axes if entry[0] != axis)
    return Mesh(rest) if rest else None


def rank_within(mesh: Mesh, inner: Mesh | None, rank: int) -> int:
    """The number of a rank on some of the axes."""
    if inner is None:
        return 0
    where = mesh.coordinate(rank)
    return inner.rank({name: where[name] for name in inner.names})


class InnerCommunicator:
    """A communicator of a larger mesh as one of ``mesh``, whose axes the larger one has too."""

    def __init__(self, outer: Communicator, mesh: Mesh) -> None:
        self.outer = outer
        self.mesh = mesh
        self.rank = rank_within(outer.mesh, mesh, outer.rank)
        self.wire = outer.wire
        self.peer_memory = getattr(outer, "peer_memory", None)

    def all_reduce(self, tensor: torch.Tensor, op: str, axis: str) -> Pending:
        """See ``Communicator``."""
        return self.outer.all_reduce(tensor, op, axis)

    def all_gather(self, tensor: torch.Tensor, axis: str) -> Pending:
        """See ``Communicator``."""
        return self.outer.all_gather(tensor, axis)

    def reduce_scatter(self, tensor: torch.Tensor, op: str, axis: str) -> Pending:
        """See ``Communicator``."""
        return self.outer.reduce_scatter(tensor, op, axis)

    def all_to_all(self, tensor: torch.Tensor, output_splits: Sequence[int], input_splits: Sequence[int], axis: str) -> Pending:
        """See ``Communicator``."""
        return self.outer.all_to_all(tensor, output_splits, input_splits, axis)

    def broadcast(self, tensor: torch.Tensor, source: int, axis: str) -> Pending:
        """See ``Communicator``."""
        return self.outer.broadcast(tensor, source, axis)

    def send(self, tensor: torch.Tensor, peer: int, tag: int, axis: str) -> Pending:
        """See ``Communicator``."""
        return self.outer.send(tensor, peer, tag, axis)

    def recv(self, like: torch.Tensor, peer: int, tag: int, axis: str) -> Pending:
        """See ``Communicator``."""
        return self.outer.recv(like, peer, tag, axis)

    def wait(self, pending: Pending) -> torch.Tensor:
        """See ``Communicator``."""
        return self.outer.wait(pending)

    def flush(self) -> None:
        """See ``Communicator``: messages between stages are flushed by whoever sends them, not after every part."""

    def barrier(self) -> None:
        """See ``Communicator``: of all ranks of the larger mesh."""
        self.outer.barrier()
