"""Order in a ring that has none.

Against zero, ``x > 0`` is a multiplicative sign: relu(x) - relu(-x) = x always, and relu(c x) = c relu(x) for the positive
constants c that are squares mod p (2, 3 and their products in the default rings; for other c that rewrite is a false alarm).
Between values a total order on canonical representatives is used, so that max, sort, top-k and pooling are exact in any grouping.
Where both sides have a known real value (masks, positions) the real order decides. Everything else explores one branch per draw.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch

from .algebra import Algebra
from .value import RingTensor, Value

_LOWEST = -(1 << 62)

Compare = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def order_key(alg: Algebra, x: RingTensor) -> torch.Tensor:
    """int64 keys of the total order; -inf is lowest. Values with a log part are ordered by their exponential."""
    if x.factor is None:
        return alg.ring.order_key(x.data)
    infinite = alg.is_minus_infinity(x)
    plain = bool((((x.factor - alg.ring.ones(x.factor.shape[1:])) != 0).any(0) & ~(x.factor[0] == 0)).any())
    data = alg.exp(x).data if plain else x.data
    return torch.where(infinite, torch.full_like(data[0], _LOWEST), alg.ring.order_key(data))


def real_key(alg: Algebra, x: RingTensor) -> torch.Tensor:
    """Keys for selecting among entries of one tensor: real values where they are known."""
    if x.known is not None:
        return x.known
    alg.used.add("order")
    return order_key(alg, x)


def sign(alg: Algebra, x: RingTensor) -> torch.Tensor:
    """-1, 0, 1 as int64; -1 for -inf."""
    if x.known is not None:
        return torch.sign(x.known).long()
    alg.used.add("order")
    result = alg.ring.sign(x.data)
    return result if x.factor is None else torch.where(alg.is_minus_infinity(x), -1, result)


def is_zero_constant(x: Value) -> bool:
    """A number or known tensor that is 0 everywhere."""
    if isinstance(x, (int, float)):
        return x == 0
    return isinstance(x, RingTensor) and x.known is not None and x.known.numel() > 0 and not bool(x.known.any())


def compare(alg: Algebra, name: str, x: Value, y: Value) -> torch.Tensor:
    """``name`` in eq, ne, gt, ge, lt, le; broadcasting; boolean result."""
    function: Compare = getattr(torch, name)
    if isinstance(y, float) and math.isinf(y) and isinstance(x, RingTensor):
        return _compare_infinity(alg, name, x, positive=y > 0)
    a, b = alg.pair(x, y)
    if a.known is not None and b.known is not None:
        return function(a.known, b.known)
    if name in ("eq", "ne"):
        alg.used.add("order")
        return function(order_key(alg, a), order_key(alg, b))
    if is_zero_constant(y):
        return function(sign(alg, a).expand(torch.broadcast_shapes(a.shape, b.shape)), torch.zeros((), dtype=torch.int64))
    if is_zero_constant(x):
        return function(torch.zeros((), dtype=torch.int64), sign(alg, b).expand(torch.broadcast_shapes(a.shape, b.shape)))
    alg.used.add("order")
    return function(order_key(alg, a), order_key(alg, b))


def _compare_infinity(alg: Algebra, name: str, x: RingTensor, *, positive: bool) -> torch.Tensor:
    infinite = alg.is_minus_infinity(x)
    if positive:
        return torch.full_like(infinite, name in ("ne", "lt", "le"))
    always = {"eq": infinite, "le": infinite, "ne": ~infinite, "gt": ~infinite}
    return always.get(name, torch.full_like(infinite, name == "ge"))


def maximum(alg: Algebra, x: Value, y: Value) -> RingTensor:
    """The larger of two."""
    return alg.where(compare(alg, "ge", x, y), x, y)


def minimum(alg: Algebra, x: Value, y: Value) -> RingTensor:
    """The smaller of two: -max(-x, -y), so that the multiplicative sign serves both."""
    return alg.where(compare(alg, "le", x, y), x, y)


def take(x: RingTensor, dim: int, index: torch.Tensor) -> RingTensor:
    """``torch.gather`` along a non-negative dim."""
    result = x.map(lambda t: torch.gather(t.expand(4, *x.shape), dim + 1, index[None].expand(4, *index.shape)))
    if x.known is not None:
        result.known = torch.gather(x.known, dim, index)
    return result


def extreme(alg: Algebra, x: RingTensor, dims: Sequence[int], *, keepdim: bool, largest: bool = True) -> RingTensor:
    """amax or amin over non-negative dims."""
    for dim in sorted(dims, reverse=True):
        key = real_key(alg, x)
        index = key.argmax(dim, keepdim=True) if largest else key.argmin(dim, keepdim=True)
        x = take(x, dim, index)
        if not keepdim:
            known = None if x.known is None else x.known.squeeze(dim)
            x = x.map(lambda t, axis=dim + 1: t.squeeze(axis))  # type: ignore[misc]
            x.known = known
    return x
