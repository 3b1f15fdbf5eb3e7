"""The judge of rules: execute the op on pieces and see whether the pieces make the whole.

Nothing here knows where a rule comes from or why it should hold. The op runs once on whole values and once a rank on the pieces
that the rule prescribes, in double precision, at small sizes of the same structure (``shrink``), with the size arguments
localised as in a lowered program. A rule that fails once is wrong. Uneven chunks are tried as uneven chunks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ..layout import Partial, Placement, Shard, format_placement, local_size
from .execute import UNDEFINED_VALUES, run
from .localise import localise
from .pieces import cut_value, local_sizes, represents
from .rule import Rule
from .shrink import Trial
from .signature import OpSignature, TensorSpec


def fits(rule: Rule, signature: OpSignature, parts: int) -> bool:
    """Whether every dimension that the rule cuts leaves each rank a piece, and every partial value has a type that reduces so."""
    sides = ((rule.inputs, signature.tensors), (rule.outputs, signature.outputs))
    if any(len(placements) != len(specs) for placements, specs in sides):
        return False
    for placements, specs in sides:
        for placement, spec in zip(placements, specs, strict=True):
            if (placement is None) != (spec is None):
                return False
            if isinstance(placement, Shard) and spec is not None and not _can_cut(spec, placement.dim, parts):
                return False
            if isinstance(placement, Partial) and spec is not None and not _can_be_partial(spec.dtype, placement.reduce_op):
                return False
    return True


def _can_cut(spec: TensorSpec, dim: int, parts: int) -> bool:
    return 0 <= dim < len(spec.shape) and spec.shape[dim] >= parts and local_size(spec.shape[dim], parts, parts - 1) > 0


def _can_be_partial(dtype: torch.dtype, reduce_op: str) -> bool:
    if reduce_op in ("max", "min"):
        return dtype is not torch.bool and not dtype.is_complex
    return dtype.is_floating_point or dtype.is_complex or (reduce_op == "sum" and dtype in (torch.int32, torch.int64))


def failure(trial: Trial, rule: Rule) -> str:
    """Why the rule is wrong at the sizes of the trial; "" when the pieces of every kind of values make the whole."""
    if not fits(rule, trial.signature.with_outputs(trial.outputs), trial.parts):
        return "it does not fit the sizes"
    compare_values = trial.signature.target not in UNDEFINED_VALUES
    for values, wholes in trial.runs:
        try:
            per_rank = pieces_of_outputs(trial, rule, values)
        except Exception as error:
            return (
                f"the op fails on the pieces: {str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__}"
            )
        for position, (placement, whole) in enumerate(zip(rule.outputs, wholes, strict=True)):
            if placement is None or not isinstance(whole, torch.Tensor):
                continue
            pieces = [outputs[position] for outputs in per_rank]
            if not all(isinstance(piece, torch.Tensor) for piece in pieces):
                return f"output {position} is missing on some ranks"
            if not represents(pieces, placement, whole, values=compare_values):
                return f"the pieces do not make output {position} under {format_placement(placement)}"
    return ""


def pieces_of_outputs(trial: Trial, rule: Rule, values: Sequence[torch.Tensor]) -> list[list[Any]]:
    """For every rank the flat outputs of the op on its pieces."""
    generator = torch.Generator().manual_seed(7)
    cuts = [cut_value(v, p, trial.parts, generator) for v, p in zip(values, rule.inputs, strict=True)]
    results = []
    for rank in range(trial.parts):
        args, kwargs = trial.signature.call(iter([pieces[rank] for pieces in cuts]))
        size = output_size(trial.outputs, rule.outputs, trial.parts, rank)
        results.append(run(*localise(trial.signature.target, args, kwargs, size)))
    return results


def output_size(outputs: Sequence[TensorSpec | None], placements: Sequence[Placement | None], parts: int, rank: int) -> list[int]:
    """Local sizes of the first output that is a tensor."""
    for spec, placement in zip(outputs, placements, strict=True):
        if spec is not None:
            return local_sizes(spec.shape, placement, parts, rank)
    return []
