"""The nodes that carry a value from one layout to another, one step along one mesh axis at a time.

    all_gather      S(d) -> R       every rank sends its chunk to all others
    all_reduce      P    -> R       the sum (mean, max, min) of all ranks' values
    reduce_scatter  P    -> S(d)    chunk k of the sum to rank k
    all_to_all      S(i) -> S(j)    chunk (k of i, l of j) from rank k to rank l
    slice           R    -> S(d)    every rank keeps its own chunk, nothing is sent

The functional collectives of torch work on dimension 0 of contiguous tensors of the same size on every rank. Other dimensions are
brought there by one permuting copy, ``[.., p * c, ..] <-> [p, .., c, ..]`` with p ranks and chunk c; uneven chunks are padded to
the longest, ``ceil(n / p)``, and cut back afterwards. ``compiler.redistribute.wire_bytes`` prices exactly what is emitted here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.fx as fx

from ..compiler.layout import Partial, Shard
from ..compiler.redistribute import Step, StepKind
from .local_graph import LocalGraph, Size

aten = torch.ops.aten
c10d = torch.ops._c10d_functional


def emit_step(graph: LocalGraph, step: Step, value: fx.Node, shape: Sequence[int], name: str) -> fx.Node:
    """Append one step: from the node that holds ``step.before`` to the one that holds ``step.after``.

    shape: global; name: what to call the node that does the work. On an axis of one rank every layout is the same piece: an alias.

    The result is contiguous: some kernels (attention and the backward of layer norm on CPU) silently compute something else on
    pieces whose strides their operands never have in an ordinary program.
    """
    if graph.mesh.shape[step.axis] == 1:
        return graph.call(aten.alias.default, (value,), value.meta["val"], name)
    if step.kind is StepKind.SLICE:
        return graph.contiguous(_slice(graph, step, value, shape, name))
    is_complex = value.meta["val"].is_complex()
    if is_complex:  # collectives know no complex numbers: send pairs of reals
        val = value.meta["val"]
        pairs = torch.empty(0, dtype=val.dtype.to_real(), device="meta")
        value = graph.call(aten.view_as_real.default, (value,), _with_dtype(graph, value, pairs.dtype, [*val.shape, 2]))
        shape = [*shape, 2]
    result = _COLLECTIVES[step.kind](graph, step, value, shape, name)
    if result.target not in (c10d.wait_tensor.default, aten.squeeze.dim):
        result = graph.contiguous(result)
    if is_complex:
        local = list(result.meta["val"].shape)[:-1]
        result = graph.call(aten.view_as_complex.default, (result,), _with_dtype(graph, result, val.dtype, local))
    return result


def _with_dtype(graph: LocalGraph, node: fx.Node, dtype: torch.dtype, shape: Sequence[int]) -> torch.Tensor:
    like = graph.packed(node, shape)
    return graph.fake(like.to(dtype), like.shape, like.stride())


def _slice(graph: LocalGraph, step: Step, value: fx.Node, shape: Sequence[int], name: str) -> fx.Node:
    dim = _dim(step.target)
    total = graph.sizes(shape, step.before)[dim]
    return graph.narrow(value, dim, graph.offset(total, step.axis), graph.length(total, step.axis), name)


def _all_reduce(graph: LocalGraph, step: Step, value: fx.Node, _: Sequence[int], name: str) -> fx.Node:
    local = list(value.meta["val"].shape)
    return _send(graph, c10d.all_reduce.default, (value, _operator(step), graph.mesh.names[step.axis]), local, name)


def _all_gather(graph: LocalGraph, step: Step, value: fx.Node, shape: Sequence[int], name: str) -> fx.Node:
    axis, parts = graph.mesh.axes[step.axis]
    dim = _dim(step.source)
    sizes, total = list(graph.sizes(shape, step.before)), graph.sizes(shape, step.after)[dim]
    chunk, padded = graph.longest(total, parts), graph.padded(total, parts)
    value = graph.pad(value, {dim: graph.missing(sizes[dim], chunk)})
    sizes[dim] = chunk
    value = graph.contiguous(value)
    local = list(value.meta["val"].shape)
    gathered = _send(graph, c10d.all_gather_into_tensor.default, (value, parts, axis), [parts * local[0], *local[1:]], name)
    if dim:
        gathered = _join(graph, graph.reshape(gathered, [parts, *sizes]), dim, sizes, padded)
    return graph.trim(gathered, dim, padded, total)


def _reduce_scatter(graph: LocalGraph, step: Step, value: fx.Node, shape: Sequence[int], name: str) -> fx.Node:
    axis, parts = graph.mesh.axes[step.axis]
    dim = _dim(step.target)
    sizes = list(graph.sizes(shape, step.before))
    total = sizes[dim]
    chunk = sizes[dim] = graph.longest(total, parts)
    value = graph.pad(value, {dim: graph.missing(total, graph.padded(total, parts))})
    value = graph.contiguous(value if dim == 0 else _split(graph, value, dim, sizes, parts))
    local = list(value.meta["val"].shape)
    args = (value, _operator(step), parts, axis)
    scattered = _send(graph, c10d.reduce_scatter_tensor.default, args, [local[0] // parts, *local[1:]], name)
    if dim:
        scattered = graph.call(aten.squeeze.dim, (scattered, 0), graph.packed(scattered, local[1:]))
    return graph.trim(scattered, dim, chunk, graph.length(total, step.axis))


def _all_to_all(graph: LocalGraph, step: Step, value: fx.Node, shape: Sequence[int], name: str) -> fx.Node:
    axis, parts = graph.mesh.axes[step.axis]
    old, new = _dim(step.source), _dim(step.target)
    before, after = graph.sizes(shape, step.before), graph.sizes(shape, step.after)
    sizes = list(before)
    sizes[old], sizes[new] = graph.longest(after[old], parts), graph.longest(before[new], parts)
    missing = {old: graph.missing(before[old], sizes[old]), new: graph.missing(before[new], graph.padded(before[new], parts))}
    value = graph.contiguous(_split(graph, graph.pad(value, missing), new, sizes, parts))
    one_each = [1] * parts
    args = (value, one_each, one_each, axis)
    received = _send(graph, c10d.all_to_all_single.default, args, list(value.meta["val"].shape), name)
    padded = graph.padded(after[old], parts)
    joined = _join(graph, received, old, sizes, padded)
    return graph.trim(graph.trim(joined, old, padded, after[old]), new, sizes[new], after[new])


def _split(graph: LocalGraph, value: fx.Node, dim: int, sizes: Sequence[Size], parts: int) -> fx.Node:
    """``[.., parts * c, ..]`` to ``[parts, .., c, ..]``; ``sizes`` has c at ``dim``."""
    apart = graph.reshape(value, [*sizes[:dim], parts, *sizes[dim:]])
    return graph.permute(apart, [dim, *(d for d in range(len(sizes) + 1) if d != dim)])


def _join(graph: LocalGraph, value: fx.Node, dim: int, sizes: Sequence[Size], padded: Size) -> fx.Node:
    """Inverse of ``_split``; ``padded`` is parts * c."""
    order = [*range(1, dim + 1), 0, *range(dim + 1, len(sizes) + 1)]
    return graph.reshape(graph.permute(value, order), [*sizes[:dim], padded, *sizes[dim + 1 :]])


def _send(graph: LocalGraph, target: Any, args: tuple[Any, ...], shape: list[int], name: str) -> fx.Node:
    """The collective and the wait for its result. shape: of the result on rank 0."""
    started = graph.call(target, args, graph.packed(args[0], shape), name)
    return graph.call(c10d.wait_tensor.default, (started,), started.meta["val"], f"{name}_wait")


def _dim(placement: object) -> int:
    assert isinstance(placement, Shard)
    return placement.dim


def _operator(step: Step) -> str:
    assert isinstance(step.source, Partial)
    return str(step.source.reduce_op)


_COLLECTIVES = {
    StepKind.ALL_GATHER: _all_gather,
    StepKind.ALL_REDUCE: _all_reduce,
    StepKind.REDUCE_SCATTER: _reduce_scatter,
    StepKind.ALL_TO_ALL: _all_to_all,
}
