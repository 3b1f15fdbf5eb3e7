"""When two values are equal: exactly, or modulo the kernel of E where one of them went through a discrete logarithm."""

from __future__ import annotations

import torch

from .algebra import Algebra
from .value import RingTensor, Value


def differing(alg: Algebra, x: Value, y: Value) -> torch.Tensor | None:
    """Boolean mask of the entries that differ (of the common shape); None where the shapes or kinds differ."""
    if isinstance(x, torch.Tensor) and isinstance(y, torch.Tensor):
        return x != y if x.shape == y.shape else None
    if not (isinstance(x, RingTensor) or isinstance(y, RingTensor)):
        return torch.tensor(x != y)
    if x is None or y is None:
        return None
    a, b = alg.lift(x), alg.lift(y)
    if a.shape != b.shape:
        return None
    if a.factor is not None or b.factor is not None:
        return (alg.exp(a).data != alg.exp(b).data).any(0)
    if a.loose or b.loose:
        return (alg.ring.project(a.data) != alg.ring.project(b.data)).any(0)
    return (a.data != b.data).any(0)


def same(alg: Algebra, x: Value, y: Value) -> bool:
    """Equal in shape and in every entry."""
    mask = differing(alg, x, y)
    return mask is not None and not bool(mask.any())
