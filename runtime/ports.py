"""How the ports of a program map onto global tensors in memory, and onto the piece of one rank.

Controller and ranks derive the same ``PortMap`` from a program and the names of its bound ports, so a message needs no names: only
offsets, in the order given here.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import torch

from .errors import InputError, ProgramError
from .memory import contiguous_stride
from .mesh import Mesh
from .pieces import partial_op, shard_dim, spans
from .program import NO_DTYPE, PortSpec, RankProgram

_BINDABLE = ("param", "buffer", "state")


def torch_dtype(name: str) -> torch.dtype:
    """``float32`` -> ``torch.float32``; ProgramError for anything else."""
    found = getattr(torch, name, None)
    if not isinstance(found, torch.dtype):
        raise ProgramError(f"{name!r} is no dtype")
    return found


@dataclass(frozen=True)
class Result:
    """One result of a segment. bound: the bound input port that it updates, or None; absent: there is no value."""

    port: int
    absent: bool
    bound: int | None


@dataclass(frozen=True)
class PortMap:
    """See the module. Numbers are port numbers of the program.

    bound: inputs that keep their tensor from call to call; fed: per segment, the inputs given at each call; results: per segment;
    copied: bound inputs that the first segment updates and a later one still reads, so a frame needs a copy of them.
    """

    bound: tuple[int, ...]
    fed: tuple[tuple[int, ...], ...]
    results: tuple[tuple[Result, ...], ...]
    copied: frozenset[int]

    @classmethod
    def of(cls, program: RankProgram, bound_names: Collection[tuple[str, str]]) -> PortMap:
        """Raises InputError for a binding without a port and ProgramError for a partial output."""
        keys = {(port.kind, port.name): index for index, port in enumerate(program.inputs)}
        unknown = [name for name in bound_names if name not in keys]
        if unknown:
            raise InputError(f"the program has no input port {unknown[0]}; it has {sorted(keys)[:8]} ...")
        bound = tuple(sorted(keys[name] for name in bound_names))
        for port in program.outputs:
            if any(partial_op(placement) for placement in port.layout):
                raise ProgramError(f"output {port} is partial ({', '.join(port.layout)}); reduce it inside the program")
        members = set(bound)
        results = tuple(
            tuple(cls._result(program, keys, members, index) for index in program.segment_outputs(segment.name))
            for segment in program.segments
        )
        fed = tuple(tuple(i for i in segment.inputs if i not in members) for segment in program.segments)
        updated = {result.bound for result in results[0] if result.bound is not None}
        later = program.inputs_read_after(program.segments[0].name) if len(program.segments) > 1 else frozenset()
        return cls(bound, fed, results, frozenset(updated & later))

    @staticmethod
    def _result(program: RankProgram, keys: dict[tuple[str, str], int], bound: set[int], index: int) -> Result:
        port = program.outputs[index]
        target = None
        if port.kind == "update":
            found = (keys.get((kind, port.name)) for kind in _BINDABLE)
            target = next((i for i in found if i is not None and i in bound), None)
        return Result(index, port.dtype == NO_DTYPE, target)


@dataclass(frozen=True)
class Piece:
    """A rank's piece of a global tensor as a view of its memory: sizes, strides (elements) and byte offset from the first element.

    fill: what the piece holds where it is not taken from the tensor (a partial sum is zero on all but the first index), else None.
    """

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    dtype: torch.dtype
    fill: float | None

    @classmethod
    def of(cls, port: PortSpec, mesh: Mesh, rank: int, stride: tuple[int, ...] | None = None) -> Piece:
        """``stride``: of the global tensor; row-major when not given."""
        stride = contiguous_stride(port.shape) if stride is None else stride
        dtype = torch_dtype(port.dtype)
        cut = spans(port.shape, port.layout, mesh, rank)
        shape = tuple(length for _, length in cut)
        skipped = sum(offset * step for (offset, _), step in zip(cut, stride, strict=True)) if 0 not in shape else 0
        where, fill = mesh.coordinate(rank), None
        for placement, axis in zip(port.layout, mesh.names, strict=True):
            if where[axis] and partial_op(placement) in ("sum", "product"):
                fill = 0.0 if partial_op(placement) == "sum" else 1.0
        return cls(shape, stride, skipped * dtype.itemsize, dtype, fill)


def writes(port: PortSpec, mesh: Mesh, rank: int) -> bool:
    """Whether this rank writes its piece of an output: of the ranks that hold the same piece, the first one does."""
    where = mesh.coordinate(rank)
    return all(shard_dim(placement) is not None or not where[axis] for placement, axis in zip(port.layout, mesh.names, strict=True))


def check_value(port: PortSpec, value: object, what: str) -> torch.Tensor:
    """The value as a tensor that fits the port; InputError otherwise."""
    if not isinstance(value, torch.Tensor):
        raise InputError(f"{what} {port}: expected a tensor, found {type(value).__name__}")
    if tuple(value.shape) != port.shape or value.dtype != torch_dtype(port.dtype):
        found = f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"
        raise InputError(f"{what} {port}: expected {port.dtype}{list(port.shape)}, found {found}")
    return value
