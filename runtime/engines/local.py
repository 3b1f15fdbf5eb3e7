"""Ranks as processes of this machine: the engine that ``parallelize`` uses by default.

Parameters and buffers are moved into shared memory once, in place; inputs are copied into blocks of it, and outputs and gradients
are blocks of it that the caller owns. So ranks read and write the caller's tensors directly; a step costs one letter a rank
(``mailbox``).

    engine = LocalEngine(Mesh.parse("tp=2"))
    handle = engine.load(program, {("param", "weight"): model.weight})
    ticket, outputs = engine.forward(handle, [x])
    gradients = engine.backward(handle, ticket, [torch.ones(())])
"""

from __future__ import annotations

import json
import os
import struct
import threading
import weakref
from collections import deque
from collections.abc import Sequence
from fractions import Fraction
from itertools import count
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from .. import wire as packets
from ..communicator import Wire
from ..crew import Crew
from ..errors import InputError
from ..matching import match_collectives
from ..memory import SharedArena, default_arena
from ..mesh import Mesh
from ..patience import Limits
from ..ports import PortMap, check_value
from ..program import RankProgram
from ..regions import summary
from ..trace import chrome_trace, read_stamps
from ..transports.link import check_transport
from ..validate import check_rank_program
from .base import Bindings
from .binding import Binding
from .step import LocalHandle, LocalTicket, SegmentPlan, Step

__all__ = ["Limits", "LocalEngine", "Step"]


