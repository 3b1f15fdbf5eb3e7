"""What a zoo case is, and the layers that several small cases share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

Call = tuple[nn.Module, tuple[Any, ...], dict[str, Any]]
"""A module in the mode it is to run in, and one call of it."""


@dataclass(frozen=True)
class Case:
    """A model that hocket must run as eager does.

    double: why it is compared in float64, where float32 noise of the model itself exceeds the tolerance ("" for float32);
    tolerance: of every tensor's largest element; random: draws numbers, so that the reference is the same program on one rank.
    """

    name: str
    build: Callable[[], Call]
    double: str = ""
    tolerance: float = 1e-5
    random: bool = False
    slow: bool = False

    def make(self) -> Call:
        """The same model and inputs at every call."""
        torch.manual_seed(0)
        model, args, kwargs = self.build()
        if self.double:
            model, args, kwargs = model.double(), *torch.utils._pytree.tree_map(_double, (args, kwargs))
        return model, args, kwargs


@dataclass(frozen=True)
class Refused:
    """A model that has no single graph: ``line`` is in the error, and so is ``way_out``. reason: why it cannot work."""

    name: str
    build: Callable[[], Call]
    line: str
    way_out: str
    reason: str
    slow: bool = False


def _double(leaf: object) -> object:
    if not (isinstance(leaf, Tensor) and leaf.is_floating_point()):
        return leaf
    return leaf.detach().double().requires_grad_(leaf.requires_grad)


class Dense(nn.Module):
    """One linear layer that subclasses use as they like."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)


def rows(count: int = 4, width: int = 8) -> Tensor:
    """A batch."""
    return torch.randn(count, width)
