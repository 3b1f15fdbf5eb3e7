"""What torch's own sharding tables say about an op, asked without a DTensor and without a process group.

torch keeps three tables: rows of placements along a single mesh axis ("single-dim", the newest), strategies that map candidate
input specs to output specs, and a few propagation rules. All are plain functions of sizes; the mesh that two of them want is a
shell with no backend behind it. Their answers are candidates only: some are wrong (``cumsum`` with a negative dimension in 2.13),
so each one is executed on pieces before it is used.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta
from torch.distributed.tensor._op_schema import OpSchema, OpSpec, OpStrategy, TupleStrategy
from torch.distributed.tensor._ops.single_dim_strategy import _ShardingPlaceholder

from ..layout import Partial, Placement, Replicate, Shard
from .rule import Rule
from .signature import OpSignature, TensorSpec, replace_leaves

Row = tuple[Sequence[Any], Sequence[Any]]
"""(placements of the tensor inputs, placements of the outputs), not yet cleaned."""

MAX_COMBINATIONS = 600
"""Input combinations tried on torch's propagation rules."""


def torch_rules(signature: OpSignature, parts: int) -> list[Rule]:
    """All rules of torch's tables that only use whole, sharded and partial placements, unvalidated, in torch's order.

    Raises whatever a table raises on sizes it does not expect.
    """
    propagator = DTensor._op_dispatcher.sharding_propagator
    target = signature.target
    if target in propagator.op_single_dim_strategy_funcs:
        return _clean(signature, _single_dim(propagator.op_single_dim_strategy_funcs[target].func, signature), "torch:single-dim")
    if target in propagator.op_strategy_funcs:
        info = propagator.op_to_schema_info.get(target)
        return _clean(signature, _strategy(propagator.op_strategy_funcs[target], info, signature, parts), "torch:strategy")
    if target in propagator.op_to_rules:
        info = propagator.op_to_schema_info.get(target)
        return _clean(signature, _propagation(propagator.op_to_rules[target], info, signature, parts), "torch:propagation")
    return []


@lru_cache(maxsize=16)
def _mesh(parts: int) -> DeviceMesh:
    """A mesh with no process group behind it."""
    return DeviceMesh("cpu", list(range(parts)), _init_backend=False, _rank=0)


def _meta(spec: TensorSpec) -> TensorMeta:
    strides = [1]
    for size in reversed(spec.shape[1:]):
        strides.insert(0, strides[0] * max(size, 1))
    return TensorMeta(torch.Size(spec.shape), tuple(strides[: len(spec.shape)]), spec.dtype)


def _filled(signature: OpSignature, change: Callable[[Any], Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    args = tuple(replace_leaves(value, change, list) for value in signature.args)
    return args, {name: replace_leaves(value, change, list) for name, value in signature.kwargs}


def _single_dim(function: Callable[..., Any], signature: OpSignature) -> list[Row]:
    args, kwargs = _filled(signature, lambda leaf: _meta(leaf) if isinstance(leaf, TensorSpec) else leaf)
    rows: list[Row] = []
    count = len(signature.tensors)
    for row in function(signature.target, args, kwargs):
        placements = [Shard(p.dim) if isinstance(p, _ShardingPlaceholder) else p for p in row]
        split = len(placements) - count
        rows.append((placements[split:], placements[:split]))
    return rows


def _candidates(spec: TensorSpec, parts: int) -> list[Placement]:
    cuts: list[Placement] = [Shard(dim) for dim, size in enumerate(spec.shape) if size >= parts]
    return [Replicate(), *cuts, Partial()]


def _strategy(function: Callable[..., Any], info: Any, signature: OpSignature, parts: int) -> list[Row]:
    mesh = _mesh(parts)

    def strategy(spec: TensorSpec) -> OpStrategy:
        specs = [DTensorSpec(mesh, (p,), tensor_meta=_meta(spec)) for p in _candidates(spec, parts)]
        return OpStrategy([OpSpec(s) for s in specs])

    def convert(value: Any) -> Any:
        if isinstance(value, TensorSpec):
            return strategy(value)
        if isinstance(value, tuple):
            inner = [convert(item) for item in value]
            return TupleStrategy(inner) if inner and all(isinstance(item, TensorSpec) for item in value) else inner
        return value

    args = tuple(map(convert, signature.args))
    kwargs = {name: convert(value) for name, value in signature.kwargs}
    rows: list[Row] = []
    for option in function(OpSchema(signature.target, args, kwargs, info)).strategies:
        outputs = option.output_specs if isinstance(option.output_specs, (tuple, list)) else (option.output_specs,)
        inputs = option.input_specs
        if inputs is None:
            inputs = (outputs[0],) * len(signature.tensors)
        rows.append(([s.placements[0] if s else None for s in inputs], [s.placements[0] if s else None for s in outputs]))
    return rows


def _propagation(function: Callable[..., Any], info: Any, signature: OpSignature, parts: int) -> list[Row]:
    mesh = _mesh(parts)
    combinations = itertools.product(*(_candidates(spec, parts) for spec in signature.tensors))
    rows: list[Row] = []
    for combination in itertools.islice(combinations, MAX_COMBINATIONS):
        placements = iter(combination)

        def spec(leaf: Any, placements: Any = placements) -> Any:
            return DTensorSpec(mesh, (next(placements),), tensor_meta=_meta(leaf)) if isinstance(leaf, TensorSpec) else leaf

        args, kwargs = _filled(signature, spec)
        try:
            result = function(OpSchema(signature.target, args, kwargs, info))
        except (RuntimeError, AssertionError, NotImplementedError, IndexError):
            continue  # the table refuses this combination
        if result.output_spec is None or result.redistribute_schema is not None:
            continue
        outputs = result.output_spec if isinstance(result.output_spec, (tuple, list)) else (result.output_spec,)
        rows.append((list(combination), [s.placements[0] if s is not None else None for s in outputs]))
    return rows


def _clean(signature: OpSignature, rows: Sequence[Row], origin: str) -> list[Rule]:
    """Rules with one placement a tensor, in our three kinds; rows of other kinds or lengths are left out."""
    rules = []
    for inputs, outputs in rows:
        if len(outputs) == 1 and len(signature.outputs) > 1:
            outputs = list(outputs) * len(signature.outputs)
        if len(inputs) != len(signature.tensors) or len(outputs) != len(signature.outputs):
            continue
        outputs = [None if spec is None else placement for spec, placement in zip(signature.outputs, outputs, strict=True)]
        ranks = [len(spec.shape) if spec is not None else 0 for spec in (*signature.tensors, *signature.outputs)]
        placements = [_plain(p, rank) for p, rank in zip((*inputs, *outputs), ranks, strict=True)]
        wanted = [True] * len(inputs) + [spec is not None for spec in signature.outputs]
        if any(want and p is None for want, p in zip(wanted, placements, strict=True)):
            continue
        rules.append(Rule(tuple(placements[: len(inputs)]), tuple(placements[len(inputs) :]), origin))  # type: ignore[arg-type]
    return rules


def _plain(placement: Any, rank: int) -> Placement | None:
    """The placement with its dimension counted from the front; None for kinds that a program does not use."""
    if type(placement) is Shard:
        return Shard(placement.dim % rank) if rank and -rank <= placement.dim < rank else None
    if type(placement) is Partial and placement.reduce_op in ("sum", "avg", "max", "min"):
        return placement
    return placement if type(placement) is Replicate else None
