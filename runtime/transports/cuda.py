"""The transport of ranks with CUDA devices that see each other's memory: torch's symmetric memory, over NVLink or on one device.

    buffer   symm_mem.empty, symm_mem.rendezvous: a peer's copy is a tensor of this process        put = copy_ into it
    signal   stream_write_value32: a 32-bit store, after everything before it on the stream, visible to the whole system
    wait     the host reads the word on a stream of its own, until it has grown

Everything that torch's API is asked for stands in ``TorchSymmetricMemory``; the rest is the same for any memory that ranks share
and is tested with such memory on the CPU. On devices this has not been run yet. Two ranks may share one device where
``TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES=1`` is set and the process group is gloo's, since NCCL refuses that.

A wait holds the host, not the stream: what a rank launches after it finds the data there.
"""

from __future__ import annotations

import importlib.util
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist

from ..errors import InputError
from ..mesh import Mesh
from .buffers import SharedBuffer, ThroughViews, checked_slot
from .gloo import GlooTransfer
from .transport import SLOTS, Capability, LinkCost, Symmetric, TransportError, TransportTimeout

_BARRIER, _WORDS = SLOTS, SLOTS + 2
_COST = LinkCost(1.5e-5, 1 / 2e11)
_FIRST_TAG = 1 << 21
_NEEDED = ("empty", "rendezvous")


def why_unavailable() -> str:
    """In words, for a person; "" where this torch and a device can share memory between ranks."""
    if not torch.cuda.is_available():
        return "torch finds no CUDA device here"
    if importlib.util.find_spec("torch.distributed._symmetric_memory") is None:
        return f"torch {torch.__version__} has no symmetric memory"
    import torch.distributed._symmetric_memory as memory

    missing = [name for name in _NEEDED if not hasattr(memory, name)]
    if not hasattr(getattr(memory, "_SymmetricMemory", None), "stream_write_value32"):
        missing.append("stream_write_value32")
    return f"the symmetric memory of torch {torch.__version__} lacks {', '.join(missing)}" if missing else ""


class SymmetricMemory(Protocol):
    """Memory of which every rank of a group has a copy."""

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """This rank's copy."""
        ...

    def meet(self, own: torch.Tensor, group: Any) -> Sequence[torch.Tensor]:
        """The copies of all ranks, by index, once all have come with theirs."""
        ...

    def write(self, words: torch.Tensor, place: int, value: int) -> None:
        """Set a word (int32), after everything that this rank has written so far."""
        ...

    def read(self, words: torch.Tensor, place: int) -> int:
        """The word as it is now; what its writer had written before is seen by whatever this rank starts afterwards."""
        ...


class TorchSymmetricMemory:
    """See ``SymmetricMemory``. Raises InputError where ``why_unavailable`` has a reason."""

    def __init__(self, device: torch.device) -> None:
        reason = why_unavailable()
        if reason:
            raise InputError(f"expected CUDA devices that share memory: {reason}")
        import torch.distributed._symmetric_memory as memory

        self._memory: Any = memory
        self._device = device
        self._watch = torch.cuda.Stream(device)

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """See ``SymmetricMemory``."""
        made: torch.Tensor = self._memory.empty(shape, dtype=dtype, device=self._device)
        return made

    def meet(self, own: torch.Tensor, group: Any) -> Sequence[torch.Tensor]:
        """See ``SymmetricMemory``."""
        handle = self._memory.rendezvous(own, group)
        return [handle.get_buffer(peer, list(own.shape), own.dtype) for peer in range(handle.world_size)]

    def write(self, words: torch.Tensor, place: int, value: int) -> None:
        """See ``SymmetricMemory``."""
        self._memory._SymmetricMemory.stream_write_value32(words, place, value)

    def read(self, words: torch.Tensor, place: int) -> int:
        """See ``SymmetricMemory``."""
        with torch.cuda.stream(self._watch):
            return int(words[place].item())


@dataclass
class CudaTransfer(GlooTransfer):
    """See ``Transfer``. staging: what the process group moves; it lies on the host where the group is gloo's."""

    staging: torch.Tensor

    def wait(self, timeout: float | None = None) -> torch.Tensor:
        """See ``Transfer``."""
        super().wait(timeout)
        return self.tensor if self.staging is self.tensor else self.tensor.copy_(self.staging)


@dataclass
class _Group:
    """An axis: its process group, members as ranks of the mesh, the own index, all ranks' words, and how often ranks met."""

    group: Any
    members: tuple[int, ...]
    own: int
    words: Sequence[torch.Tensor]
    barriers: int = 0


