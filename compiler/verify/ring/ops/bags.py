"""Look-ups and scatters that reduce what meets at one place, and products and distances of all pairs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from ....errors import UnsupportedError
from ..algebra import Algebra
from ..order import maximum, minimum
from ..value import RingTensor, Value
from .indexing import embedding_dense_backward, scatter, scatter_add
from .reductions import sum_, vector_norm
from .views import by_rows, unsqueeze

aten = torch.ops.aten

_SUM, _MEAN = 0, 1


def _bags(indices: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    """Which bag each index belongs to; offsets: where each bag starts."""
    return torch.searchsorted(offsets, torch.arange(indices.shape[0], dtype=offsets.dtype), right=True) - 1


def _sizes(indices: torch.Tensor, bags: torch.Tensor, count: int, padding: int) -> torch.Tensor:
    """How many indices of every bag count."""
    return torch.zeros(count, dtype=torch.int64).index_add_(0, bags, (indices != padding).long())


def _shares(
    alg: Algebra, indices: torch.Tensor, bags: torch.Tensor, sizes: torch.Tensor, options: tuple[int, Value, int]
) -> RingTensor:
    """Weight of every index in its bag: 0 for padding, 1 / size for a mean. options: mode, per-sample weights, padding."""
    mode, weights, padding = options
    if mode not in (_SUM, _MEAN):
        raise UnsupportedError("unsupported(_embedding_bag by max): only sums and means of bags have an exact meaning here")
    share = alg.lift((indices != padding).long())
    if weights is not None:
        share = alg.mul(share, weights)
    return alg.div(share, alg.lift(sizes.clamp(min=1)[bags])) if mode == _MEAN else share


def embedding_bag(
    alg: Algebra,
    weight: RingTensor,
    indices: torch.Tensor,
    offsets: torch.Tensor,
    scale_grad_by_freq: bool = False,
    mode: int = 0,
    sparse: bool = False,
    per_sample_weights: Value = None,
    include_last_offset: bool = False,
    padding_idx: int = -1,
) -> Any:
    """_embedding_bag: sums or means of rows; and the integers that describe the bags, which torch computes."""
    real = per_sample_weights if not isinstance(per_sample_weights, RingTensor) else torch.ones(indices.shape)
    form = torch.zeros(tuple(weight.shape))
    described = aten._embedding_bag(
        form, indices, offsets, scale_grad_by_freq, mode, sparse, real, include_last_offset, padding_idx
    )
    starts = offsets[:-1] if include_last_offset else offsets
    bags = _bags(indices, starts)
    sizes = _sizes(indices, bags, starts.shape[0], padding_idx)
    share = _shares(alg, indices, bags, sizes, (mode, per_sample_weights, padding_idx))
    rows = alg.mul(weight.map(lambda t: t[:, indices]), unsqueeze(alg, share, -1))
    total = alg.full((starts.shape[0], weight.shape[1]), 0, weight.dtype)
    place = bags[:, None].expand(-1, weight.shape[1])
    return scatter_add(alg, total, 0, place, rows), *described[1:]


def embedding_bag_backward(
    alg: Algebra,
    grad: RingTensor,
    indices: torch.Tensor,
    offsets: torch.Tensor,
    offset2bag: torch.Tensor,
    bag_size: torch.Tensor,
    maximum_indices: torch.Tensor,
    num_weights: int,
    scale_grad_by_freq: bool,
    mode: int,
    sparse: bool,
    per_sample_weights: Value,
    padding_idx: int = -1,
) -> RingTensor:
    """Its backward, where the gradient is dense; it reads the bags and their sizes from what the forward saved, as torch does."""
    if sparse:
        raise UnsupportedError("unsupported(_embedding_bag_backward): a sparse gradient has no exact meaning here")
    bags = offset2bag if offset2bag.shape == indices.shape else _bags(indices, offsets)
    share = _shares(alg, indices, bags, bag_size, (mode, per_sample_weights, padding_idx))
    rows = alg.mul(grad.map(lambda t: t[:, bags]), unsqueeze(alg, share, -1))
    return embedding_dense_backward(alg, rows, indices, num_weights, padding_idx, scale_grad_by_freq)


def scatter_reduce(
    alg: Algebra, x: Value, dim: int, indices: torch.Tensor, source: Value, reduce: str, include_self: bool = True
) -> RingTensor:
    """sum, prod, mean, amax or amin of all that is scattered to a place."""
    target, added = alg.lift(x), alg.lift(source)
    added = by_rows(aten.slice)(alg, added, dim, 0, indices.shape[dim]) if added.shape != indices.shape else added
    touched = torch.zeros(tuple(target.shape), dtype=torch.int64).scatter_add(dim, indices, torch.ones_like(indices))
    if reduce in ("sum", "mean"):
        start = target if include_self else alg.where(touched > 0, 0, target)
        total = scatter_add(alg, start, dim, indices, added)
        return total if reduce == "sum" else alg.div(total, alg.lift((touched + int(include_self)).clamp(min=1)))
    steps: dict[str, Callable[..., RingTensor]] = {"prod": lambda a, b, c: a.mul(b, c), "amax": maximum, "amin": minimum}
    if reduce not in steps:
        raise UnsupportedError(f"unsupported(scatter_reduce by {reduce!r})")
    held = torch.full(tuple(target.shape), include_self)
    for place in range(indices.shape[dim]):
        index = indices.narrow(dim, place, 1)
        piece = by_rows(aten.narrow)(alg, added, dim, place, 1)
        before = by_rows(aten.gather)(alg, target, dim, index)
        joined = alg.where(held.gather(dim, index), steps[reduce](alg, before, piece), piece)
        target, held = scatter(alg, target, dim, index, joined), held.scatter(dim, index, True)
    return target


def trilinear(
    alg: Algebra,
    first: RingTensor,
    second: RingTensor,
    third: RingTensor,
    expand1: Sequence[int],
    expand2: Sequence[int],
    expand3: Sequence[int],
    sumdim: Sequence[int],
    unroll_dim: int = 1,
) -> RingTensor:
    """sum of a b c over some dimensions, after each got dimensions of size 1."""
    for dims, name in ((expand1, 0), (expand2, 1), (expand3, 2)):
        for dim in sorted(dims):
            if name == 0:
                first = unsqueeze(alg, first, dim)
            elif name == 1:
                second = unsqueeze(alg, second, dim)
            else:
                third = unsqueeze(alg, third, dim)
    product = alg.mul(alg.mul(first, second), third)
    return sum_(alg, product, list(sumdim)) if sumdim else product


def _differences(alg: Algebra, x: RingTensor, y: RingTensor) -> RingTensor:
    return alg.sub(unsqueeze(alg, x, -2), unsqueeze(alg, y, -3))


def cdist(alg: Algebra, x: RingTensor, y: RingTensor, p: float, compute_mode: int | None = None) -> RingTensor:
    """Distances of all pairs of rows."""
    return vector_norm(alg, _differences(alg, x, y), p, -1)


def cdist_backward(alg: Algebra, grad: RingTensor, x: RingTensor, y: RingTensor, p: float, distance: RingTensor) -> RingTensor:
    """g (x - y) / distance, summed over y; for Euclidean distances."""
    if p != 2:
        raise UnsupportedError(f"unsupported(_cdist_backward with p={p}): only Euclidean distances have an exact meaning here")
    slope = unsqueeze(alg, alg.div(grad, distance), -1)
    return sum_(alg, alg.mul(slope, _differences(alg, x, y)), -2)


BAGS: dict[Any, Callable[..., Any]] = {
    aten._embedding_bag: embedding_bag,
    aten._embedding_bag_forward_only: embedding_bag,
    aten._embedding_bag_backward: embedding_bag_backward,
    aten.scatter_reduce: scatter_reduce,
    aten._trilinear: trilinear,
    aten._cdist_forward: cdist,
    aten._cdist_backward: cdist_backward,
}
