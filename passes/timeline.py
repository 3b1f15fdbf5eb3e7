"""What a lowered program takes on one rank, node by node, when collectives travel while the rank computes.

    clock       the rank computes one op after the other
    link        one per mesh axis: collectives travel one after the other, each from when it is issued and its link is free
    wait        the rank stands still until the collective has arrived; that time is *exposed*

Prices are those of planning: a roofline per op, a line alpha + beta * bytes per collective (``compiler.cost.cluster``).
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.fx as fx

from ..compiler.cost.cluster import Cluster
from ..compiler.cost.ops import LocalTensor, is_transposed, is_view, work
from ..compiler.program import Program, producer, tensor_inputs, tensor_leaves
from ..compiler.redistribute import StepKind

c10d = torch.ops._c10d_functional

KINDS: dict[Any, StepKind] = {
    c10d.all_reduce.default: StepKind.ALL_REDUCE,
    c10d.all_gather_into_tensor.default: StepKind.ALL_GATHER,
    c10d.reduce_scatter_tensor.default: StepKind.REDUCE_SCATTER,
    c10d.all_to_all_single.default: StepKind.ALL_TO_ALL,
}
WAIT = c10d.wait_tensor.default


def is_collective(node: fx.Node) -> bool:
    """Whether a node starts an exchange between ranks (a wait only ends one)."""
    return getattr(node.target, "namespace", "") == "_c10d_functional" and node.target is not WAIT


def axis_of(node: fx.Node) -> str:
    """The mesh axis of a collective."""
    return str(node.args[-1])


@dataclass(frozen=True)
class Timing:
    """One order of a program: its length in seconds, exposed seconds per collective, and the most bytes of values held at once."""

    seconds: float
    exposed: dict[str, float]
    peak_bytes: int


@dataclass
class Timeline:
    """Prices of the nodes of one program, each computed once.

    contention: part of a collective's time that the computing thread loses while it travels (0 where something else moves the
    bytes, 1 where one core does both).
    """

    program: Program
    cluster: Cluster
    contention: float = 0.0
    compute: dict[fx.Node, float] = field(init=False, default_factory=dict)
    wire: dict[fx.Node, float] = field(init=False, default_factory=dict)
    size: dict[fx.Node, int] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        self._owner: dict[fx.Node, fx.Node] = {}
        for node in self.program.nodes:
            if node.op != "call_function":
                continue
            self.compute[node] = self._seconds(node)
            if is_collective(node):
                self.wire[node] = self._wire_seconds(node)
            self.size[node] = sum(_nbytes(leaf) for leaf in tensor_leaves(node.meta["val"])) if self._owns(node) else 0
        self._results = {producer(node)[0] for node in self.program.results if node is not None}

    def _owns(self, node: fx.Node) -> bool:
        """Whether a node makes new memory; a view, a getitem or a wait shares that of its input."""
        source = next(iter(node.all_input_nodes), None)
        shares = (is_view(node.target) or node.target is WAIT or node.target is operator.getitem) and source is not None
        self._owner[node] = self._owner.get(source, source) if shares and source is not None else node
        return not shares

    def _seconds(self, node: fx.Node) -> float:
        if is_collective(node) or node.target is WAIT:
            return self.cluster.op_overhead
        tensors = tensor_inputs(node)
        outputs = [leaf for leaf in tensor_leaves(node.meta["val"]) if isinstance(leaf, torch.Tensor)]
        if not tensors and not outputs:
            return 0.0
        done = work(node.target, [_local(n.meta["val"]) for n in tensors], [_local(v) for v in outputs],
                    transposed=is_transposed(node.target, node.args))  # fmt: skip
        if done.is_view:
            return self.cluster.op_overhead / 4
        dtype = (outputs or [tensors[0].meta["val"]])[0].dtype
        return self.cluster.op_seconds(float(done.flops), float(done.bytes_moved), dtype)

    def _wire_seconds(self, node: fx.Node) -> float:
        mesh = self.program.mesh
        assert mesh is not None
        kind, axis = KINDS.get(node.target), axis_of(node)
        parts, nbytes = mesh.axis_size(axis), _nbytes(tensor_inputs(node)[0].meta["val"])
        match kind:
            case StepKind.ALL_GATHER:
                sent = float((parts - 1) * nbytes)
            case StepKind.ALL_REDUCE:
                sent = 2 * (parts - 1) / parts * nbytes
            case _:
                sent = (parts - 1) / parts * nbytes
        return self.cluster.line(kind or StepKind.ALL_TO_ALL, axis).seconds(sent, parts)

    def run(self, order: Sequence[fx.Node]) -> Timing:
        """The timing of the calls of the program in this order."""
        clock = 0.0
        link: dict[str, float] = {}
        arrival: dict[fx.Node, float] = {}
        exposed: dict[str, float] = {}
        for node in order:
            clock += self.compute[node]
            if node in self.wire:
                axis = axis_of(node)
                link[axis] = arrival[node] = max(clock, link.get(axis, 0.0)) + self.wire[node]
                clock += self.contention * self.wire[node]
                exposed[node.name] = self.wire[node]
            elif node.target is WAIT:
                source = node.all_input_nodes[0]
                late = max(0.0, arrival.get(source, 0.0) - clock)
                exposed[source.name] = late
                clock += late
        return Timing(clock, exposed, self.peak_bytes(order))

    def peak_bytes(self, order: Sequence[fx.Node]) -> int:
        """Most bytes of computed values that are alive at once (inputs are the caller's)."""
        held = peak = 0
        left = self.readers(order)
        for node in order:
            held += self.size[node]
            peak = max(peak, held)
            held -= self.freed(node, left)
        return peak

    def readers(self, order: Iterable[fx.Node]) -> dict[fx.Node, int]:
        """How many reads of each piece of memory are still to come; results are read once more by the caller."""
        left: dict[fx.Node, int] = {}
        for node in order:
            left.setdefault(self._owner[node], 0)
            for source in node.all_input_nodes:
                owner = self._owner.get(source, source)
                left[owner] = left.get(owner, 0) + 1
        for node in self._results:
            owner = self._owner.get(node, node)
            left[owner] = left.get(owner, 0) + 1
        return left

    def freed(self, node: fx.Node, left: dict[fx.Node, int]) -> int:
        """Bytes that nobody needs once ``node`` has run; counts down ``left``."""
        total = 0
        for source in node.all_input_nodes:
            owner = self._owner.get(source, source)
            left[owner] -= 1
            if not left[owner]:
                total += self.size.get(owner, 0)
        if not left[self._owner[node]]:
            total += self.size[node]
        return total


def _local(value: torch.Tensor) -> LocalTensor:
    return LocalTensor(tuple(value.shape), value.element_size())


def _nbytes(value: object) -> int:
    return value.numel() * value.element_size() if isinstance(value, torch.Tensor) else 0
