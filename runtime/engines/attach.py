"""This process is one rank of a world that a launcher started: torchrun, SLURM, Kubernetes.

    torchrun --nproc-per-node 2 train.py

Every rank runs the same script and calls the engine alike. Inputs are the same global tensors everywhere and each rank takes its
piece; bound parameters are the rank's own pieces (``DTensor.to_local()``). Results are this rank's pieces: the global value where a
port is replicated.
"""

from __future__ import annotations

import datetime
import functools
import hashlib
import itertools
import os
from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import cast

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from ..communicator import Communicator, SingleCommunicator, Wire
from ..errors import CollectiveMismatch, InputError, RunError
from ..executors.flat import FlatExecutor, Frame
from ..gloo import GlooCommunicator
from ..load import load
from ..matching import match_collectives
from ..mesh import Mesh
from ..pieces import local_shape, piece_of
from ..place import Place, find_place
from ..ports import PortMap, torch_dtype
from ..program import PortSpec, RankProgram
from ..regions import Report
from ..rendezvous import backend_for
from ..validate import check_rank_program
from .base import Bindings


@dataclass(eq=False)
class AttachHandle:
    """A program on this rank, and this rank's pieces of the bound ports."""

    program: RankProgram
    executor: FlatExecutor
    ports: PortMap
    bound: dict[int, torch.Tensor]
    fusion: Report | None = None


@dataclass(eq=False)
class AttachTicket:
    """One forward whose saved values are alive on this rank."""

    handle: AttachHandle
    frame: Frame


