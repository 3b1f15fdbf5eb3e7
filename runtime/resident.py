"""A program as it stays on a local rank between steps."""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from .executors.flat import FlatExecutor, Frame
from .monitor import collective_axes
from .ports import Piece, PortMap, writes
from .program import RankProgram


@dataclass
class Resident:
    """A program on one rank.

    axes: instruction -> axis number of its collective; bound: views of the bound ports, by port; per segment: fed, the pieces of
    its inputs; out, the pieces of its results, None where another rank writes; offsets, the layout of the message; updating,
    whether it gives bound tensors new values. opener: makes frames with the bound values (``FlatExecutor.opener``) as they were in
    state ``epoch``.
    """

    program: RankProgram
    executor: FlatExecutor
    ports: PortMap
    axes: dict[int, int]
    bound: dict[int, torch.Tensor]
    fed: list[list[Piece]]
    out: list[list[tuple[int, Piece | None]]]
    offsets: list[struct.Struct]
    updating: list[bool]
    opener: Callable[[Sequence[torch.Tensor]], Frame] | None = None
    epoch: int = -1

    @classmethod
    def of(cls, executor: FlatExecutor, ports: PortMap, bound: dict[int, torch.Tensor], rank: int) -> Resident:
        """Work out once what every step of this rank needs."""
        program = executor.program
        mesh = program.mesh

        def output(index: int) -> tuple[int, Piece | None]:
            port = program.outputs[index]
            return index, Piece.of(port, mesh, rank) if writes(port, mesh, rank) else None

        fed = [[Piece.of(program.inputs[i], mesh, rank) for i in indices] for indices in ports.fed]
        out = [[output(r.port) for r in results if not r.absent and r.bound is None] for results in ports.results]
        offsets = [struct.Struct(f"<q{2 * (len(f) + len(o))}q") for f, o in zip(fed, out, strict=True)]
        updating = [any(r.bound is not None for r in results) for results in ports.results]
        return cls(program, executor, ports, collective_axes(program), bound, fed, out, offsets, updating)
