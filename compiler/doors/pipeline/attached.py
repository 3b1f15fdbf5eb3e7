"""A pipeline under a launcher: this process is one rank, keeps the parameters of its own stages, and compiles as all others do.

    settled by rank 0     costs of the cluster, rows of micro-batches, the schedule: what a clock or a file may decide otherwise
    the same everywhere   capture, plan, split, stages and proof, which every rank works out for itself; their result is compared
    this rank's own       parameters, buffers and optimizer state of its stages

Where a stage lives is settled by the first form of call: later ones (another batch, evaluation) keep every parameter where it is.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ....runtime.engines.attach import AttachEngine
from ....runtime.engines.attached import AttachedPipeline
from ....runtime.pieces import shard_dim
from ....runtime.schedule.stage import HELD, Port
from ...cost.cluster import Cluster
from ...errors import InputError
from ...program import RoleKind
from ..watch import state_of
from .compile import CompiledPipeline
from .request import emitted, held_layouts, parts_of, request_of, updated_ports


def open_attached(model: nn.Module, mesh: Any) -> AttachEngine:
    """This process as a rank of the mesh. InputError for a model that is not on the CPU, and for a world of another size."""
    devices = {tensor.device.type for tensor in (*model.parameters(), *model.buffers())}
    if devices - {"cpu"}:
        raise InputError(
            f"a pipeline under a launcher runs on CPU ranks, found a model on {', '.join(sorted(devices))}: messages that are "
            "posted ahead need tags, which nccl does not have; move the model to the CPU, or use a mesh without pp"
        )
    return AttachEngine(mesh, device="cpu")


@dataclass
class OwnStages:
    """The model's tensors on a rank that keeps those of its own stages.

    homes: parameter -> stages that read it, once the first form of call is compiled. The others become a single NaN (or zero)
    that looks like the whole tensor: whoever computes with one by mistake sees it, and its memory is free.
    """

    model: nn.Module
    engine: AttachEngine
    homes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    _elsewhere: list[tuple[Tensor, tuple[int, ...]]] = field(default_factory=list)
    _names: set[str] = field(default_factory=set)
    _updated_elsewhere: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        with torch.no_grad():
            for tensor in (*self.model.parameters(), *self.model.buffers()) if self.engine.mesh.size > 1 else ():
                whole = tensor.detach().contiguous()
                dist.broadcast(whole, 0)
                tensor.detach().copy_(whole)

    @contextmanager
    def whole(self) -> Iterator[None]:
        """While it is compiled the model has tensors of every shape; nobody reads those of other ranks, so they take no memory."""
        for tensor, stride in self._elsewhere:
            tensor.data = torch.empty_strided(tensor.shape, stride, dtype=tensor.dtype)
        try:
            yield
        finally:
            for tensor, _ in self._elsewhere:
                tensor.data = _stand_in(tensor)

    def settle(self, compiled: CompiledPipeline) -> set[str]:
        """Give up what only other ranks' stages hold, the first time. Returns the parameters that other ranks update."""
        if self.homes:
            return self._updated_elsewhere
        pipeline, placement = compiled.pipeline, compiled.schedule.placement
        rank = self.engine.mesh.coordinate(self.engine.rank)[compiled.order.tactic.axis]
        ranks: dict[str, set[int]] = {}
        stages: dict[str, set[int]] = {}
        updated: dict[str, int] = {}
        for part in parts_of(pipeline):
            for role in (*part.program.signature.inputs, *part.program.signature.outputs):
                if role.kind.value in HELD or role.kind is RoleKind.UPDATE:
                    ranks.setdefault(role.name, set()).add(placement[part.stage])
                    stages.setdefault(role.name, set()).add(part.stage)
                if role.kind is RoleKind.UPDATE:
                    updated[role.name] = placement[part.stage]
        named = {name: tensor for (_, name), tensor in state_of(self.model).items()}
        mine = {id(named[name]) for name, holders in ranks.items() if name in named and rank in holders}
        for name, tensor in named.items():
            homes = next((ranks[other] for other in named if named[other] is tensor and other in ranks), set())
            if homes and id(tensor) not in mine:
                self._names.add(name)
                if all(tensor is not known for known, _ in self._elsewhere):
                    self._elsewhere.append((tensor, tensor.stride()))
        self.homes = {name: tuple(sorted(found)) for name, found in stages.items() if name in named}
        for tensor, _ in self._elsewhere:
            tensor.data = _stand_in(tensor)
        self._updated_elsewhere = self._names | {name for name, owner in updated.items() if owner != rank}
        self._keep_checkpoints_to_what_is_here()
        return self._updated_elsewhere

    def _keep_checkpoints_to_what_is_here(self) -> None:
        """``state_dict`` has what this rank holds; ``load_state_dict`` takes that out of a whole one."""
        names = self._names

        def saved(_: nn.Module, state: dict[str, Any], prefix: str, __: object) -> None:
            for name in names:
                state.pop(prefix + name, None)

        def loading(_: nn.Module, state: dict[str, Any], prefix: str, *__: object) -> None:
            for name in names:
                state.pop(prefix + name, None)

        def loaded(_: nn.Module, keys: Any) -> None:
            ends = tuple(f".{name}" for name in names)  # where the model is part of another one
            keys.missing_keys[:] = [key for key in keys.missing_keys if key not in names and not key.endswith(ends)]

        self.model.register_state_dict_post_hook(saved)
        self.model.register_load_state_dict_pre_hook(loading)
        self.model.register_load_state_dict_post_hook(loaded)


