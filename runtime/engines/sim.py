"""All ranks in this process: every program runs in lockstep, deterministically, without processes or a network.

Parameters and buffers are the user's own tensors, read in place at every call through views of their pieces; replicated pieces are
the same object on every rank, so replicated work is done once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..errors import InputError
from ..executors.lockstep import LockstepExecutor, lockstep_executor
from ..executors.strands import StrandExecutor
from ..matching import match_collectives
from ..mesh import Mesh
from ..pieces import assemble, cut
from ..program import PortSpec, RankProgram
from .base import Bindings

REPLACEABLE = ("param", "buffer", "state")
"""Kinds of bound inputs that an UPDATE output writes back into."""


@dataclass
class SimHandle:
    """A loaded program and the tensors bound to its ports (port -> tensor).

    written: per segment, UPDATE outputs -> the bound input port they replace.
    """

    program: RankProgram
    executor: LockstepExecutor | StrandExecutor
    bound: dict[int, torch.Tensor]
    written: dict[str, dict[int, int]]


@dataclass
class SimTicket:
    """One forward whose frame is alive."""

    frame: Any

    def release(self) -> None:
        """Drop the frame."""
        self.frame.close()


class SimEngine:
    """See ``Engine``. dtype: compute in this floating dtype instead of the program's."""

    def __init__(self, mesh: Mesh, *, dtype: torch.dtype | None = None) -> None:
        self.mesh = mesh
        self.dtype = dtype
        self._closed = False

    def load(self, program: RankProgram, bindings: Bindings) -> SimHandle:
        """See ``Engine``. The ranks' collectives are matched first."""
        if self._closed:
            raise InputError("the engine is closed")
        if program.mesh != self.mesh:
            raise InputError(f"expected a program for mesh {self.mesh}, found one for {program.mesh}")
        ports = {(port.kind, port.name): i for i, port in enumerate(program.inputs)}
        unknown = [key for key in bindings if key not in ports]
        if unknown:
            raise InputError(f"the program has no input {unknown[0][0]}:{unknown[0][1]} to bind")
        for key, tensor in bindings.items():
            check_fits(program.inputs[ports[key]], tensor)
        match_collectives(program)
        bound = {ports[key]: tensor for key, tensor in bindings.items()}
        written = {segment.name: _written(program, bound, segment.name) for segment in program.segments}
        return SimHandle(program, lockstep_executor(program, dtype=self.dtype), bound, written)

    def forward(self, handle: SimHandle, inputs: Sequence[torch.Tensor]) -> tuple[SimTicket, list[torch.Tensor | None]]:
        """See ``Engine``."""
        program = handle.program
        segment = program.segments[0]
        free = [port for port in segment.inputs if port not in handle.bound]
        if len(inputs) != len(free):
            raise InputError(
                f"expected {len(free)} inputs ({', '.join(str(program.inputs[p]) for p in free)}), found {len(inputs)}"
            )
        values = {**handle.bound, **dict(zip(free, inputs, strict=True))}
        for port in free:
            check_fits(program.inputs[port], values[port])
        written = handle.written[segment.name]
        for port in program.inputs_read_after(segment.name) & set(written.values()):
            values[port] = values[port].detach().clone()
        rows = self._rows(program, values)
        ticket = SimTicket(handle.executor.open(rows))
        results = handle.executor.run(ticket.frame, segment.name)
        outputs = self._gather(handle, segment.name, results, written)
        if len(program.segments) == 1:
            ticket.release()
        return ticket, outputs

    def backward(self, handle: SimHandle, ticket: SimTicket, tangents: Sequence[torch.Tensor | None]) -> list[torch.Tensor | None]:
        """See ``Engine``."""
        program = handle.program
        if len(program.segments) != 2:
            raise InputError("this program has no backward")
        segment = program.segments[1]
        if len(tangents) != len(segment.inputs):
            raise InputError(f"expected {len(segment.inputs)} tangents, found {len(tangents)}")
        values = {}
        for port, tangent in zip(segment.inputs, tangents, strict=True):
            spec = program.inputs[port]
            values[port] = torch.zeros(spec.shape, dtype=getattr(torch, spec.dtype)) if tangent is None else tangent
            check_fits(spec, values[port])
        rows = self._rows(program, values)
        extra = [[row[port] for port in segment.inputs] for row in rows]
        results = handle.executor.run(ticket.frame, segment.name, extra)
        outputs = self._gather(handle, segment.name, results, handle.written[segment.name])
        ticket.release()
        return outputs

    def release(self, ticket: SimTicket) -> None:
        """See ``Engine``."""
        ticket.release()

    def close(self) -> None:
        """See ``Engine``."""
        self._closed = True

    def _rows(self, program: RankProgram, values: Mapping[int, torch.Tensor]) -> list[list[torch.Tensor | None]]:
        """Per rank the pieces of the given ports, None for the others."""
        rows: list[list[torch.Tensor | None]] = [[None] * len(program.inputs) for _ in range(self.mesh.size)]
        for port, value in values.items():
            for row, piece in zip(rows, cut(value.detach(), program.inputs[port].layout, self.mesh), strict=True):
                row[port] = piece
        return rows

    def _gather(
        self, handle: SimHandle, segment: str, results: list[list[torch.Tensor | None]], written: Mapping[int, int]
    ) -> list[torch.Tensor | None]:
        """Global outputs; updates go into their bound tensors."""
        outputs: list[torch.Tensor | None] = []
        for position, port in enumerate(handle.program.segment_outputs(segment)):
            pieces = [row[position] for row in results]
            if pieces[0] is None:
                outputs.append(None)
                continue
            value = assemble([piece for piece in pieces if piece is not None], handle.program.outputs[port].layout, self.mesh)
            outputs.append(value)
        for position, port in enumerate(handle.program.segment_outputs(segment)):
            update = outputs[position]
            if port in written and update is not None:
                with torch.no_grad():
                    outputs[position] = handle.bound[written[port]].copy_(update)
        return outputs


def _written(program: RankProgram, bound: Mapping[int, torch.Tensor], segment: str) -> dict[int, int]:
    by_name = {program.inputs[i].name: i for i in bound if program.inputs[i].kind in REPLACEABLE}
    ports = ((port, program.outputs[port]) for port in program.segment_outputs(segment))
    return {port: by_name[spec.name] for port, spec in ports if spec.kind == "update" and spec.name in by_name}


def check_fits(port: PortSpec, value: object) -> None:
    """InputError unless a global tensor has the shape and dtype of its port."""
    if not isinstance(value, torch.Tensor):
        raise InputError(f"{port}: expected a tensor, found {type(value).__name__}")
    dtype = str(value.dtype).removeprefix("torch.")
    if tuple(value.shape) != port.shape or dtype != port.dtype:
        raise InputError(f"{port}: expected {port.dtype}{list(port.shape)}, found {dtype}{list(value.shape)}")
