"""One swap, found and priced but not yet made, and what both directions ask of a lowered graph."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.fx as fx

from ...compiler.cost.cluster import Cluster
from ...compiler.cost.ops import LocalTensor, work
from ...compiler.layout import Placement, Shard
from ...compiler.program import note, tensor_inputs

NAME = "swap-products"


@dataclass(frozen=True)
class Bill:
    """What something takes on a rank: seconds, and bytes that it sends."""

    seconds: float = 0.0
    sent: float = 0.0

    def __add__(self, other: Bill) -> Bill:
        return Bill(self.seconds + other.seconds, self.sent + other.sent)


@dataclass(frozen=True)
class Trade:
    """What a swap replaces and makes. before, after: what either takes, the part of a collective left out that independent work
    hides; text: in words; make: rewrites the graph in place."""

    before: Bill
    after: Bill
    text: str
    product: fx.Node
    make: Callable[[], None]

    @property
    def gain(self) -> float:
        """Seconds saved."""
        return self.before.seconds - self.after.seconds


@dataclass(frozen=True)
class Site:
    """Where a trade is looked for. number: of the axis in the mesh; exposed: by the name of a collective, what of it is not hidden
    anyway, for those of which that is known."""

    axis: str
    number: int
    parts: int
    cluster: Cluster
    exposed: dict[str, float]

    def left(self, collective: fx.Node, bill: Bill) -> Bill:
        """A collective of the program, as far as nothing hides it."""
        return Bill(min(bill.seconds, self.exposed.get(collective.name, bill.seconds)), bill.sent)


def placement_of(node: fx.Node, number: int) -> Placement | None:
    """How the only value of a node lies along an axis of the mesh; None where no pass has said."""
    layouts = note(node).layouts
    if layouts is None or len(layouts) != 1 or layouts[0] is None:
        return None
    return layouts[0][number]


def is_cut_elsewhere(node: fx.Node, number: int, dim: int) -> bool:
    """Whether another axis cuts the same dimension: then pieces of one axis lie in no row."""
    (layout,) = note(node).layouts or (None,)
    return any(isinstance(p, Shard) and p.dim == dim and i != number for i, p in enumerate(layout or ()))


def product_seconds(node: fx.Node, cluster: Cluster, shapes: Sequence[Sequence[int]], made: Sequence[int]) -> float:
    """Seconds of a product of other sizes."""
    size = node.meta["val"].element_size()
    inputs, outputs = [LocalTensor(tuple(s), size) for s in shapes], [LocalTensor(tuple(made), size)]
    done = work(node.target, inputs, outputs)
    return cluster.op_seconds(float(done.flops), float(done.bytes_moved), node.meta["val"].dtype)


def factor_shapes(node: fx.Node) -> list[list[int]]:
    """Sizes of what a product multiplies."""
    return [list(n.meta["val"].shape) for n in tensor_inputs(node)]


def nbytes_of(value: torch.Tensor) -> int:
    """Of a tensor that may be fake."""
    return value.numel() * value.element_size()
