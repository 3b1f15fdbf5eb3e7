"""Pipelines on ranks that a launcher started: this process runs its own stages, with parameters of its own.

    pipeline = AttachedPipeline(engine, request, bound)       # alike on every rank; bound: what this rank's stages hold
    outputs = pipeline.step(batches)                          # whole, on every rank
    mine = pipeline.gradients                                 # of this rank's stages, by parameter

What stages on different ranks have in common is brought together once a step, by ``Relay``s:

    gradient of a tied parameter     g = g_last + .. + g_first, handed to every rank that holds the parameter
    a value that one stage updates   handed to the ranks of others that read it

Outputs travel as bits: every byte is written by one rank and zero on all others, so that a sum over ranks changes none.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist

from ..errors import InputError
from ..inner import mesh_without, rank_within
from ..pieces import piece_of
from ..schedule.links import GlooLink
from ..schedule.resident import ResidentPipeline
from ..schedule.stage import HELD, Port, ValueSpec
from ..schedule.text import parse_schedule
from .attach import AttachEngine
from .pipeline import PipelineRequest, Slot, writers

WORD = 8
"""Outputs start at multiples of so many bytes, and are summed as integers of that size."""


@dataclass(frozen=True)
class Relay:
    """One tensor that several ranks need once a step.

    port: what it is, a gradient or what is held; givers: stages whose shares are added up, in that order; readers: ranks of the
    pipeline that hold it.
    """

    port: Port
    givers: tuple[int, ...]
    readers: tuple[int, ...]


@dataclass
class AttachedPipeline:
    """See the module. All ranks construct it, step and close alike. ``gradients`` holds the sums of the latest step.

    Raises InputError for tensors that do not fit, CollectiveMismatch where ranks were given different pipelines, RunError where a
    stage fails, here or on a rank that this one waits for.
    """

    engine: AttachEngine
    request: PipelineRequest
    bound: Mapping[Port, torch.Tensor]
    gradients: dict[str, torch.Tensor] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        mesh, axis = self.engine.mesh, self.request.axis
        self._inner = mesh_without(mesh, axis)
        self._within = rank_within(mesh, self._inner, self.engine.rank)
        self._rank = mesh.coordinate(self.engine.rank)[axis]
        self._schedule = parse_schedule(self.request.schedule)
        self._here = self._schedule.stages_of(self._rank)
        self._relays = tuple(self._crossing())
        self._given: list[dict[str, torch.Tensor]] = [{} for _ in self.request.given]
        self._shares = {
            (stage, name): torch.empty(self._shape(slot), dtype=slot.dtype)
            for (stage, name), slot in self.request.gradients.items()
            if stage in self._here
        }
        self._places, size = _places(self.request.outputs)
        self._bits = torch.zeros(size, dtype=torch.uint8)
        self.engine.agree(json.dumps([self.request.schedule, self.request.stages, self.request.sharing]), "pipeline")
        self._link = GlooLink(mesh.group(axis, self.engine.rank))
        self._resident = ResidentPipeline(self._body(), self.engine.communicator, lambda tensor: tensor, link=self._link)

    def step(self, batches: Sequence[Mapping[str, torch.Tensor]]) -> list[dict[str, torch.Tensor]]:
        """One step. batches: per micro-batch, whole inputs by name. Returns the whole outputs of each; valid until the next step.

        What is bound changes only when every rank has finished its step.
        """
        if len(batches) != len(self._given):
            raise InputError(f"expected {len(self._given)} micro-batches, found {len(batches)}")
        for row, slots, values in zip(self._given, self.request.given, batches, strict=True):
            for name, slot in slots.items():
                if values[name].shape != slot.shape or values[name].dtype != slot.dtype:
                    found = f"{values[name].dtype}{list(values[name].shape)}"
                    raise InputError(f"{name}: expected {slot.dtype}{list(slot.shape)}, found {found}")
                row[name].copy_(self._piece(values[name].detach(), slot))
        self._bits.zero_()
        self._resident.step()
        self._bring_together()
        if self.engine.mesh.size > 1:
            dist.all_reduce(self._bits.view(torch.int64))
        self._resident.commit()
        return [{name: self._whole(m, stage, name) for stage, name in row} for m, row in enumerate(self.request.outputs)]

    def _piece(self, whole: torch.Tensor, slot: Slot) -> torch.Tensor:
        return whole if self._inner is None else piece_of(whole, slot.layout, self._inner, self._within)

    def _shape(self, slot: Slot) -> tuple[int, ...]:
        return tuple(self._piece(torch.empty(slot.shape, device="meta"), slot).shape)

    def _whole(self, m: int, stage: int, name: str) -> torch.Tensor:
        slot, start = self.request.outputs[m][stage, name], self._places[m, stage, name]
        return self._bits.narrow(0, start, _bytes(slot)).view(slot.dtype).view(slot.shape)

    def _body(self) -> dict[str, Any]:
        """The request as ``ResidentPipeline`` reads it, with tensors for places."""
        asked, mine, inner = self.request, self._within, self._inner
        for row, slots in zip(self._given, asked.given, strict=True):
            row.update((name, torch.empty(self._shape(slot), dtype=slot.dtype)) for name, slot in slots.items())
        return {
            "axis": asked.axis,
            "inner": None if inner is None else [list(axis) for axis in inner.axes],
            "schedule": asked.schedule,
            "stages": asked.stages,
            "code_of": list(asked.code_of),
            "sharing": asked.sharing,
            "joined": asked.joined,
            "held": [[port.kind, port.name, {mine: tensor}, {mine: True}] for port, tensor in self.bound.items()],
            "given": [[[name, {mine: tensor}] for name, tensor in row.items()] for row in self._given],
            "outputs": [
                [m, stage, name, {mine: self._piece(self._whole(m, stage, name), slot)}, writers(inner, slot.layout)]
                for m, row in enumerate(asked.outputs)
                for (stage, name), slot in row.items()
            ],
            "gradients": [[*key, {mine: tensor}, {mine: True}] for key, tensor in self._shares.items()],
        }

    def _crossing(self) -> Iterator[Relay]:
        """What ranks have in common, in an order that is the same on all of them."""
        holders: dict[str, set[int]] = {}
        updates: dict[str, int] = {}
        for stage, codes in enumerate(self.request.stages):
            for kind, name, is_input in (port for code in codes for port in _ports(code)):
                if is_input and kind in HELD:
                    holders.setdefault(name, set()).add(self._schedule.placement[stage])
                elif not is_input and kind == "update":
                    updates.setdefault(name, stage)
        gradients: dict[str, list[int]] = {}
        for stage, name in sorted(self.request.gradients, reverse=True):
            gradients.setdefault(name, []).append(stage)
        found = [Relay(Port("gradient", name), tuple(givers), _sorted(holders, name)) for name, givers in gradients.items()]
        found += [Relay(Port("update", name), (stage,), _sorted(holders, name)) for name, stage in updates.items()]
        for relay in sorted(found, key=lambda one: one.port):
            if len({*relay.readers, *(self._schedule.placement[giver] for giver in relay.givers)}) > 1:
                yield relay

    def _bring_together(self) -> None:
        """Run all relays, then leave every gradient of this rank's stages, summed, in ``gradients``."""
        relayed: dict[Port, torch.Tensor] = {}
        for number, relay in enumerate(self._relays):
            value = self._relay(relay, number)
            if value is not None:
                relayed[relay.port] = value
        self._link.finish()
        self.gradients = {}
        for (_, name), share in sorted(self._shares.items(), reverse=True):
            self.gradients[name] = share if name not in self.gradients else self.gradients[name] + share
        for port, value in relayed.items():
            if port.kind == "gradient":
                self.gradients[port.name] = value
            else:
                self._resident.learn(port.name, value)

    def _relay(self, relay: Relay, number: int) -> torch.Tensor | None:
        """The value at the end, on the ranks that read it. The sum grows from rank to rank, then the last one hands it out."""
        ranks = [self._schedule.placement[giver] for giver in relay.givers]
        total: torch.Tensor | None = None
        for place, (giver, rank) in enumerate(zip(relay.givers, ranks, strict=True)):
            if rank != self._rank:
                continue
            share = self._share(relay.port, giver)
            if place and ranks[place - 1] != rank:
                total = self._receive(number, place, ranks[place - 1], share)
            total = share if total is None else total + share
            if place + 1 < len(ranks) and ranks[place + 1] != rank:
                self._send(number, place + 1, ranks[place + 1], total)
        end = len(ranks) + self._rank
        if self._rank == ranks[-1]:
            assert total is not None, "the last giver has added its share"
            for reader in relay.readers:
                if reader != self._rank:
                    self._send(number, len(ranks) + reader, reader, total)
            return total
        return self._receive(number, end, ranks[-1], self._like(relay.port)) if self._rank in relay.readers else None

    def _share(self, port: Port, giver: int) -> torch.Tensor:
        return self._shares[giver, port.name] if port.kind == "gradient" else self._resident.updated(giver, port.name)

    def _like(self, port: Port) -> torch.Tensor:
        """A tensor of the form of what comes. A parameter's gradient lies as the parameter does."""
        kinds = ("param",) if port.kind == "gradient" else ("buffer", "param", "state")
        return next(self.bound[Port(kind, port.name)] for kind in kinds if Port(kind, port.name) in self.bound)

    def _receive(self, number: int, place: int, peer: int, like: torch.Tensor) -> torch.Tensor:
        tag = self._tag(number, place)
        self._link.post(tag, peer, [_spec(like)])
        return self._link.take(tag)[0]

    def _send(self, number: int, place: int, peer: int, value: torch.Tensor) -> None:
        self._link.send(self._tag(number, place), peer, [_spec(value)], [value.contiguous()])

    def _tag(self, number: int, place: int) -> int:
        """Above the tags of all values and of what ``Sharing`` exchanges."""
        schedule = self._schedule
        ranks, stages = len(schedule.ranks), schedule.stages
        base = (2 * schedule.micro_batches + len(self.request.sharing["ties"]) + ranks) * stages
        return base + number * (stages + ranks) + place