class CudaTransport(ThroughViews):
    """See ``Transport``. groups: per axis of the mesh, the process group of this rank and its members as ranks; memory: where
    buffers lie, by default that of the current device. All ranks make it at the same time; they meet."""

    capabilities = frozenset({Capability.REMOTE_VIEW, Capability.ASYNC_PROGRESS})

    def __init__(
        self,
        mesh: Mesh,
        rank: int,
        groups: dict[str, tuple[Any, tuple[int, ...]]],
        timeout: float,
        memory: SymmetricMemory | None = None,
    ) -> None:
        if memory is None:
            reason = why_unavailable()
            if reason:
                raise InputError(f"expected CUDA devices that share memory: {reason}")
            memory = TorchSymmetricMemory(torch.device("cuda", torch.cuda.current_device()))
        self.mesh, self.rank, self.default_timeout = mesh, rank, timeout
        self._memory = memory
        self._groups = {axis: self._joined(group, members) for axis, (group, members) in groups.items()}

    def _joined(self, group: Any, members: tuple[int, ...]) -> _Group:
        words = self._memory.empty((len(members) * _WORDS,), torch.int32).zero_()
        found = self._memory.meet(words, group)
        dist.barrier(group)  # no signal before all words are zero
        return _Group(group, members, members.index(self.rank), found)

    # --- buffers

    def symmetric(self, name: str, shape: tuple[int, ...], dtype: torch.dtype, axis: str) -> SharedBuffer:
        """See ``Transport``."""
        group = self._groups[axis]
        self.barrier(axis)  # with a time limit; the calls below have none of their own
        specs: list[Any] = [None] * len(group.members)
        dist.all_gather_object(specs, f"{name!r} of {dtype}{list(shape)}", group.group)
        for member, spec in zip(group.members, specs, strict=True):
            if spec != specs[group.own]:
                raise TransportError(
                    f"rank {member} makes another buffer than rank {self.rank}: {spec} there, {specs[group.own]} here"
                )
        try:
            own = self._memory.empty((max(1, math.prod(shape)),), dtype).zero_()
            copies = self._memory.meet(own, group.group)
        except RuntimeError as error:
            raise TransportError(f"rank {self.rank}: no symmetric memory for buffer {specs[group.own]}: {error}") from error
        views = tuple(copy[: math.prod(shape)].view(shape) for copy in copies)
        self.barrier(axis)
        return SharedBuffer(name, tuple(shape), dtype, axis, group.own, views)

    def release(self, buffer: Symmetric) -> None:
        """See ``Transport``."""
        assert isinstance(buffer, SharedBuffer)
        self.barrier(buffer.axis)
        buffer.tensors = ()

    # --- signals

    def signal(self, peer: int, slot: int, value: int, axis: str, nbytes: int = 0) -> None:  # noqa: ARG002  (takes no time of its own)
        """See ``Transport``."""
        if value >= 1 << 31:
            raise TransportError(f"expected a signal of 31 bits, found {value} in slot {slot} of axis {axis!r}")
        self._signal(self._groups[axis], peer, checked_slot(slot), value)

    def _signal(self, group: _Group, peer: int, slot: int, value: int) -> None:
        self._memory.write(group.words[peer], group.own * _WORDS + slot, value)

    def _word(self, group: _Group, peer: int, slot: int) -> int:
        return self._memory.read(group.words[group.own], peer * _WORDS + slot)

    def test(self, peer: int, slot: int, value: int, axis: str) -> bool:
        """See ``Transport``."""
        return self._word(self._groups[axis], peer, checked_slot(slot)) >= value

    def wait(self, peer: int, slot: int, value: int, axis: str, timeout: float | None = None) -> None:
        """See ``Transport``."""
        group = self._groups[axis]
        what = f"to signal {value} in slot {slot} of axis {axis!r}"
        self._until(group, peer, lambda: self._word(group, peer, checked_slot(slot)) >= value, timeout, what)

    def barrier(self, axis: str, timeout: float | None = None) -> None:
        """See ``Transport``."""
        group = self._groups[axis]
        group.barriers += 1
        epoch = group.barriers
        for peer in range(len(group.members)):
            self._signal(group, peer, _BARRIER, epoch)
        for peer in range(len(group.members)):
            here = lambda peer=peer: self._word(group, peer, _BARRIER) >= epoch  # noqa: E731
            self._until(group, peer, here, timeout, f"at a barrier of axis {axis!r}")

    def _until(self, group: _Group, peer: int, is_done: Callable[[], bool], timeout: float | None, what: str) -> None:
        limit = self.default_timeout if timeout is None else timeout
        start = time.monotonic()
        while not is_done():
            if time.monotonic() - start > limit:
                raise TransportTimeout(f"rank {self.rank} waited {limit:g} s for rank {group.members[peer]} {what}")
            time.sleep(0)

    # --- messages

    def isend(self, tensor: torch.Tensor, peer: int, tag: int, axis: str) -> CudaTransfer:
        """See ``Transport``."""
        group = self._groups[axis]
        staging = tensor.contiguous() if self._moves_on_device(group) else tensor.contiguous().cpu()
        work = dist.isend(staging, group.members[peer], group.group, _FIRST_TAG + tag)
        return CudaTransfer(work, staging, self.default_timeout, f"rank {group.members[peer]} to take message {tag}", staging)

    def irecv(self, out: torch.Tensor, peer: int, tag: int, axis: str) -> CudaTransfer:
        """See ``Transport``. ``out`` must be contiguous."""
        group = self._groups[axis]
        staging = out if self._moves_on_device(group) else torch.empty_like(out, device="cpu")
        work = dist.irecv(staging, group.members[peer], group.group, _FIRST_TAG + tag)
        return CudaTransfer(work, out, self.default_timeout, f"rank {group.members[peer]} to send message {tag}", staging)

    def _moves_on_device(self, group: _Group) -> bool:
        return bool(dist.get_backend(group.group) == "nccl")

    # --- the rest

    def cost(self, axis: str) -> LinkCost:  # noqa: ARG002
        """See ``Transport``."""
        return _COST

    def close(self) -> None:
        """See ``Transport``. The memory lives as long as tensors of its buffers do."""
        self._groups.clear()