class LocalEngine:
    """See the module and ``Engine``.

    threads: per rank, default cores // ranks (at least one); inductor: whether ranks compile the regions between collectives, see
    ``runtime.fusion``; transport: how ranks talk, ``"auto"`` or a network to emulate, such as ``"link:20us,1GB/s"`` (latency,
    bandwidth; see ``runtime.transports.link``); device: ``cpu``, or ``cuda`` for one CUDA device a rank; limits:
    timeouts; rank_hook: path of a Python file whose ``install(worker)`` runs on every rank, to inject faults in tests. Starting the
    first engine of a process takes a second or more unless ``hocket.runtime.launcher.warm_up`` was called early. Thread-safe.
    """

    def __init__(
        self,
        mesh: Mesh,
        *,
        threads: int | None = None,
        device: str = "cpu",
        inductor: bool = False,
        transport: str = "auto",
        limits: Limits | None = None,
        rank_hook: str | Path | None = None,
    ) -> None:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        config: dict[str, Any] = {
            "threads": _check_threads(threads) if threads is not None else max(1, cores // mesh.size),
            "devices": _devices(device, mesh.size),
            "link": check_transport(transport),
            "hook": os.fspath(rank_hook) if rank_hook is not None else "",
        }
        self.mesh = mesh
        self.inductor = inductor
        self.transport = transport
        self.limits = limits or Limits()
        self.arena: SharedArena = default_arena()
        self._lock = threading.RLock()
        self._numbers = count(1)
        self._known: set[int] = set()
        self._retired = len(self.arena.retired)
        self._flying: list[Step] = []
        self._dropped: deque[int] = deque()
        self._crew = Crew(mesh, config, self.limits)
        self._finish = weakref.finalize(self, _end, self._crew, self.arena)

    # --- programs

    def load(self, program: RankProgram, bindings: Bindings) -> LocalHandle:
        """See ``Engine.load``. Moves the bound tensors into shared memory, in place."""
        if program.mesh != self.mesh:
            raise InputError(f"expected a program for mesh {self.mesh}, found one for mesh {program.mesh}")
        check_rank_program(program)
        match_collectives(program)
        ports = PortMap.of(program, list(bindings))
        bound = []
        for index in ports.bound:
            port = program.inputs[index]
            bound.append((port, check_value(port, bindings[(port.kind, port.name)], "binding")))
        with self._lock:
            self._settle_all()
            self._crew.check_open()
            attached = Binding.attach(bound, self.arena)
            handle = self._handle(program, ports, attached)
            self._crew.programs[handle.number] = program
            request = self._request(handle)
            self._announce()
            where = self.arena.locate(request)
            assert where is not None
            payload = struct.pack("<qqq", where.segment, where.offset, request.numel())
            sequence = self._crew.post(packets.Packet(packets.Op.LOAD, handle.number, 0, 0, payload))
            answers = self._crew.wait(sequence, self.limits.first)
        if self.inductor:
            handle.fusion = summary([answers[rank].payload for rank in range(self.mesh.size)])
        return handle

    def unload(self, handle: LocalHandle) -> None:
        """Forget a program and its tickets."""
        with self._lock:
            if self._crew.closed or handle.number not in self._crew.programs:
                return
            self._settle_all()
            self._crew.post(packets.Packet(packets.Op.UNLOAD, handle.number, 0, 0), answered=False)
            del self._crew.programs[handle.number]

    def _handle(self, program: RankProgram, ports: PortMap, bindings: list[Binding]) -> LocalHandle:
        plans = [SegmentPlan.of(program, ports, bindings, segment) for segment in range(len(program.segments))]
        home = next((binding.user.device for binding in bindings if binding.user.is_cuda), torch.device("cpu"))
        return LocalHandle(next(self._numbers), program, ports, bindings, plans, home)

    def _request(self, handle: LocalHandle) -> torch.Tensor:
        """Head and program as bytes in shared memory, see ``Worker._load``."""
        bound = []
        for index, binding in zip(handle.ports.bound, handle.bindings, strict=True):
            port, where = handle.program.inputs[index], self.arena.locate(binding.shared)
            assert where is not None
            bound.append([port.kind, port.name, where.segment, where.offset, list(binding.shared.stride())])
        head = json.dumps({"bound": bound, "inductor": self.inductor}).encode()
        body = struct.pack("<q", len(head)) + head + handle.program.to_json().encode()
        block = self.arena.empty((len(body),), torch.uint8)
        block.copy_(torch.frombuffer(bytearray(body), dtype=torch.uint8))
        return block

    # --- steps

    def forward(self, handle: LocalHandle, inputs: Sequence[torch.Tensor]) -> tuple[LocalTicket, list[torch.Tensor | None]]:
        """See ``Engine.forward``."""
        step = self.submit_forward(handle, inputs)
        return step.ticket, step.result()

    def backward(
        self, handle: LocalHandle, ticket: LocalTicket, tangents: Sequence[torch.Tensor | None]
    ) -> list[torch.Tensor | None]:
        """See ``Engine.backward``."""
        return self.submit_backward(handle, ticket, tangents).result()

    def submit_forward(self, handle: LocalHandle, inputs: Sequence[torch.Tensor]) -> Step:
        """Start a forward and return at once, unless ``limits.window`` steps are under way: then the oldest is waited for."""
        with self._lock:
            self._crew.check_open()
            for binding in handle.bindings:
                binding.refresh()
            single = len(handle.segments) == 1
            ticket = LocalTicket(next(self._numbers), handle, self._dropped, single)
            step = self._submit(handle, ticket, 0, inputs)
            ticket.inputs = None if single else step.blocks
            return step

    def submit_backward(self, handle: LocalHandle, ticket: LocalTicket, tangents: Sequence[torch.Tensor | None]) -> Step:
        """Start a backward and return at once; see ``submit_forward``."""
        with self._lock:
            self._crew.check_open()
            if ticket.handle is not handle or ticket.released:
                raise InputError("the saved values of this forward are gone: its backward has run, or its ticket was released")
            step = self._submit(handle, ticket, 1, tangents)
            step.kept, ticket.inputs, ticket.released = ticket.inputs, None, True
            return step

    def _submit(self, handle: LocalHandle, ticket: LocalTicket, segment: int, given: Sequence[torch.Tensor | None]) -> Step:
        """Copy what is given into blocks, make blocks for the results, and tell the ranks."""
        plan = handle.segments[segment]
        plan.check(given, optional=segment > 0)
        while len(self._flying) >= self.limits.window or (self._flying and self._flying[-1].plan.updated):
            self.settle(self._flying[0])
        step = Step(self.settle, handle, plan, ticket)
        step.blocks = blocks, places = plan.spare.pop() if plan.spare else self.arena.allocate(plan.fed)
        for block, value in zip(blocks, given, strict=True):
            if value is None:
                block.zero_()
            else:
                block.copy_(value.detach())
        outputs, out_places = self.arena.allocate(plan.out)
        self._announce()
        epoch = sum([binding.epoch for binding in handle.bindings])
        payload = plan.packer.pack(epoch, *places, *out_places)
        op = packets.Op.BACKWARD if segment else packets.Op.FORWARD
        step.sequence = self._crew.post(packets.Packet(op, handle.number, 0, ticket.number, payload))
        step.values = plan.results(outputs)
        self._flying.append(step)
        return step

    def settle(self, step: Step) -> None:
        """Wait for a step and those before it."""
        with self._lock:
            while not step.settled:
                self._crew.check_open()
                oldest = self._flying[0]
                handle = oldest.handle
                self._crew.wait(oldest.sequence, self.limits.step if handle.runs > 1 else self.limits.first)
                if oldest.plan.updated:
                    sequence = self._crew.post(packets.Packet(packets.Op.COMMIT, handle.number, 0, oldest.ticket.number))
                    self._crew.wait(sequence, self.limits.step)
                oldest.finish()
                handle.runs += 1
                del self._flying[0]

    def _settle_all(self) -> None:
        if self._flying:
            self.settle(self._flying[-1])

    def release(self, ticket: LocalTicket) -> None:
        """See ``Engine.release``. May be called from a finalizer in any thread; the ranks hear of it with the next step."""
        ticket.drop()

    def _announce(self) -> None:
        """Tell the ranks of new and of vanished segments, and of tickets that nobody holds any more."""
        if self.arena.newest() not in self._known:
            fresh = [entry for entry in self.arena.descriptors() if entry[0] not in self._known]
            for start in range(0, len(fresh), packets.max_descriptors()):
                some = fresh[start : start + packets.max_descriptors()]
                table = json.dumps([[ident, nbytes] for ident, _, nbytes in some]).encode()
                self._crew.post(packets.Packet(packets.Op.SEGMENTS, 0, 0, 0, table), tuple(fd for _, fd, _ in some), answered=False)
                self._known.update(ident for ident, _, _ in some)
        if len(self.arena.retired) > self._retired:
            gone = [ident for ident in self.arena.retired[self._retired :] if ident in self._known]
            self._retired += len(self.arena.retired) - self._retired
            if gone:
                self._crew.post(packets.Packet(packets.Op.FORGET, 0, 0, 0, json.dumps(gone).encode()), answered=False)
        while self._dropped:
            self._crew.post(packets.Packet(packets.Op.RELEASE, 0, 0, self._dropped.popleft()), answered=False)

    # --- looking inside

    def start_trace(self) -> None:
        """Begin to stamp every instruction on every rank (about 0.1 us each)."""
        self._ask(packets.Packet(packets.Op.TRACE, 0, 0, 1))

    def trace(self, path: str | os.PathLike[str]) -> None:
        """End stamping and write what was stamped since ``start_trace`` as a Chrome/Perfetto trace: one process per rank."""
        with self._lock:
            self._settle_all()
            sequence = self._crew.post(packets.Packet(packets.Op.TRACE, 0, 0, 0))
            files = self._crew.files(sequence)
            self._crew.wait(sequence, self.limits.step)
            stamps = [read_stamps(files[rank]) for rank in range(self.mesh.size)]
            files.clear()
            Path(path).write_text(json.dumps(chrome_trace(stamps, self._crew.programs)))

    def wire(self) -> list[Wire]:
        """Per rank, the bytes it has sent and its collectives so far, by the formulas of ``communicator``."""
        found = []
        for answer in self._ask(packets.Packet(packets.Op.WIRE, 0, 0, 0)):
            table = json.loads(answer.payload)
            found.append(
                Wire(
                    {kind: Fraction(up, down) for kind, (up, down, _) in table.items()},
                    {kind: calls for kind, (_, _, calls) in table.items()},
                )
            )
        return found

    @property
    def pids(self) -> list[int]:
        """Process ids of the ranks, in rank order; empty once they are gone."""
        return [] if self._crew.closed else [rank.pid for rank in self._crew.ranks]

    def _ask(self, packet: packets.Packet) -> list[packets.Packet]:
        with self._lock:
            self._settle_all()
            answers = self._crew.wait(self._crew.post(packet), self.limits.step)
            return [answers[rank] for rank in range(self.mesh.size)]

    # --- the end

    def close(self) -> None:
        """See ``Engine.close``. Steps under way are finished or ended within a second."""
        self._finish()

    def __enter__(self) -> LocalEngine:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None) -> None:
        self.close()


def _end(crew: Crew, arena: SharedArena) -> None:
    crew.close()
    if os.getpid() == crew.owner:
        arena.trim()


def _check_threads(threads: int) -> int:
    if not isinstance(threads, int) or threads < 1:
        raise InputError(f"threads must be an integer >= 1, found {threads!r}")
    return threads


def _devices(device: str, ranks: int) -> list[str]:
    kind = torch.device(device).type
    if kind == "cpu":
        return ["cpu"] * ranks
    if kind != "cuda":
        raise InputError(f"engine 'local' runs on cpu or cuda, found {device!r}")
    available = torch.cuda.device_count()
    if available < ranks:
        raise InputError(
            f"expected one CUDA device per rank, {ranks} in all; found {available}. Use a smaller mesh, or device='cpu'"
        )
    return [f"cuda:{index}" for index in range(ranks)]
