"""What a person asks of a pipeline, and what it is to be compiled for."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import nn
from torch.optim import Optimizer

from ....passes.backward_split import BackwardSplit
from ....runtime.inner import mesh_without
from ....runtime.mesh import Mesh
from ...contract import Pass
from ...cost.cluster import Cluster
from ...errors import InputError
from ...plan.pipeline.forms import NAMES
from ...plan.tactics import Auto, DataParallel, RewriteTactic, Tactic, TensorParallel, Zero
from ..overlap import OverlapTiles

AXIS = "pp"

BY_NAME: dict[str, type[Tactic]] = {"dp": DataParallel, "tp": TensorParallel}
"""What an axis beside the pipeline's does where no tactic says so."""


@dataclass(frozen=True)
class PipelineParallel(RewriteTactic):
    """Stages of the model on the ranks of one mesh axis, fed with micro-batches.

    axis: of the mesh. microbatches: how many a batch is cut into, the rows of each (``[5, 4, 4, 3]``), or "auto" for what the
    simulator prefers. schedule: "auto" searches for one that suits the predicted costs, or the name of a known one ("gpipe",
    "1f1b", "1f1b-2bp", "zb-h1", ...). pieces: into how many parts a stage's weight gradients are cut, at most; more of them fill
    smaller gaps. memory: most bytes of activations a rank may hold ("8GB"), None for no limit. loss: from the model's result to a
    scalar, None where the model returns the loss itself. reduction: "mean" where the loss of a batch is the mean of those of its
    rows, else "sum". split: options of the backward split. joined: the weight gradients of so many micro-batches are made by one
    product over all their rows (1: one product for each, added up in their order); their sums are then rounded otherwise, within a
    bound that ``explain("join-micro-batches")`` states, and their factors are kept until the last of them. buckets: sum the
    small gradients of a stage over its replicas by one collective.
    """

    axis: str = AXIS
    microbatches: int | str | Sequence[int] = "auto"
    schedule: str = "auto"
    pieces: int = 1
    memory: int | str | None = None
    loss: Callable[[Any], torch.Tensor] | None = None
    reduction: str = "mean"
    split: BackwardSplit = field(default_factory=BackwardSplit)
    joined: int = 1
    buckets: bool = True

    def __post_init__(self) -> None:
        check_microbatches(self.microbatches)
        if isinstance(self.microbatches, list):
            object.__setattr__(self, "microbatches", tuple(self.microbatches))
        if self.schedule != "auto" and self.schedule not in NAMES:
            raise InputError(f'schedule must be "auto" or one of {", ".join(NAMES)}; found {self.schedule!r}')
        if self.pieces < 1:
            raise InputError(f"pieces must be a positive number; found {self.pieces}")
        if type(self.joined) is not int or self.joined < 1:
            raise InputError(
                f"joined is the number of micro-batches whose products are made together, 1 for none; found {self.joined!r}"
            )
        if self.reduction not in ("mean", "sum"):
            raise InputError(f'reduction must be "mean" or "sum"; found {self.reduction!r}')
        parse_bytes(self.memory)


def check_microbatches(wanted: object) -> None:
    """InputError unless it is "auto", a positive number, or positive numbers of rows."""
    if wanted == "auto":
        return
    counts = [wanted] if isinstance(wanted, int) else wanted
    fine = isinstance(counts, list | tuple) and counts and all(type(n) is int and n > 0 for n in counts)
    if not fine:
        raise InputError(
            f'microbatches must be "auto", a positive number, or the rows of each such as [5, 4, 4, 3]; found {wanted!r}'
        )


class Agreement(Protocol):
    """How ranks that compile for themselves come to one result."""

    def settle(self, text: str) -> str:
        """The text of rank 0."""
        ...

    def cluster(self) -> Cluster:
        """What rank 0 believes of its machine."""
        ...

    @property
    def homes(self) -> Mapping[str, tuple[int, ...]]:
        """Parameter -> stages that read it, as the first form of call has settled it; empty before."""
        ...


