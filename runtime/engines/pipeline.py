"""Pipelines on local ranks: every rank runs its own stages, reads weights in place, and adds gradients up where the caller
reads them.

    pipeline = LocalPipeline(engine, request, bound)
    outputs = pipeline.step(batches)          # per micro-batch, by name
    shares = pipeline.gradients               # per stage, by parameter

Where the mesh has other axes too, a stage is run by a group of ranks, each with its pieces of the same tensors.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from .. import wire as packets
from ..errors import InputError
from ..inner import mesh_without
from ..mesh import Mesh
from ..pieces import piece_of, shard_dim
from ..program import PortSpec
from ..schedule.stage import Port
from .binding import Binding
from .local import LocalEngine

Layout = tuple[str, ...]
"""One placement for every axis beside the pipeline's."""


@dataclass(frozen=True)
class Slot:
    """A tensor in shared memory: its whole shape, and how the ranks of a stage share it."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    layout: Layout = ()


@dataclass(frozen=True)
class PipelineRequest:
    """What ranks need to know (``schedule.resident`` reads it).

    axis: of the mesh; schedule: its text; stages: for every stage a list of codes, parts and messages as JSON; code_of: per
    micro-batch, which of the codes it has; sharing: what stages tell each other once a step, as JSON; held: layouts of what is
    bound; given: per micro-batch, its inputs by name; outputs: per micro-batch, (stage, name) -> a result; gradients: (stage,
    parameter) -> what a stage adds up for the caller; updates: whether a step changes what is bound; joined: see ``StageState``.
    """

    axis: str
    schedule: str
    stages: list[list[dict[str, Any]]]
    code_of: Sequence[int]
    sharing: dict[str, Any]
    held: Mapping[Port, Layout]
    given: Sequence[Mapping[str, Slot]]
    outputs: Sequence[Mapping[tuple[int, str], Slot]]
    gradients: Mapping[tuple[int, str], Slot]
    updates: bool = False
    joined: int = 1


@dataclass
class LocalPipeline:
    """A pipeline on the ranks of an engine. bound: weights, buffers and constants by port; they are moved into shared memory, in
    place, and read there at every step. ``gradients`` holds the sums of the latest step until the next one."""

    engine: LocalEngine
    request: PipelineRequest
    bound: Mapping[Port, torch.Tensor]
    gradients: dict[tuple[int, str], torch.Tensor] = field(init=False)

    def __post_init__(self) -> None:
        arena = self.engine.arena
        self._inner = mesh_without(self.engine.mesh, self.request.axis)
        specs = [(PortSpec(p.kind, p.name, tuple(t.shape), _name(t.dtype), ()), t) for p, t in self.bound.items()]
        with self.engine._lock:
            self._bindings = Binding.attach(specs, arena)
            self._given = [{name: arena.empty(s.shape, s.dtype) for name, s in row.items()} for row in self.request.given]
            self._outputs = [{key: arena.empty(s.shape, s.dtype) for key, s in row.items()} for row in self.request.outputs]
            self.gradients = {key: arena.empty(slot.shape, slot.dtype) for key, slot in self.request.gradients.items()}
            self._number = next(self.engine._numbers)
            self._send(packets.Op.LOAD_PIPELINE, self._body(), self.engine.limits.first)
        self._ran = False
        self._closed = False

    def step(self, batches: Sequence[Mapping[str, torch.Tensor]]) -> list[dict[str, torch.Tensor]]:
        """One step. batches: per micro-batch, inputs by name. Returns the outputs of each; they are valid until the next step.

        What is bound changes only when every rank has finished its step. Raises InputError for inputs that do not fit, and RunError
        where a rank fails.
        """
        if self._closed:
            raise InputError("this pipeline was closed: its programs are gone from the ranks")
        if len(batches) != len(self._given):
            raise InputError(f"expected {len(self._given)} micro-batches, found {len(batches)}")
        with self.engine._lock:
            self.engine._crew.check_open()
            for binding in self._bindings:
                binding.refresh()
            for blocks, values in zip(self._given, batches, strict=True):
                for name, block in blocks.items():
                    if values[name].shape != block.shape or values[name].dtype != block.dtype:
                        found = f"{values[name].dtype}{list(values[name].shape)}"
                        raise InputError(f"{name}: expected {block.dtype}{list(block.shape)}, found {found}")
                    block.copy_(values[name].detach())
            limits = self.engine.limits
            self._send(packets.Op.STEP_PIPELINE, None, limits.step if self._ran else limits.first)
            if self.request.updates:
                self._send(packets.Op.COMMIT_PIPELINE, None, limits.step)
            self._ran = True
        return [{name: value for (_, name), value in row.items()} for row in self._outputs]

    def close(self) -> None:
        """Unload it from the ranks and give its memory back. Closing twice is harmless."""
        if self._closed:
            return
        self._closed = True
        with self.engine._lock:
            if not self.engine._crew.closed:
                self._send(packets.Op.UNLOAD_PIPELINE, None, self.engine.limits.step)
            self._given, self._outputs, self.gradients = [], [], {}

    def _send(self, op: packets.Op, body: torch.Tensor | None, patience: float) -> None:
        self.engine._settle_all()
        self.engine._crew.check_open()
        self.engine._announce()
        where = self.engine.arena.locate(body) if body is not None else None
        payload = b"" if where is None or body is None else struct.pack("<qqq", where.segment, where.offset, body.numel())
        sequence = self.engine._crew.post(packets.Packet(op, self._number, 0, 0, payload))
        self.engine._crew.wait(sequence, patience)

    def _body(self) -> torch.Tensor:
        asked = self.request
        request = {
            "axis": asked.axis,
            "inner": None if self._inner is None else [list(axis) for axis in self._inner.axes],
            "schedule": asked.schedule,
            "stages": asked.stages,
            "code_of": list(asked.code_of),
            "sharing": asked.sharing,
            "joined": asked.joined,
            "held": [
                [
                    port.kind,
                    port.name,
                    self._places(b.shared, asked.held.get(port, ())),
                    writers(self._inner, asked.held.get(port, ())),
                ]
                for port, b in zip(self.bound, self._bindings, strict=True)
            ],
            "given": [
                [[name, self._places(block, slots[name].layout)] for name, block in blocks.items()]
                for blocks, slots in zip(self._given, asked.given, strict=True)
            ],
            "outputs": [
                [m, stage, name, self._places(block, slots[stage, name].layout), writers(self._inner, slots[stage, name].layout)]
                for m, (blocks, slots) in enumerate(zip(self._outputs, asked.outputs, strict=True))
                for (stage, name), block in blocks.items()
            ],
            "gradients": [
                [*key, self._places(block, asked.gradients[key].layout), writers(self._inner, asked.gradients[key].layout)]
                for key, block in self.gradients.items()
            ],
        }
        text = json.dumps(request).encode()
        block = self.engine.arena.empty((len(text),), torch.uint8)
        block.copy_(torch.frombuffer(bytearray(text), dtype=torch.uint8))
        return block

    def _places(self, tensor: torch.Tensor, layout: Layout) -> list[list[Any]]:
        """Where the piece of every rank of a stage lies."""
        if self._inner is None:
            return [self._place(tensor, tensor)]
        return [self._place(piece_of(tensor, layout, self._inner, rank), tensor) for rank in range(self._inner.size)]

    def _place(self, piece: torch.Tensor, whole: torch.Tensor) -> list[Any]:
        where = self.engine.arena.locate(piece if piece.numel() else whole)
        assert where is not None, "everything that ranks see lies in shared memory"
        return [where.segment, where.offset, list(piece.shape), list(piece.stride()), _name(piece.dtype)]


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def writers(inner: Mesh | None, layout: Layout) -> list[bool]:
    """Which ranks of a stage write their piece: of those that hold the same one, the first."""
    mesh = inner or Mesh((("alone", 1),))
    found = []
    for rank in range(mesh.size):
        where = mesh.coordinate(rank)
        same = [axis for axis, placement in zip(mesh.names, layout, strict=False) if shard_dim(placement) is None]
        found.append(not any(where[axis] for axis in same))
    return found
