"""Pipelines on local ranks: every rank runs its own stages, reads weights in place, and adds gradients up where the caller
reads them.

    pipeline = LocalPipeline(engine, request, bound)
    outputs = pipeline.step(batches)          # per micro-batch, by name
    shares = pipeline.gradients               # per stage, by parameter
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
from ..program import PortSpec
from ..schedule.stage import Port
from .binding import Binding
from .local import LocalEngine

Shape = tuple[tuple[int, ...], torch.dtype]


@dataclass(frozen=True)
class PipelineRequest:
    """What ranks need to know (``schedule.resident`` reads it).

    axis: of the mesh; schedule: its text; stages: their parts and messages as JSON; given: shape and dtype of each input of a
    micro-batch by name; outputs: (stage, name) -> shape and dtype of a micro-batch's outputs; gradients: (stage, parameter) -> the
    same of what a stage adds up.
    """

    axis: str
    schedule: str
    micro_batches: int
    stages: list[dict[str, Any]]
    given: Mapping[str, Shape]
    outputs: Mapping[tuple[int, str], Shape]
    gradients: Mapping[tuple[int, str], Shape]


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
        specs = [(PortSpec(p.kind, p.name, tuple(t.shape), _name(t.dtype), ()), t) for p, t in self.bound.items()]
        with self.engine._lock:
            self._bindings = Binding.attach(specs, arena)
            self._given = [
                {name: arena.empty(shape, dtype) for name, (shape, dtype) in self.request.given.items()}
                for _ in range(self.request.micro_batches)
            ]
            self._outputs = {
                (m, stage, name): arena.empty(shape, dtype)
                for (stage, name), (shape, dtype) in self.request.outputs.items()
                for m in range(self.request.micro_batches)
            }
            self.gradients = {key: arena.empty(shape, dtype) for key, (shape, dtype) in self.request.gradients.items()}
            self._number = next(self.engine._numbers)
            self._send(packets.Op.LOAD_PIPELINE, self._body(), self.engine.limits.first)
        self._ran = False

    def step(self, batches: Sequence[Mapping[str, torch.Tensor]]) -> list[dict[str, torch.Tensor]]:
        """One step. batches: per micro-batch, inputs by name. Returns the outputs of each; they are valid until the next step.

        Raises InputError for inputs that do not fit, and RunError where a rank fails.
        """
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
            self._ran = True
        results: list[dict[str, torch.Tensor]] = [{} for _ in self._given]
        for (m, _, name), value in self._outputs.items():
            results[m][name] = value
        return results

    def _send(self, op: packets.Op, body: torch.Tensor | None, patience: float) -> None:
        self.engine._settle_all()
        self.engine._crew.check_open()
        self.engine._announce()
        where = self.engine.arena.locate(body) if body is not None else None
        payload = b"" if where is None or body is None else struct.pack("<qqq", where.segment, where.offset, body.numel())
        sequence = self.engine._crew.post(packets.Packet(op, self._number, 0, 0, payload))
        self.engine._crew.wait(sequence, patience)

    def _body(self) -> torch.Tensor:
        request = {
            "axis": self.request.axis,
            "schedule": self.request.schedule,
            "stages": self.request.stages,
            "held": [[port.kind, port.name, self._place(b.shared)] for port, b in zip(self.bound, self._bindings, strict=True)],
            "given": [[[name, self._place(block)] for name, block in blocks.items()] for blocks in self._given],
            "outputs": [[m, stage, name, self._place(block)] for (m, stage, name), block in self._outputs.items()],
            "gradients": [[stage, name, self._place(block)] for (stage, name), block in self.gradients.items()],
        }
        text = json.dumps(request).encode()
        block = self.engine.arena.empty((len(text),), torch.uint8)
        block.copy_(torch.frombuffer(bytearray(text), dtype=torch.uint8))
        return block

    def _place(self, tensor: torch.Tensor) -> list[Any]:
        where = self.engine.arena.locate(tensor)
        assert where is not None, "everything that ranks see lies in shared memory"
        return [where.segment, where.offset, list(tensor.shape), list(tensor.stride()), _name(tensor.dtype)]


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
