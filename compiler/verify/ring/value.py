"""Values of the interpreter: integers and booleans are ordinary torch tensors, every floating point tensor is a RingTensor.

    value  =  data + log(factor)          factor absent: 1;  factor 0: the value is -inf

The optional logarithmic part keeps log, logsumexp, log_softmax and -inf masks exact: exp(a + log b) = E(a) b. When such a value
meets a non-linear operation its logarithmic part is *settled*: replaced by the discrete logarithm in the ring, which is defined
only modulo the kernel of E, so the result is marked ``loose`` and compared modulo that kernel.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from ....runtime.errors import HocketError


class PoisonError(HocketError):
    """This draw of the inputs divides by zero where the program does not: draw again."""


@dataclass(slots=True, eq=False)
class RingTensor:
    """An array of ring elements that stands for a floating point tensor.

    data: int64 ``[4, *shape]``; factor: None or int64 broadcast to the same shape; loose: defined modulo ker E only; dtype: of the
    tensor it stands for; known: its real value where it does not depend on any drawn input (constants, masks, positions).
    """

    data: torch.Tensor
    factor: torch.Tensor | None = None
    loose: bool = False
    dtype: torch.dtype = torch.float32
    known: torch.Tensor | None = None

    @property
    def shape(self) -> torch.Size:
        """Shape of the tensor it stands for."""
        return self.data.shape[1:]

    @property
    def ndim(self) -> int:
        """Its rank."""
        return self.data.dim() - 1

    def numel(self) -> int:
        """Number of elements."""
        return self.data[0].numel()

    def map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> RingTensor:
        """Apply a rearrangement (no arithmetic, no filling in) to ``[4, *shape]`` arrays."""
        factor = None if self.factor is None else function(self.factor)
        return RingTensor(function(self.data), factor, self.loose, self.dtype)

    def rank(self, ndim: int) -> RingTensor:
        """With dimensions of size 1 in front until it has ``ndim``."""
        missing = ndim - self.ndim
        if missing <= 0:
            return self
        result = self.map(lambda t: t.reshape(4, *([1] * missing), *t.shape[1:]))
        if self.known is not None:
            result.known = self.known.reshape(*([1] * missing), *self.known.shape)
        return result


Value = Any
"""RingTensor | torch.Tensor (integer or bool) | int | float | bool | None | list or tuple of these."""


def ring_leaves(value: Value) -> list[RingTensor]:
    """The RingTensors in a nest of lists, tuples and dicts."""
    if isinstance(value, RingTensor):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, (list, tuple)):
        return [leaf for item in value for leaf in ring_leaves(item)]
    return []


def map_ring(value: Value, function: Callable[[RingTensor], Any]) -> Value:
    """Replace every RingTensor in a nest of lists, tuples and dicts."""
    if isinstance(value, RingTensor):
        return function(value)
    if isinstance(value, (list, tuple)):
        items = [map_ring(item, function) for item in value]
        return tuple(items) if isinstance(value, tuple) else items
    if isinstance(value, dict):
        return {key: map_ring(item, function) for key, item in value.items()}
    return value
