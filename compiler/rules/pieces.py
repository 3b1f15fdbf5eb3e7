"""Values to try an op on, cut by a placement, and whether pieces make the whole again.

Shard(d):      pieces are the chunks of dimension d        whole = cat(pieces, d)
Partial(sum):  pieces are any values that add up           whole = pieces[0] + pieces[1] + ...
Partial(avg):  ... whose mean is the value                 Partial(max | min): ... whose maximum | minimum is the value
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..layout import Partial, Placement, Replicate, Shard, local_offset, local_size
from .signature import OpSignature, TensorSpec

aten = torch.ops.aten

TRIALS = 2
"""Kinds of values: normal ones, and positive ones below 1 (for logarithms, roots, variances)."""

INDEXED: dict[object, tuple[str, str]] = {
    # target -> (argument that holds indices, argument whose dimension ``dim`` (or 0) they index)
    aten.embedding.default: ("indices", "weight"),
    aten.gather.default: ("index", "self"),
    aten.gather_backward.default: ("index", "self"),
    aten.index_select.default: ("index", "self"),
    aten.index_add.default: ("index", "self"),
    aten.index_copy.default: ("index", "self"),
    aten.scatter.src: ("index", "self"),
    aten.scatter.value: ("index", "self"),
    aten.scatter_add.default: ("index", "self"),
    aten.scatter_reduce.two: ("index", "self"),
    aten.nll_loss_forward.default: ("target", "self"),
    aten.nll_loss_backward.default: ("target", "self"),
    aten.nll_loss2d_forward.default: ("target", "self"),
    aten.nll_loss2d_backward.default: ("target", "self"),
}


def wide(dtype: torch.dtype) -> torch.dtype:
    """The type in which rules are tried: double precision for floats, others unchanged."""
    if dtype.is_complex:
        return torch.complex128
    return torch.float64 if dtype.is_floating_point else dtype


def make_values(signature: OpSignature, trial: int) -> list[torch.Tensor]:
    """Random tensor inputs of the signature's sizes; integers are valid indices into whatever they index."""
    generator = torch.Generator().manual_seed(1234 + trial)
    tensors = zip(signature.tensors, signature.tensor_names, strict=True)
    values = [_value(signature, spec, name, trial, generator) for spec, name in tensors]
    ignored = signature.arguments.get("ignore_index")
    if isinstance(ignored, int) and "target" in signature.tensor_names:
        target = values[signature.tensor_names.index("target")]
        # unevenly spread, so that means over pieces do not look like means; a single target must count, or anything looks right
        target.view(-1)[: -(-(target.numel() - 1) // 3)] = ignored
    return values


def _value(signature: OpSignature, spec: TensorSpec, name: str, trial: int, generator: torch.Generator) -> torch.Tensor:
    if spec.dtype is torch.bool:
        return torch.rand(spec.shape, generator=generator) > 0.5
    if not (spec.dtype.is_floating_point or spec.dtype.is_complex):
        high = index_range(signature, name)
        return torch.randint(0, max(1, high), spec.shape, generator=generator).to(spec.dtype)
    if trial == 0:
        return torch.randn(spec.shape, generator=generator, dtype=wide(spec.dtype))
    positive = 0.1 + 0.8 * torch.rand(spec.shape, generator=generator, dtype=torch.float64)
    return positive.to(wide(spec.dtype))


def index_range(signature: OpSignature, name: str) -> int:
    """Integers of the argument ``name`` must stay below this."""
    arguments = signature.arguments
    if signature.target is aten.embedding_dense_backward.default and name == "indices":
        return int(arguments["num_weights"])
    if signature.target in INDEXED and INDEXED[signature.target][0] == name:
        table = arguments[INDEXED[signature.target][1]]
        dim = arguments.get("dim", min(1, len(table.shape) - 1) if name == "target" else 0)
        return int(table.shape[dim]) if table.shape else 1
    sizes = [size for spec in signature.tensors for size in spec.shape if size > 1]
    return min(sizes, default=4)


def cut_value(value: torch.Tensor, placement: Placement, parts: int, generator: torch.Generator) -> list[torch.Tensor]:
    """Pieces of ``value`` for every rank of one axis; partial pieces are random."""
    if isinstance(placement, Shard):
        total = value.shape[placement.dim]
        spans = [(local_offset(total, parts, k), local_size(total, parts, k)) for k in range(parts)]
        return [value.narrow(placement.dim, start, length).contiguous() for start, length in spans]
    if not isinstance(placement, Partial):
        return [value] * parts
    noise = [_noise(value, generator) for _ in range(parts - 1)]
    if placement.reduce_op == "sum":
        return [*noise, value - sum(noise, torch.zeros_like(value))]
    if placement.reduce_op == "avg":
        return [*noise, parts * value - sum(noise, torch.zeros_like(value))]
    sign = -1 if placement.reduce_op == "max" else 1
    owner = torch.randint(0, parts, value.shape, generator=generator)
    return [torch.where(owner == k, value, value + sign * _noise(value, generator).abs()) for k in range(parts)]


def _noise(value: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    if value.is_floating_point() or value.is_complex():
        return torch.randn(value.shape, generator=generator, dtype=value.dtype)
    return torch.randint(-5, 6, value.shape, generator=generator).to(value.dtype)


def local_sizes(shape: Sequence[int], placement: Placement | None, parts: int, index: int) -> list[int]:
    """Sizes of piece ``index`` of a tensor of ``shape``."""
    sizes = list(shape)
    if isinstance(placement, Shard):
        sizes[placement.dim] = local_size(sizes[placement.dim], parts, index)
    return sizes


def represents(pieces: Sequence[torch.Tensor], placement: Placement, whole: torch.Tensor, *, values: bool = True) -> bool:
    """Whether the pieces of all ranks stand for ``whole`` under ``placement``. values: False compares sizes only."""
    parts = len(pieces)
    for index, piece in enumerate(pieces):
        if list(piece.shape) != local_sizes(whole.shape, placement, parts, index) or piece.dtype != whole.dtype:
            return False
    if not values:
        return True
    if isinstance(placement, Replicate):
        return all(_close(piece, whole) for piece in pieces)
    if isinstance(placement, Shard):
        return _close(torch.cat(list(pieces), placement.dim), whole)
    if not isinstance(placement, Partial) or whole.dtype is torch.bool:
        return False
    stacked = torch.stack(list(pieces))
    match placement.reduce_op:
        case "sum":
            return _close(stacked.sum(0).to(whole.dtype), whole)
        case "avg":
            return whole.is_floating_point() and _close(stacked.mean(0), whole)
        case "max":
            return _close(stacked.amax(0), whole)
        case "min":
            return _close(stacked.amin(0), whole)
    return False


def _close(found: torch.Tensor, expected: torch.Tensor) -> bool:
    if not (expected.is_floating_point() or expected.is_complex()):
        return torch.equal(found, expected)
    finite = expected[expected.isfinite()]
    scale = float(finite.abs().max()) if finite.numel() else 0.0
    tolerance = 1e-4 if expected.dtype is torch.float32 else 1e-9
    return torch.allclose(found, expected, rtol=tolerance, atol=tolerance * scale, equal_nan=True)
