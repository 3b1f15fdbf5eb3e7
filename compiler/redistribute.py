"""From one layout to another: the collectives, in order, and the bytes each puts on the wire.

Planning prices these steps and lowering emits them, so that the bytes predicted are the bytes sent.

    S(i) -> R      all_gather        P -> R      all_reduce
    S(i) -> S(j)   all_to_all        P -> S(i)   reduce_scatter        R -> S(i)   slice (local)

Shards of one dimension over several axes nest left to right (DTensor's order), so an inner piece must be whole again before an
outer cut of the same dimension can change. ``steps`` first leaves the old cuts, innermost axis first, then makes the new ones,
outermost first.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Sequence
from dataclasses import dataclass

from ..runtime.mesh import Mesh
from .errors import HocketError
from .layout import Layout, Partial, Placement, Replicate, Shard, chunk_size, format_layout, format_placement, local_shape


class StepKind(enum.StrEnum):
    """What one step does along its axis."""

    SLICE = "slice"
    ALL_GATHER = "all_gather"
    ALL_REDUCE = "all_reduce"
    REDUCE_SCATTER = "reduce_scatter"
    ALL_TO_ALL = "all_to_all"


@dataclass(frozen=True)
class Step:
    """One change along one mesh axis. before: the layout it starts from, after: the one it makes (all axes)."""

    kind: StepKind
    axis: int
    before: Layout
    after: Layout

    @property
    def source(self) -> Placement:
        """Placement along the axis before the step."""
        return self.before[self.axis]

    @property
    def target(self) -> Placement:
        """Placement along the axis after the step."""
        return self.after[self.axis]

    def __str__(self) -> str:
        return f"{self.kind}[axis {self.axis}: {format_placement(self.source)} -> {format_placement(self.target)}]"


def is_reachable(source: Layout, target: Layout) -> bool:
    """False where the target is partial on an axis and the source is not partial the same way: no step makes a partial value."""
    return all(not isinstance(t, Partial) or s == t for s, t in zip(source, target, strict=True))


def steps(source: Layout, target: Layout) -> tuple[Step, ...]:
    """The steps from ``source`` to ``target`` (empty when equal). Raises HocketError if the target is not reachable."""
    if not is_reachable(source, target):
        raise HocketError(
            f"no collective leads from {format_layout(source)} to {format_layout(target)}: nothing makes a partial sum"
        )
    found: list[Step] = []
    current = list(source)

    def go(axis: int, placement: Placement) -> None:
        if current[axis] != placement:
            before = tuple(current)
            kind = _kind(current[axis], placement)
            current[axis] = placement
            found.append(Step(kind, axis, before, tuple(current)))

    blocked = _nested_under_a_change(source, target)
    for axis in reversed(range(len(source))):
        if axis in blocked:
            go(axis, Replicate())
        elif not isinstance(source[axis], Replicate):
            go(axis, target[axis])
    for axis in range(len(source)):
        go(axis, target[axis])
    return tuple(found)


def _nested_under_a_change(source: Layout, target: Layout) -> set[int]:
    """Inner axes whose cut, old or new, nests inside an outer axis that changes its cut of the same dimension."""
    blocked = set()
    for inner in range(len(source)):
        dims = _dims(source[inner], target[inner])
        if any(source[outer] != target[outer] and _dims(source[outer], target[outer]) & dims for outer in range(inner)):
            blocked.add(inner)
    return blocked


def _dims(*placements: Placement) -> set[int]:
    return {p.dim for p in placements if isinstance(p, Shard)}


def _kind(source: Placement, target: Placement) -> StepKind:
    match source, target:
        case Replicate(), Shard():
            return StepKind.SLICE
        case Shard(), Replicate():
            return StepKind.ALL_GATHER
        case Shard(), Shard():
            return StepKind.ALL_TO_ALL
        case Partial(), Replicate():
            return StepKind.ALL_REDUCE
        case Partial(), Shard():
            return StepKind.REDUCE_SCATTER
    raise HocketError(f"no single collective leads from {format_placement(source)} to {format_placement(target)}")


def wire_bytes(step: Step, shape: Sequence[int], itemsize: int, mesh: Mesh) -> float:
    """Bytes that one rank sends in a step, for a tensor of global ``shape``.

    With p ranks on the axis, n the bytes of the local tensor when it is cut with ceiling chunks (uneven pieces are padded on the
    wire):  all_gather (p-1) n_in;  reduce_scatter (p-1) n_out;  all_reduce 2 (p-1)/p n;  all_to_all (p-1)/p n of the piece with
    both dimensions padded;  slice 0.
    """
    parts = mesh.shape[step.axis]
    without = list(step.before)
    without[step.axis] = Replicate()
    whole = list(local_shape(shape, tuple(without), mesh))  # rank 0 holds the largest piece of every other axis
    if step.kind is StepKind.SLICE:
        return 0.0
    if step.kind is StepKind.ALL_REDUCE:
        return 2 * (parts - 1) / parts * math.prod(whole) * itemsize
    for placement in (step.source, step.target):
        if isinstance(placement, Shard):
            whole[placement.dim] = chunk_size(whole[placement.dim], parts) * parts
    piece = math.prod(whole) // parts
    return (parts - 1) / parts * piece * itemsize if step.kind is StepKind.ALL_TO_ALL else (parts - 1) * float(piece * itemsize)
