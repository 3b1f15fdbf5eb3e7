"""What a node costs in time, and its results in memory: the figures by which the backward is split."""

from __future__ import annotations

import math
import operator
from dataclasses import dataclass

import torch
import torch.fx as fx

from ..compiler.cost.cluster import Cluster
from ..compiler.cost.ops import LocalTensor, Work, is_transposed, is_view, work
from ..compiler.program import tensor_inputs, tensor_leaves

aten = torch.ops.aten

VIEWLIKE = frozenset(
    {
        aten.split.Tensor,
        aten.split_with_sizes.default,
        aten.chunk.default,
        aten.unbind.int,
        aten.unsafe_split.Tensor,
        aten.unsafe_split_with_sizes.default,
        aten.unsafe_chunk.default,
    }
)
"""Views with several outputs."""


@dataclass(frozen=True)
class Costs:
    """Prices on one rank of a cluster."""

    cluster: Cluster

    def seconds(self, node: fx.Node) -> float:
        """Predicted time of one call; 0 for views, ``getitem`` and placeholders."""
        if node.op != "call_function":
            return 0.0
        done = work_of(node)
        if done.is_view or is_alias(node):
            return 0.0
        dtype = next((v.dtype for v in tensor_leaves(node.meta["val"]) if isinstance(v, torch.Tensor)), torch.float32)
        return self.cluster.op_seconds(float(done.flops), float(done.bytes_moved), dtype)

    def seconds_per_byte(self) -> float:
        """Time to read one byte: the price of memory is counted in such reads."""
        return 1.0 / self.cluster.memory_bandwidth


def work_of(node: fx.Node) -> Work:
    """Floating-point operations and traffic of one call on the shapes of its ``meta["val"]``."""
    inputs = [_local(source.meta["val"]) for source in tensor_inputs(node)]
    outputs = [_local(value) for value in tensor_leaves(node.meta["val"]) if isinstance(value, torch.Tensor)]
    return work(node.target, inputs, outputs, transposed=is_transposed(node.target, node.args))


def is_alias(node: fx.Node) -> bool:
    """Whether a node only describes memory that another node owns (a view, or an element of a view with several outputs)."""
    if node.op != "call_function":
        return False
    if node.target is operator.getitem:
        return is_alias(node.args[0])  # type: ignore[arg-type]
    return node.target in VIEWLIKE or is_view(node.target)


def stored_bytes(node: fx.Node) -> int:
    """Bytes of the results of a node, views included."""
    return sum(
        math.prod(value.shape) * value.dtype.itemsize
        for value in tensor_leaves(node.meta["val"])
        if isinstance(value, torch.Tensor)
    )


def _local(value: torch.Tensor) -> LocalTensor:
    return LocalTensor(tuple(int(size) for size in value.shape), value.dtype.itemsize)
