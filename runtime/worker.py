"""A local rank: executes what the controller asks for, strictly in order, until the controller is gone.

Inputs, parameters, outputs and gradients are views of the controller's memory; a message carries their offsets. Updates of
parameters and buffers are written in a second round (COMMIT), when every rank has computed them: nobody overwrites what another
rank still reads, and a step that fails halfway leaves them as they were.

A rank that meets an exception reports it once and then does nothing but wait for its end, its connections open, so that its peers
do not fail in turn before the controller knows the cause.
"""

from __future__ import annotations

import importlib.util
import json
import mmap
import os
import signal
import socket
import struct
import traceback
from dataclasses import dataclass, field
from typing import Any, NoReturn

import torch

from . import wire
from .communicator import Communicator
from .errors import RunError
from .executors.flat import FlatExecutor, Frame
from .load import load
from .mesh import Mesh
from .monitor import PAGE_BYTES, PageWriter, State, collective_axes
from .ports import Piece, PortMap, writes
from .program import RankProgram
from .rendezvous import connect_local
from .segments import Location, MappedSegments

_MAX_TEXT = 40_000
_COMMUNICATION = ("gloo/", "Connection closed by peer", "Connection reset by peer", "NCCL", "Socket Timeout", "Broken pipe")
_MEMORY = ("can't allocate memory", "out of memory", "Cannot allocate memory", "bad_alloc", "Unable to mmap")


def main(sock: socket.socket, page_fd: int, store_fd: int, config: dict[str, Any]) -> NoReturn:
    """Run a rank to its end. ``config``: rank, mesh (axes), threads, device, timeout (seconds) and, in tests, ``hook``."""
    page = mmap.mmap(page_fd, PAGE_BYTES)
    os.close(page_fd)
    torch.set_num_threads(config["threads"])
    worker = Worker(sock, page, config)
    try:
        worker.start(store_fd)
        worker.loop()
    except wire.Closed:
        pass
    os._exit(0)


@dataclass
class Loaded:
    """A program on this rank. ``bound``: views of the bound ports, by port; ``targets``: views that updates are written to."""

    program: RankProgram
    executor: FlatExecutor
    ports: PortMap
    axes: dict[int, int]
    bound: dict[int, torch.Tensor]
    fed: list[list[Piece]]
    out: list[list[tuple[int, Piece | None]]]
    offsets: list[struct.Struct]
    updating: list[bool]
    on_device: dict[int, torch.Tensor] = field(default_factory=dict)
    epoch: int = -1