class AttachEngine:
    """See the module and ``Engine``. All ranks must construct it, load, run and close alike, in the same order.

    device: ``cpu`` or ``cuda`` (the device of this rank's number on its machine); default: cuda where there is one. timeout:
    seconds that a collective may take. inductor: whether to compile the regions between collectives
    (``runtime.fusion``). Joins the process group the user has initialised, else initialises one. InputError when the
    world is not as large as the mesh.
    """

    def __init__(self, mesh: Mesh, *, device: str | None = None, timeout: float = 1800.0, inductor: bool = False) -> None:
        self.mesh = mesh
        self.inductor = inductor
        self._closed = self._owns_group = False
        place = find_place(os.environ)
        _check_world(mesh, dist.get_world_size() if dist.is_initialized() else place.world, place.launcher)
        self.device = _device(device, place)
        self._communicator: Communicator = SingleCommunicator(mesh)
        if mesh.size > 1:
            self._join(place, timeout)
        self.rank = self._communicator.rank

    def _join(self, place: Place, timeout: float) -> None:
        if not dist.is_initialized():
            limit = datetime.timedelta(seconds=timeout)
            dist.init_process_group(
                backend_for(self.device), store=_meeting_place(place), rank=place.rank, world_size=place.world, timeout=limit
            )
            self._owns_group = True
        self.agree(str(self.mesh), f"mesh {self.mesh}")  # before groups are made: they would be made of different ranks
        self._communicator = cast(Communicator, GlooCommunicator(self.mesh, timeout))

    @property
    def communicator(self) -> Communicator:
        """This rank's end of the groups of all axes."""
        return self._communicator

    def settle(self, text: str) -> str:
        """The text of rank 0, on every rank; all ranks call it at the same point."""
        if self.mesh.size == 1:
            return text
        box = [text]
        dist.broadcast_object_list(box, src=0, device=self.device)
        return box[0]

    def agree(self, text: str, what: str) -> None:
        """CollectiveMismatch, on every rank, unless all ranks pass the same text."""
        if self.mesh.size == 1:
            return
        own = torch.frombuffer(bytearray(hashlib.sha256(text.encode()).digest()), dtype=torch.uint8).to(self.device)
        everyone = [torch.empty_like(own) for _ in range(self.mesh.size)]
        dist.all_gather(everyone, own)
        digests = [bytes(digest.tolist()).hex()[:12] for digest in everyone]
        odd = [rank for rank, digest in enumerate(digests) if digest != digests[0]]
        if odd:
            raise CollectiveMismatch(
                f"expected the same program and mesh on every rank, found {digests[0]} on rank 0 and {digests[odd[0]]} on rank "
                f"{odd[0]} ({what} here, on rank {dist.get_rank()}); do all ranks run the same script with the same arguments?",
                rank=odd[0],
            )

    def load(self, program: RankProgram, bindings: Bindings) -> AttachHandle:
        """See ``Engine.load``; bindings are this rank's pieces. CollectiveMismatch when another rank loads another program."""
        self._check_open()
        if program.mesh != self.mesh:
            raise InputError(f"expected a program for mesh {self.mesh}, found one for mesh {program.mesh}")
        check_rank_program(program)
        match_collectives(program)
        ports = PortMap.of(program, list(bindings))
        bound = {}
        for index in ports.bound:
            port = program.inputs[index]
            bound[index] = self._local(port, bindings[(port.kind, port.name)], "binding").detach()
        self.agree(program.sha256, f"program {program.sha256[:12]}")
        ready = load(program, self.rank, device=self.device if self.device.type == "cuda" else None)
        if not self.inductor:
            return AttachHandle(program, FlatExecutor(ready, self._communicator), ports, bound)
        from ..fusion import Fusion, input_forms  # takes seconds, and only who asks for it pays

        fusion = Fusion(ready, input_forms(program, self.rank, bound, self.device), lambda _: None)
        executor = FlatExecutor(ready, self._communicator, schedule=fusion.steps)
        return AttachHandle(program, executor, ports, bound, fusion.report)

    def forward(self, handle: AttachHandle, inputs: Sequence[torch.Tensor]) -> tuple[AttachTicket, list[torch.Tensor | None]]:
        """See ``Engine.forward``; inputs are global, results are this rank's pieces."""
        self._check_open()
        program = handle.program
        values: list[torch.Tensor | None] = [None] * len(program.inputs)
        for index, piece in handle.bound.items():
            values[index] = piece.clone() if index in handle.ports.copied else piece
        for index, value in zip(handle.ports.fed[0], self._fed(handle, 0, inputs), strict=True):
            values[index] = value
        ticket = AttachTicket(handle, handle.executor.open(values))
        results = self._run(ticket, 0, ())
        if len(program.segments) == 1:
            self.release(ticket)
        return ticket, results

    def backward(
        self, handle: AttachHandle, ticket: AttachTicket, tangents: Sequence[torch.Tensor | None]
    ) -> list[torch.Tensor | None]:
        """See ``Engine.backward``; a tangent is global, or this rank's piece where the output is cut."""
        self._check_open()
        if ticket.handle is not handle or ticket.frame.closed or len(handle.program.segments) < 2:
            raise InputError("the saved values of this forward are gone: its backward has run, or its ticket was released")
        results = self._run(ticket, 1, self._fed(handle, 1, tangents))
        self.release(ticket)
        return results

    def release(self, ticket: AttachTicket) -> None:
        """See ``Engine.release``."""
        ticket.frame.close()

    def _fed(self, handle: AttachHandle, segment: int, given: Sequence[torch.Tensor | None]) -> list[torch.Tensor]:
        program, fed = handle.program, handle.ports.fed[segment]
        if len(given) != len(fed):
            raise InputError(f"expected {len(fed)} inputs of {program.segments[segment].name}, found {len(given)}")
        pieces = []
        for index, value in zip(fed, given, strict=True):
            port = program.inputs[index]
            if value is None and segment:
                shape = local_shape(port.shape, port.layout, self.mesh, self.rank)
                value = torch.zeros(shape, dtype=torch_dtype(port.dtype))
            pieces.append(self._piece(port, value))
        return pieces

    def _piece(self, port: PortSpec, value: object) -> torch.Tensor:
        """This rank's piece of a global value; a value that already has the piece's shape is taken as it is."""
        if isinstance(value, torch.Tensor) and tuple(value.shape) == port.shape and value.dtype == torch_dtype(port.dtype):
            return piece_of(value.detach(), port.layout, self.mesh, self.rank).to(self.device)
        return self._local(port, value, "input").detach().to(self.device)

    def _local(self, port: PortSpec, value: object, what: str) -> torch.Tensor:
        """``value`` if it has the shape and dtype of this rank's piece; InputError otherwise."""
        shape = local_shape(port.shape, port.layout, self.mesh, self.rank)
        if not isinstance(value, torch.Tensor):
            raise InputError(f"{what} {port}: expected a tensor, found {type(value).__name__}")
        if tuple(value.shape) != shape or value.dtype != torch_dtype(port.dtype):
            found = f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"
            raise InputError(
                f"{what} {port}: expected {port.dtype}{list(shape)} on rank {self.rank} ({', '.join(port.layout)} of "
                f"{list(port.shape)} on mesh {self.mesh}), found {found}"
            )
        return value

    def _run(self, ticket: AttachTicket, segment: int, fed: Sequence[torch.Tensor]) -> list[torch.Tensor | None]:
        handle = ticket.handle
        values = handle.executor.run(ticket.frame, handle.program.segments[segment].name, fed)
        results = list(values)
        updates = [(i, r.bound) for i, r in enumerate(handle.ports.results[segment]) if r.bound is not None]
        fresh = {i: _unshared(values[i], handle.bound) for i, _ in updates}
        with torch.no_grad():
            for i, bound in updates:
                value = fresh[i]
                if value is not None and bound is not None:
                    results[i] = handle.bound[bound].copy_(value)
        return results

    def wire(self) -> Wire:
        """The bytes this rank has sent and its collectives so far, by the formulas of ``communicator``."""
        return self._communicator.wire

    def _check_open(self) -> None:
        if self._closed:
            raise RunError("this engine is closed; make a new one on every rank")

    def close(self) -> None:
        """See ``Engine.close``. Leaves a process group that the user has initialised alone."""
        if self._closed:
            return
        self._closed = True
        if self._owns_group and dist.is_initialized():
            dist.destroy_process_group()

    def __enter__(self) -> AttachEngine:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None) -> None:
        if error is None:
            self.close()  # after an error the peers may be gone: taking the groups down would wait for them