def _sorted(holders: Mapping[str, set[int]], name: str) -> tuple[int, ...]:
    return tuple(sorted(holders.get(name, ())))


def _ports(code: Mapping[str, Any]) -> Iterator[tuple[str, str, bool]]:
    """(kind, name, whether it is an input) of every port of a stage's description."""
    parts = [code[name] for name in ("forward", "backward", "share", "optimizer") if code.get(name)]
    for part in (*parts, *code["weights"]):
        yield from ((kind, name, True) for kind, name in part["inputs"])
        yield from ((kind, name, False) for kind, name in part["outputs"])


def _spec(like: torch.Tensor) -> ValueSpec:
    """How a tensor travels: row by row, whatever its own strides are."""
    plain = torch.empty(like.shape, dtype=like.dtype, device="meta")
    return ValueSpec("what stages have in common", tuple(like.shape), like.dtype, plain.stride())


def _bytes(slot: Slot) -> int:
    return math.prod(slot.shape) * slot.dtype.itemsize


def _places(outputs: Sequence[Mapping[tuple[int, str], Slot]]) -> tuple[dict[tuple[int, int, str], int], int]:
    """Where the bytes of every output begin, and how many there are in all."""
    found: dict[tuple[int, int, str], int] = {}
    size = 0
    for m, row in enumerate(outputs):
        for (stage, name), slot in row.items():
            found[m, stage, name] = size
            size += -(-_bytes(slot) // WORD) * WORD
    return found, max(size, WORD)