class Worker:
    """State of one rank. Tests may wrap ``monitor`` and ``communicator``, or change programs, through a hook: a function
    ``install(worker)`` in a Python file named ``hook`` in the configuration, called once the groups are up."""

    def __init__(self, sock: socket.socket, page: mmap.mmap, config: dict[str, Any]) -> None:
        self.sock = sock
        self.inbox = wire.Inbox(sock)
        self.rank = int(config["rank"])
        self.mesh = Mesh(tuple((name, size) for name, size in config["mesh"]))
        self.config = config
        self.device = torch.device(config["device"])
        self.page = PageWriter(page, len(self.mesh.axes))
        self.monitor: Any = self.page
        self.segments = MappedSegments()
        self.communicator: Communicator
        self.programs: dict[int, Loaded] = {}
        self.frames: dict[int, tuple[Loaded, Frame]] = {}
        self.updates: dict[int, list[tuple[torch.Tensor, torch.Tensor]]] = {}
        self.failed = False

    # --- life

    def start(self, store_fd: int) -> None:
        """Meet the other ranks and say so."""
        try:
            if self.device.type == "cuda":
                torch.cuda.set_device(self.device)
            self.communicator = connect_local(self.mesh, self.rank, store_fd, self.device, self.config["timeout"])
            if self.config.get("hook"):
                self._install(self.config["hook"])
            self.page.state(State.IDLE)
            wire.send(self.sock, wire.Packet(wire.Op.READY, 0, 0, 0))
        except Exception as error:
            self._report(wire.Packet(wire.Op.READY, 0, 0, 0), error)

    def _install(self, path: str) -> None:
        spec = importlib.util.spec_from_file_location("hocket_rank_hook", path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        module.install(self)

    def loop(self) -> NoReturn:
        """Serve until the controller closes. Raises wire.Closed when it is gone."""
        actions = {
            wire.Op.FORWARD: self._forward,
            wire.Op.BACKWARD: self._backward,
            wire.Op.COMMIT: self._commit,
            wire.Op.LOAD: self._load,
            wire.Op.RELEASE: self._release,
            wire.Op.UNLOAD: self._unload,
            wire.Op.FORGET: self._forget,
            wire.Op.TRACE: self._trace,
            wire.Op.WIRE: self._wire,
        }
        with torch.inference_mode():
            while True:
                packet, descriptors = self.inbox.receive()
                if packet.op == wire.Op.CLOSE:
                    wire.send(self.sock, wire.Packet(wire.Op.DONE, 0, packet.sequence, 0))
                    os._exit(0)
                if self.failed:
                    wire.close_all(descriptors)
                    continue
                try:
                    if packet.op == wire.Op.SEGMENTS:
                        self._map(packet, descriptors)
                    else:
                        actions[wire.Op(packet.op)](packet)
                except wire.Closed:
                    raise
                except Exception as error:
                    self._report(packet, error)

    def _done(self, packet: wire.Packet, payload: bytes = b"", descriptors: tuple[int, ...] = ()) -> None:
        self.page.state(State.IDLE)
        wire.send(self.sock, wire.Packet(wire.Op.DONE, packet.handle, packet.sequence, packet.ticket, payload), descriptors)

    def _report(self, packet: wire.Packet, error: Exception) -> None:
        """Report an exception; of one that an executor has wrapped, the original."""
        self.failed = True
        cause = error.__cause__ if isinstance(error, RunError) and error.__cause__ is not None else error
        text = str(cause)
        report = {
            "type": type(cause).__name__,
            "message": text[:2000],
            "traceback": "".join(traceback.format_exception(cause))[-_MAX_TEXT:],
            "memory": isinstance(cause, MemoryError | torch.OutOfMemoryError) or any(mark in text for mark in _MEMORY),
            "communication": isinstance(cause, RuntimeError | OSError) and any(mark in text for mark in _COMMUNICATION),
        }
        answer = wire.Packet(wire.Op.FAILED, packet.handle, packet.sequence, packet.ticket, json.dumps(report).encode())
        wire.send(self.sock, answer)

    # --- memory

    def _map(self, packet: wire.Packet, descriptors: list[int]) -> None:
        for (ident, nbytes), descriptor in zip(json.loads(packet.payload), descriptors, strict=True):
            self.segments.add(ident, descriptor, nbytes)

    def _forget(self, packet: wire.Packet) -> None:
        for ident in json.loads(packet.payload):
            self.segments.drop(ident)

    def _view(self, piece: Piece, segment: int, offset: int) -> torch.Tensor:
        where = Location(segment, offset + piece.offset)
        return self.segments.tensor(where, piece.shape, piece.stride, piece.dtype)

    def _value(self, piece: Piece, segment: int, offset: int) -> torch.Tensor:
        if piece.fill is not None:
            return torch.full(piece.shape, piece.fill, dtype=piece.dtype, device=self.device)
        return self._view(piece, segment, offset).to(self.device)

    # --- programs

    def _load(self, packet: wire.Packet) -> None:
        """Payload of the request: the length of a JSON head {bound: [[kind, name, segment, offset, strides], ...]}, the head, and
        the program's own JSON."""
        self.page.state(State.LOADING)
        segment, offset, nbytes = struct.unpack("<qqq", packet.payload)
        body = self.segments.read(Location(segment, offset), nbytes)
        split = 8 + struct.unpack_from("<q", body)[0]
        head = json.loads(body[8:split])
        program = self.read_program(body[split:])
        ports = PortMap.of(program, [(kind, name) for kind, name, *_ in head["bound"]])
        bound = {}
        for (_, _, at, start, stride), index in zip(head["bound"], ports.bound, strict=True):
            bound[index] = self._view(Piece.of(program.inputs[index], self.mesh, self.rank, tuple(stride)), at, start)
        executor = FlatExecutor(
            load(program, self.rank, device=self.device if self.device.type == "cuda" else None), self.communicator, self.monitor
        )
        fed = [[Piece.of(program.inputs[i], self.mesh, self.rank) for i in indices] for indices in ports.fed]
        out = [[self._output(program, r.port) for r in results if not r.absent and r.bound is None] for results in ports.results]
        offsets = [struct.Struct(f"<q{2 * (len(f) + len(o))}q") for f, o in zip(fed, out, strict=True)]
        updating = [any(r.bound is not None for r in results) for results in ports.results]
        self.programs[packet.handle] = Loaded(
            program, executor, ports, collective_axes(program), bound, fed, out, offsets, updating
        )
        self._done(packet)

    def read_program(self, text: bytes) -> RankProgram:
        """Parse and check a program; a place for test hooks."""
        return RankProgram.from_json(text)

    def _output(self, program: RankProgram, index: int) -> tuple[int, Piece | None]:
        port = program.outputs[index]
        return index, Piece.of(port, self.mesh, self.rank) if writes(port, self.mesh, self.rank) else None

    def _unload(self, packet: wire.Packet) -> None:
        for ticket in [t for t, (loaded, _) in self.frames.items() if loaded is self.programs[packet.handle]]:
            self._drop(ticket)
        del self.programs[packet.handle]

    # --- steps

    def _forward(self, packet: wire.Packet) -> None:
        loaded = self.programs[packet.handle]
        self.page.begin(packet.handle, packet.sequence, 0, loaded.axes)
        numbers, fed = self._fed(loaded, packet, 0)
        inputs: list[torch.Tensor | None] = [None] * len(loaded.program.inputs)
        for index, value in zip(loaded.ports.fed[0], fed, strict=True):
            inputs[index] = value
        for index, value in self._bound(loaded, numbers[0]).items():
            inputs[index] = value.clone() if index in loaded.ports.copied else value
        frame = loaded.executor.open(inputs)
        self.frames[packet.ticket] = (loaded, frame)
        self._run(packet, loaded, frame, numbers, ())
        if len(loaded.program.segments) == 1:
            self._drop_frame(packet.ticket)
        self._done(packet)

    def _backward(self, packet: wire.Packet) -> None:
        loaded, frame = self.frames[packet.ticket]
        self.page.begin(packet.handle, packet.sequence, 1, loaded.axes)
        numbers, fed = self._fed(loaded, packet, 1)
        self._run(packet, loaded, frame, numbers, fed)
        self._drop_frame(packet.ticket)
        self._done(packet)

    def _fed(self, loaded: Loaded, packet: wire.Packet, segment: int) -> tuple[tuple[int, ...], list[torch.Tensor]]:
        numbers = loaded.offsets[segment].unpack(packet.payload)
        pieces = loaded.fed[segment]
        return numbers, [self._value(piece, numbers[2 * i + 1], numbers[2 * i + 2]) for i, piece in enumerate(pieces)]

    def _bound(self, loaded: Loaded, epoch: int) -> dict[int, torch.Tensor]:
        """Bound values where the program runs: in place on the CPU; copied to a device when the controller says they changed."""
        if self.device.type == "cpu":
            return loaded.bound
        if epoch != loaded.epoch:
            loaded.on_device = {index: value.to(self.device) for index, value in loaded.bound.items()}
            loaded.epoch = epoch
        return loaded.on_device

    def _run(self, packet: wire.Packet, loaded: Loaded, frame: Frame, numbers: tuple[int, ...], fed: Any) -> None:
        segment = 1 if packet.op == wire.Op.BACKWARD else 0
        start = 2 * len(loaded.fed[segment]) + 1
        out: dict[int, torch.Tensor] = {}
        for i, (port, piece) in enumerate(loaded.out[segment]):
            if piece is not None:
                out[port] = self._view(piece, numbers[start + 2 * i], numbers[start + 2 * i + 1])
        local = out if self.device.type == "cpu" else None
        values = loaded.executor.run(frame, loaded.program.segments[segment].name, fed, local)
        updates = []
        if local is not None and not loaded.updating[segment]:
            return  # the executor has written every result into its place
        for result, value in zip(loaded.ports.results[segment], values, strict=True):
            if value is None:
                continue
            if result.bound is not None:
                if writes(loaded.program.outputs[result.port], self.mesh, self.rank):
                    updates.append((loaded.bound[result.bound], value.clone() if self.segments.hold(value) else value))
            elif local is None and result.port in out:
                out[result.port].copy_(value)
        if loaded.updating[segment]:
            self.updates[packet.ticket] = updates

    def _commit(self, packet: wire.Packet) -> None:
        self.page.state(State.WRITING)
        for target, value in self.updates.pop(packet.ticket):
            target.copy_(value)
        self._done(packet)

    def _release(self, packet: wire.Packet) -> None:
        self._drop(packet.ticket)

    def _drop(self, ticket: int) -> None:
        self._drop_frame(ticket)
        self.updates.pop(ticket, None)

    def _drop_frame(self, ticket: int) -> None:
        found = self.frames.pop(ticket, None)
        if found is not None:
            found[1].close()

    # --- looking inside

    def _trace(self, packet: wire.Packet) -> None:
        """Ticket 1: start stamping; 0: stop, and send the stamps as a file."""
        if packet.ticket:
            self.page.start_stamps()
            self._done(packet)
            return
        fd = os.memfd_create("hocket-trace", os.MFD_CLOEXEC)
        with os.fdopen(fd, "wb") as file:
            file.write(json.dumps(self.page.stop_stamps()).encode())
            file.flush()
            self._done(packet, descriptors=(fd,))

    def _wire(self, packet: wire.Packet) -> None:
        counter = self.communicator.wire
        table = {kind: [*sent.as_integer_ratio(), counter.calls[kind]] for kind, sent in counter.sent.items()}
        self._done(packet, json.dumps(table).encode())


def describe_exit(status: int | None) -> str:
    """``was killed by SIGKILL``, ``exited with code 1``; from a wait status, None where nobody could say."""
    if status is None:
        return "is gone"
    code = os.waitstatus_to_exitcode(status)
    if code >= 0:
        return f"exited with code {code}"
    return f"was killed by {signal.Signals(-code).name}" if -code in set(signal.Signals) else f"was killed by signal {-code}"