_WORLDS = itertools.count(1)


def _meeting_place(place: Place) -> Store:
    """Where ranks find each other, with names of its own for every world that this process joins: what an earlier one has left in
    the store would send its ranks to sockets that are closed."""
    return PrefixStore(f"hocket-world-{next(_WORLDS)}", _store(place))


@functools.cache
def _store(place: Place) -> Store:
    """The launcher's store, or one that rank 0 serves for as long as its process lives."""
    url = "env://" if place.launcher == "torchrun" else f"tcp://{place.address}:{place.port}"
    store: Store = next(rendezvous(url, place.rank, place.world))[0]
    return store


def _unshared(value: torch.Tensor | None, bound: dict[int, torch.Tensor]) -> torch.Tensor | None:
    """A value that no other update can overwrite while updates are written one after the other."""
    if value is not None and any(value.untyped_storage().data_ptr() == b.untyped_storage().data_ptr() for b in bound.values()):
        return value.clone()
    return value


def _check_world(mesh: Mesh, world: int, launcher: str) -> None:
    if world == mesh.size:
        return
    found = f"{world} started by {launcher}" if launcher else "this process alone"
    raise InputError(
        f"mesh {mesh} needs {mesh.size} ranks, found {found}; run: torchrun --nproc-per-node {mesh.size} YOUR_SCRIPT.py "
        f"(or srun --ntasks {mesh.size}), or use engine='local'"
    )


def _device(device: str | None, place: Place) -> torch.device:
    kind = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if kind == "cpu":
        return torch.device("cpu")
    if torch.device(kind).type != "cuda":
        raise InputError(f"engine 'attach' runs on cpu or cuda, found {device!r}")
    found = torch.device("cuda", place.local_rank % max(torch.cuda.device_count(), 1))
    torch.cuda.set_device(found)
    return found
