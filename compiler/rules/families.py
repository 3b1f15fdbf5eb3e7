"""hocket's own rules for whole families of ops, written once as functions of the sizes.

    pointwise    y[i, j] = f(a[i, j], b[j])       every output dimension, aligned by broadcasting
    dimwise      f works along ``dim`` only       every other dimension
    reductions   y = sum_i x[i]                   cut i: Partial(sum); cut another: Shard
    norms        statistics over the last dims    every leading dimension; gradients of the weight are sums over them
    creation     y[i] = c                         every dimension

All of them are candidates for the judge.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from ..layout import Partial, Placement, Replicate, Shard
from .rule import Rule
from .signature import OpSignature, TensorSpec
from .views import RESHAPES, cut_pairs

aten = torch.ops.aten

POINTWISE_UNTAGGED = frozenset(
    {
        aten._to_copy.default,
        aten.clone.default,
        aten.alias.default,
        aten.detach.default,
        aten.lift_fresh_copy.default,
        aten.zeros_like.default,
        aten.ones_like.default,
        aten.full_like.default,
        aten.empty_like.default,
        aten.native_dropout_backward.default,
        aten.copy.default,
        aten.fill.Scalar,
        aten.expand.default,
        aten.contiguous.default,
    }
)

REDUCTIONS: Mapping[Any, str] = {
    # target -> what pieces of a reduced dimension are of the result ("" : nothing)
    aten.sum.default: "sum",
    aten.sum.dim_IntList: "sum",
    aten.mean.default: "avg",
    aten.mean.dim: "avg",
    aten.amax.default: "max",
    aten.amin.default: "min",
    aten.max.default: "max",
    aten.min.default: "min",
    aten.any.dim: "",
    aten.any.dims: "",
    aten.all.dim: "",
    aten.prod.dim_int: "",
    aten.var.dim: "",
    aten.var.correction: "",
    aten.var_mean.correction: "",
    aten.std.correction: "",
    aten.logsumexp.default: "",
    aten.argmax.default: "",
    aten.argmin.default: "",
    aten.max.dim: "",
    aten.min.dim: "",
    aten.linalg_vector_norm.default: "",
}

NORMS = frozenset(
    {
        aten.native_layer_norm.default,
        aten.native_layer_norm_backward.default,
        aten._fused_rms_norm.default,
        aten._fused_rms_norm_backward.default,
        aten.rms_norm.default,
    }
)

CREATION = frozenset(
    {
        aten.zeros.default,
        aten.ones.default,
        aten.full.default,
        aten.empty.memory_format,
        aten.new_zeros.default,
        aten.new_ones.default,
        aten.new_full.default,
        aten.new_empty.default,
        aten.new_empty_strided.default,
    }
)


ALONG_DIM = frozenset(
    {
        *(aten._softmax.default, aten._log_softmax.default, aten._softmax_backward_data.default),
        *(aten._log_softmax_backward_data.default, aten.cumsum.default, aten.cumprod.default, aten.logcumsumexp.default),
        *(aten.sort.default, aten.sort.stable, aten.topk.default, aten.argsort.default, aten.kthvalue.default, aten.cummax.default),
        *(aten.slice.Tensor, aten.slice_backward.default, aten.slice_scatter.default, aten.split.Tensor, aten.unbind.int),
        *(aten.split_with_sizes.default, aten.cat.default, aten.gather.default, aten.scatter.src, aten.scatter.value),
        *(aten.scatter_add.default, aten.scatter_reduce.two, aten.index_select.default, aten.index_add.default),
        *(aten.select.int, aten.select_scatter.default, aten.median.dim, aten.mode.default, aten.glu.default, aten.cummin.default),
    }
)
"""Ops that work along their argument ``dim``."""

OTHER_DIMWISE = frozenset(
    {aten.flip.default, aten.roll.default, aten.tril.default, aten.triu.default, aten.constant_pad_nd.default}
)


def worked_dims(signature: OpSignature) -> set[int]:
    """The dimensions of its first tensor that a dimwise op works along."""
    named, rank = signature.arguments, len(signature.tensors[0].shape)
    if signature.target in ALONG_DIM:
        dims: Sequence[int] = [named["dim"]]
    elif signature.target in (aten.tril.default, aten.triu.default):
        dims = (-2, -1)
    elif signature.target is aten.constant_pad_nd.default:
        dims = [-1 - k for k in range(len(named["pad"]) // 2)]
    else:
        dims = named["dims"] or range(rank)
    return {dim % rank for dim in dims} if rank else set()


def family_rules(signature: OpSignature, parts: int) -> Iterator[Rule]:
    """Candidates from every family that the op belongs to."""
    target = signature.target
    tags = getattr(target, "tags", ())
    if target in RESHAPES:
        yield from _reshape(signature, parts)
    elif target in NORMS:
        yield from _norm(signature)
    elif target in REDUCTIONS:
        yield from _reduction(signature, REDUCTIONS[target])
    elif target in CREATION:
        yield from _creation(signature)
    elif target in POINTWISE_UNTAGGED or torch.Tag.pointwise in tags:
        yield from _pointwise(signature)
    elif target in (aten.select_backward.default, aten.stack.default):
        yield from _with_new_dim(signature)
    elif target in ALONG_DIM or target in OTHER_DIMWISE:
        yield from _dimwise(signature, worked_dims(signature))


def _pointwise(signature: OpSignature) -> Iterator[Rule]:
    whole = next((spec for spec in signature.outputs if spec is not None), None)
    if whole is None:
        return
    rank = len(whole.shape)
    for dim in range(rank):
        where, size = dim - rank, whole.shape[dim]
        inputs = tuple(_aligned(spec, where, size) for spec in signature.tensors)
        outputs = tuple(None if spec is None else _aligned(spec, where, size) for spec in signature.outputs)
        yield Rule(inputs, outputs, "hocket:pointwise")


def _aligned(spec: TensorSpec, dim: int, size: int) -> Placement:
    """Shard of the dimension counted from the back, Replicate where the tensor is broadcast along it."""
    if -dim <= len(spec.shape) and spec.shape[dim] == size and size > 1:
        return Shard(len(spec.shape) + dim)
    return Replicate()


def _reshape(signature: OpSignature, parts: int) -> Iterator[Rule]:
    before, after = signature.tensors[0], signature.outputs[0]
    if after is not None:
        for i, o in cut_pairs(before.shape, after.shape, parts):
            yield Rule((Shard(i),), (Shard(o),), "hocket:reshape")


def _creation(signature: OpSignature) -> Iterator[Rule]:
    made = signature.outputs[0]
    inputs = (Replicate(),) * len(signature.tensors)
    for dim in range(len(made.shape) if made is not None else 0):
        yield Rule(inputs, (Shard(dim),), "hocket:creation")


def _norm(signature: OpSignature) -> Iterator[Rule]:
    """A tensor of full rank is cut along a leading dimension; the gradients of weight and bias are sums over it."""
    rank = max(len(spec.shape) for spec in signature.tensors)
    leading = rank - len(signature.arguments["normalized_shape"])
    for dim in range(leading):
        cut = tuple(Shard(dim) if len(spec.shape) == rank else Replicate() for spec in signature.tensors)
        outputs = tuple(
            None if spec is None else Shard(dim) if len(spec.shape) == rank else Partial() for spec in signature.outputs
        )
        yield Rule(cut, outputs, "hocket:norm")


def _reduction(signature: OpSignature, kind: str) -> Iterator[Rule]:
    rank = len(signature.tensors[0].shape)
    named = signature.arguments
    given = named.get("dim")
    dims = list(range(rank)) if given is None or given == () else [given] if isinstance(given, int) else list(given)
    reduced = {dim % rank for dim in dims} if rank else set()
    for dim in range(rank):
        if dim in reduced and kind:
            yield _cut_first(signature, Shard(dim), Partial(kind), "hocket:reduction")
        elif dim not in reduced:
            kept = dim if named.get("keepdim") else dim - sum(other < dim for other in reduced)
            yield _cut_first(signature, Shard(dim), Shard(kept), "hocket:reduction")


def _cut_first(signature: OpSignature, first: Placement, made: Placement, origin: str) -> Rule:
    rest = (Replicate(),) * (len(signature.tensors) - 1)
    return Rule((first, *rest), tuple(None if spec is None else made for spec in signature.outputs), origin)


def _dimwise(signature: OpSignature, whole: set[int]) -> Iterator[Rule]:
    first = signature.tensors[0]
    rank = len(first.shape)
    for dim in range(rank):
        size = first.shape[dim]
        others = [spec.shape[dim] for spec in signature.tensors if len(spec.shape) == rank]
        if dim in whole or any(n not in (1, size) for n in others):
            continue

        def place(spec: TensorSpec, dim: int = dim, size: int = size) -> Placement:
            if len(spec.shape) == rank:
                return Shard(dim) if spec.shape[dim] == size else Replicate()
            return Replicate()

        def place_output(spec: TensorSpec, dim: int = dim) -> Placement:
            return Shard(dim if len(spec.shape) == rank else dim - sum(other < dim for other in whole))

        outputs = tuple(None if spec is None else place_output(spec) for spec in signature.outputs)
        yield Rule(tuple(map(place, signature.tensors)), outputs, "hocket:dimwise")


def _with_new_dim(signature: OpSignature) -> Iterator[Rule]:
    """y has one dimension more than x, at ``dim``; all others go through."""
    made = signature.outputs[0]
    rank = len(made.shape) if made is not None else 0
    new = signature.arguments["dim"] % rank if rank else 0
    for dim in range(rank - 1):
        inputs = tuple(Shard(dim) for _ in signature.tensors)
        yield Rule(inputs, (Shard(dim + (dim >= new)),), "hocket:new-dim")
