"""A local rank: executes what the controller asks for, strictly in order, until the controller is gone.

Inputs, parameters, outputs and gradients are views of the controller's memory; a message carries their offsets. Updates of
parameters and buffers are written in a second round (COMMIT), when every rank has computed them: nobody overwrites what another
rank still reads, and a step that fails halfway leaves them as they were.

A rank that meets an exception reports it once and then does nothing but wait for its end, its connections open, so that its peers
do not fail in turn before the controller knows the cause.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import mmap
import os
import socket
import struct
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

import torch

from . import wire
from .communicator import Communicator
from .executors.flat import FlatExecutor, Frame
from .late import late_waits
from .load import LoadedProgram, load
from .mailbox import Inbox, Watch
from .mesh import Mesh
from .monitor import PAGE_BYTES, PageWriter, State
from .ports import Piece, PortMap, writes
from .program import RankProgram
from .rendezvous import connect_local
from .report import report_of
from .resident import Resident
from .segments import Location, MappedSegments
from .views import PieceViews

if TYPE_CHECKING:
    from .fusion import Fusion
    from .schedule.resident import ResidentPipeline


def main(sock: socket.socket, page_fd: int, shared: tuple[int, int], config: dict[str, Any]) -> NoReturn:
    """Run a rank to its end. ``config``: rank, mesh (axes), threads, device, timeout (seconds) and, in tests, ``hook``."""
    page = mmap.mmap(page_fd, PAGE_BYTES)
    os.close(page_fd)
    torch.set_num_threads(config["threads"])
    worker = Worker(sock, page, config)
    try:
        worker.start(shared)
        worker.loop()
    except wire.Closed:
        pass
    os._exit(0)


class Worker:
    """State of one rank. Tests may wrap ``monitor`` and ``communicator``, or change programs, through a hook: a function
    ``install(worker)`` in a Python file named ``hook`` in the configuration, called once the groups are up."""

    def __init__(self, sock: socket.socket, page: mmap.mmap, config: dict[str, Any]) -> None:
        self.sock = sock
        self.rank = int(config["rank"])
        self.mesh = Mesh(tuple((name, size) for name, size in config["mesh"]))
        self.config = config
        self.device = torch.device(config["device"])
        self.page = PageWriter(page, len(self.mesh.axes))
        has_core = self.mesh.size * config["threads"] <= len(os.sched_getaffinity(0))
        self.inbox = Inbox(page, wire.Inbox(sock), Watch() if has_core else None, by_memory=config["by_memory"])
        self.monitor: Any = self.page
        self.segments = MappedSegments()
        self.views = PieceViews(self.segments, self.device)
        self.communicator: Communicator
        self.programs: dict[int, Resident] = {}
        self.frames: dict[int, tuple[Resident, Frame]] = {}
        self.updates: dict[int, list[tuple[torch.Tensor, torch.Tensor]]] = {}
        self.pipelines: dict[int, ResidentPipeline] = {}
        self.failed = False

    # --- life

    def start(self, shared: tuple[int, int]) -> None:
        """Meet the other ranks and say so. shared: files that all ranks have, see ``connect_local``."""
        try:
            if self.device.type == "cuda":
                torch.cuda.set_device(self.device)
            self.communicator = connect_local(
                self.mesh, self.rank, shared, self.device, self.config["timeout"], link=self.config["link"]
            )
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
        actions: dict[int, Callable[[wire.Packet], None]] = {
            wire.Op.FORWARD: self._forward,
            wire.Op.BACKWARD: self._backward,
            wire.Op.COMMIT: self._commit,
            wire.Op.LOAD: self._load,
            wire.Op.RELEASE: self._release,
            wire.Op.UNLOAD: self._unload,
            wire.Op.FORGET: self._forget,
            wire.Op.TRACE: self._trace,
            wire.Op.WIRE: self._wire,
            wire.Op.LOAD_PIPELINE: self._load_pipeline,
            wire.Op.STEP_PIPELINE: self._step_pipeline,
            wire.Op.COMMIT_PIPELINE: self._commit_pipeline,
            wire.Op.UNLOAD_PIPELINE: self._unload_pipeline,
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
                        actions[packet.op](packet)
                except wire.Closed:
                    raise
                except Exception as error:
                    self._report(packet, error)

    def _finish(self, packet: wire.Packet) -> None:
        """A step is done; the controller reads it on the page."""
        self.page.state(State.IDLE)
        if self.inbox.finish(packet.sequence):
            wire.send(self.sock, wire.Packet(wire.Op.DONE, packet.handle, packet.sequence, packet.ticket))

    def _done(self, packet: wire.Packet, payload: bytes = b"", descriptors: tuple[int, ...] = ()) -> None:
        self.page.state(State.IDLE)
        wire.send(self.sock, wire.Packet(wire.Op.DONE, packet.handle, packet.sequence, packet.ticket, payload), descriptors)

    def _report(self, packet: wire.Packet, error: Exception) -> None:
        self.failed = True
        report = report_of(error)
        answer = wire.Packet(wire.Op.FAILED, packet.handle, packet.sequence, packet.ticket, json.dumps(report).encode())
        wire.send(self.sock, answer)

    # --- memory

    def _map(self, packet: wire.Packet, descriptors: Sequence[int]) -> None:
        for (ident, nbytes), descriptor in zip(json.loads(packet.payload), descriptors, strict=True):
            self.segments.add(ident, descriptor, nbytes)

    def _forget(self, packet: wire.Packet) -> None:
        self.views.clear()
        for ident in json.loads(packet.payload):
            self.segments.drop(ident)

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
            piece = Piece.of(program.inputs[index], self.mesh, self.rank, tuple(stride))
            if piece.fill is None:
                bound[index] = self.views.fresh(piece, at, start)
            else:
                bound[index] = torch.full(piece.shape, piece.fill, dtype=piece.dtype)
        ready = load(program, self.rank, device=self.device if self.device.type == "cuda" else None)
        fusion = self._fuse(ready, bound) if head["inductor"] else None
        schedule = fusion.steps if fusion else functools.partial(late_waits, ready)
        executor = FlatExecutor(ready, self.communicator, self.monitor, schedule)
        self.programs[packet.handle] = Resident.of(executor, ports, bound, self.rank)
        self._done(packet, json.dumps(fusion.report.to_json()).encode() if fusion else b"")

    def _fuse(self, ready: LoadedProgram, bound: dict[int, torch.Tensor]) -> Fusion:
        from .fusion import Fusion, input_forms  # takes seconds, and only who asks for it pays

        return Fusion(ready, input_forms(ready.program, self.rank, bound, self.device), self.monitor.at)

    def read_program(self, text: bytes) -> RankProgram:
        """Parse and check a program; a place for test hooks."""
        return RankProgram.from_json(text)

    def _unload(self, packet: wire.Packet) -> None:
        for ticket in [t for t, (loaded, _) in self.frames.items() if loaded is self.programs[packet.handle]]:
            self._drop(ticket)
        del self.programs[packet.handle]
        self.views.clear()

    def _load_pipeline(self, packet: wire.Packet) -> None:
        """See ``schedule.resident``."""
        from .schedule.resident import ResidentPipeline  # only who runs a pipeline needs it

        self.page.state(State.LOADING)
        segment, offset, nbytes = struct.unpack("<qqq", packet.payload)
        request = json.loads(self.segments.read(Location(segment, offset), nbytes))

        def view(place: Any) -> torch.Tensor:
            segment, offset, shape, stride, dtype = place
            return self.segments.tensor(Location(segment, offset), shape, stride, getattr(torch, dtype))

        self.pipelines[packet.handle] = ResidentPipeline(request, self.communicator, view, self.monitor)
        self._done(packet)

    # --- steps

    def _step_pipeline(self, packet: wire.Packet) -> None:
        self.page.begin(packet.handle, packet.sequence, 0, {})
        self.pipelines[packet.handle].step()
        self._done(packet)

    def _commit_pipeline(self, packet: wire.Packet) -> None:
        self.pipelines[packet.handle].commit()
        self._done(packet)

    def _unload_pipeline(self, packet: wire.Packet) -> None:
        del self.pipelines[packet.handle]
        self._done(packet)

    def _forward(self, packet: wire.Packet) -> None:
        loaded = self.programs[packet.handle]
        self.page.begin(packet.handle, packet.sequence, 0, loaded.axes)
        numbers, fed = self._fed(loaded, packet, 0)
        frame = self._opener(loaded, numbers[0])(fed)
        self.frames[packet.ticket] = (loaded, frame)
        self._run(packet, loaded, frame, numbers, ())
        if len(loaded.program.segments) == 1:
            self._drop_frame(packet.ticket)
        self._finish(packet)

    def _backward(self, packet: wire.Packet) -> None:
        loaded, frame = self.frames[packet.ticket]
        self.page.begin(packet.handle, packet.sequence, 1, loaded.axes)
        numbers, fed = self._fed(loaded, packet, 1)
        self._run(packet, loaded, frame, numbers, fed)
        self._drop_frame(packet.ticket)
        self._finish(packet)

    def _fed(self, loaded: Resident, packet: wire.Packet, segment: int) -> tuple[tuple[int, ...], list[torch.Tensor]]:
        numbers = loaded.offsets[segment].unpack(packet.payload)
        pieces = loaded.fed[segment]
        return numbers, [self.views.value(piece, numbers[2 * i + 1], numbers[2 * i + 2]) for i, piece in enumerate(pieces)]

    def _opener(self, loaded: Resident, epoch: int) -> Callable[[Sequence[torch.Tensor]], Frame]:
        """Frames with the bound values where the program runs: in place on the CPU; copied to a device when the controller says
        that they changed."""
        if loaded.opener is None or (epoch != loaded.epoch and self.device.type != "cpu"):
            bound = loaded.bound if self.device.type == "cpu" else {i: v.to(self.device) for i, v in loaded.bound.items()}
            loaded.opener = loaded.executor.opener(bound, loaded.ports.fed[0], loaded.ports.copied)
            loaded.epoch = epoch
        return loaded.opener

    def _run(self, packet: wire.Packet, loaded: Resident, frame: Frame, numbers: tuple[int, ...], fed: Any) -> None:
        segment = 1 if packet.op == wire.Op.BACKWARD else 0
        start = 2 * len(loaded.fed[segment]) + 1
        out: dict[int, torch.Tensor] = {}
        for i, (port, piece) in enumerate(loaded.out[segment]):
            if piece is not None:
                out[port] = self.views.view(piece, numbers[start + 2 * i], numbers[start + 2 * i + 1])
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
        self._finish(packet)

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