def _stand_in(tensor: Tensor) -> Tensor:
    value = float("nan") if tensor.is_floating_point() else 0
    return torch.full((), value, dtype=tensor.dtype).expand(tensor.shape)


@dataclass(frozen=True)
class WorldAgreement:
    """See ``Agreement``."""

    own: OwnStages

    def settle(self, text: str) -> str:
        """The text of rank 0."""
        return self.own.engine.settle(text)

    @property
    def homes(self) -> Mapping[str, tuple[int, ...]]:
        """Parameter -> stages that read it; empty before the first form of call."""
        return self.own.homes

    def cluster(self) -> Cluster:
        """What rank 0 believes of its machine."""
        return Cluster.from_json(json.loads(self.settle(json.dumps(Cluster.current().to_json()))))


class AttachedRunner:
    """This rank's stages. Raises InputError where an axis beside the pipeline's cuts a parameter."""

    def __init__(self, compiled: CompiledPipeline, tensors: Mapping[Port, Tensor], engine: AttachEngine) -> None:
        programs = emitted(compiled)
        layouts = held_layouts(compiled, programs)
        check_whole(layouts, engine)
        rank = engine.mesh.coordinate(engine.rank)[compiled.order.tactic.axis]
        here = compiled.schedule.stages_of(rank)
        parts = [part for form in compiled.forms for part in parts_of(form.pipeline) if part.stage in here]
        read = {(role.kind.value, role.name) for part in parts for role in part.program.signature.inputs}
        made = {role.name for part in parts for role in part.program.signature.outputs if role.kind is RoleKind.UPDATE}
        constants = {Port("constant", name): value.clone() for name, value in compiled.captured.constants.items()}
        everything = {**tensors, **constants}
        ports = [port for port in everything if tuple(port) in read or (port.name in made and port.kind in HELD)]
        bound = {port: everything[port].detach() for port in ports}
        updated = updated_ports(compiled)
        self._updated = [everything[port] for port in ports if port.name in updated]
        self._seeds = compiled.captured.signature.inputs_of(RoleKind.SEED)
        self._pipeline = AttachedPipeline(engine, request_of(compiled, programs), bound)

    def step(self, given: Sequence[Mapping[str, Tensor]]) -> list[dict[str, Tensor]]:
        """See ``Runner``. Random numbers are those of rank 0."""
        if self._seeds:
            names = [(m, name) for m in range(len(given)) for name in self._seeds]
            drawn = torch.stack([given[m][name] for m, name in names])
            dist.broadcast(drawn, 0)
            rows = [dict(row) for row in given]
            for (m, name), seed in zip(names, drawn, strict=True):
                rows[m][name] = seed
            given = rows
        with torch.no_grad():
            outputs = self._pipeline.step(given)
        torch.autograd.graph.increment_version(self._updated)
        return [{name: value.clone() for name, value in output.items()} for output in outputs]

    def gradients(self) -> dict[str, Tensor]:
        """See ``Runner``: of the parameters of this rank's stages."""
        return self._pipeline.gradients

    def close(self) -> None:
        """Nothing is left behind: all memory is this process's own."""


def check_whole(layouts: Mapping[Port, Sequence[str]], engine: AttachEngine) -> None:
    """InputError where an axis beside the pipeline's cuts what a stage holds."""
    for port, layout in layouts.items():
        if any(shard_dim(placement) is not None for placement in layout):
            raise InputError(
                f"{port.kind} {port.name} is cut ({', '.join(layout)}) on mesh {engine.mesh}: under a launcher a stage may have "
                "replicas (dp), but no pieces of weights or of optimizer state; use engine='local', or a mesh of pp and dp"
            )