@dataclass(frozen=True)
class PipelineOrder:
    """What to compile.

    mesh: all axes; placing: tactics of the axes beside the pipeline's; level: how much to prove; optimizer: to run on the stages,
    None where the caller steps it; clip_norm: see ``capture_step``; agreement: where every rank compiles for itself; overlap: tile
    loops in stages that several ranks run; rewrites: of a whole step, before it is planned and cut.
    """

    model: nn.Module
    mesh: Mesh
    tactic: PipelineParallel
    placing: tuple[Tactic, ...] = ()
    level: str | None = None
    optimizer: Optimizer | None = None
    clip_norm: float | None = None
    agreement: Agreement | None = None
    overlap: OverlapTiles | None = None
    rewrites: tuple[Pass, ...] = ()

    @property
    def ranks(self) -> int:
        """Ranks of the pipeline: those of its axis."""
        return self.mesh.axis_size(self.tactic.axis)

    @property
    def inner(self) -> Mesh | None:
        """The other axes: the ranks of one stage. None where there are none."""
        return mesh_without(self.mesh, self.tactic.axis)

    @property
    def replicas(self) -> int:
        """Into how many parts the rows of a micro-batch are cut, as far as tactics say so."""
        return math.prod(self.mesh.axis_size(t.axis) for t in self.placing if isinstance(t, DataParallel | Zero))


def pipeline_order(
    model: nn.Module, mesh: Mesh, tactics: Sequence[Tactic | RewriteTactic] | str, level: str | None = None
) -> PipelineOrder | None:
    """What the mesh and the tactics ask of a pipeline; None where they ask for none.

    InputError for two pipelines, for an axis that the mesh lacks, and for rewrites beside it.
    """
    given = () if isinstance(tactics, str) else tuple(tactics)
    asked = [tactic for tactic in given if isinstance(tactic, PipelineParallel)]
    if not asked and AXIS not in mesh.names:
        return None
    if len(asked) > 1:
        raise InputError(f"expected one PipelineParallel, found {len(asked)}")
    chosen = asked[0] if asked else PipelineParallel()
    if chosen.axis not in mesh.names:
        raise InputError(f"PipelineParallel is for the axis {chosen.axis!r}, which mesh {mesh} does not have")
    overlap = next((tactic for tactic in given if isinstance(tactic, OverlapTiles)), None)
    others = [tactic for tactic in given if isinstance(tactic, RewriteTactic) and tactic not in (chosen, overlap)]
    refused = [type(tactic).__name__ for tactic in others if not tactic.in_pipelines]
    if refused:
        raise InputError(f"a pipeline takes no {refused[0]} beside it; options of PipelineParallel say how the backward is split")
    placing = {tactic.axis: tactic for tactic in given if isinstance(tactic, Tactic)}
    for axis in placing:
        if axis not in mesh.names or axis == chosen.axis:
            raise InputError(f"{placing[axis]!r} is for an axis {axis!r} beside the pipeline's, which mesh {mesh} does not have")
    for axis in mesh.names:
        if axis != chosen.axis and axis not in placing:
            placing[axis] = BY_NAME.get(axis, Auto)(axis)
    rewrites = tuple(one for tactic in others for one in tactic.rewrites_before())
    return PipelineOrder(model, mesh, chosen, tuple(placing.values()), level, overlap=overlap, rewrites=rewrites)


def parse_bytes(text: int | str | None) -> int | None:
    """``"8GB"`` or ``"500 MB"`` as bytes. InputError for what is no size."""
    if text is None or isinstance(text, int):
        return text
    units = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
    number = text.strip().rstrip("KMGTIBkmgtib ")
    unit = text.strip()[len(number) :].strip().upper() or "B"
    try:
        return int(float(number) * units[unit])
    except (ValueError, KeyError):
        raise InputError(f'memory must be a number of bytes or a size such as "8GB"; found {text!r}') from None
