"""What a rank knows of itself, and collectives with a forward and a backward, as a hand-written training loop uses them.

f: identity forward, sum backward        before a column-parallel layer, after which ranks know a piece each
g: sum forward, identity backward        after a row-parallel layer, whose products are partial sums
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function, grad

c10d = torch.ops._c10d_functional

AXIS = "d"


@dataclass(frozen=True)
class Ranks:
    """One rank's view. bug: the fault that is planted in the program, "" for none."""

    rank: int
    size: int
    bug: str = ""

    def has(self, bug: str) -> bool:
        """Whether a fault is planted."""
        return self.bug == bug

    @property
    def is_last(self) -> bool:
        """Whether this is the last rank."""
        return self.rank == self.size - 1

    def sum(self, value: Tensor, op: str = "sum") -> Tensor:
        """All-reduce."""
        found: Tensor = c10d.wait_tensor(c10d.all_reduce(value.contiguous(), op, AXIS))
        return found

    def gather(self, value: Tensor, dim: int = 0) -> Tensor:
        """All-gather along a dimension."""
        moved = value.movedim(dim, 0).contiguous()
        found: Tensor = c10d.wait_tensor(c10d.all_gather_into_tensor(moved, self.size, AXIS)).movedim(0, dim)
        return found

    def scatter_sum(self, value: Tensor) -> Tensor:
        """Reduce-scatter along dimension 0."""
        found: Tensor = c10d.wait_tensor(c10d.reduce_scatter_tensor(value.contiguous(), "sum", self.size, AXIS))
        return found

    def send(self, value: Tensor, *, to: int, source: int) -> Tensor:
        """Rank ``source`` sends its value to rank ``to``; what others get is empty."""
        flat = value.reshape(-1)
        sent = [flat.numel() if self.rank == source and peer == to else 0 for peer in range(self.size)]
        received = [flat.numel() if self.rank == to and peer == source else 0 for peer in range(self.size)]
        flat = flat if self.rank == source else flat[:0]
        moved: Tensor = c10d.wait_tensor(c10d.all_to_all_single(flat.contiguous(), received, sent, AXIS))
        return moved.view(value.shape) if self.rank == to else value

    def pass_on(self, value: Tensor) -> Tensor:
        """Every rank sends to the next one of the ring."""
        count = value.numel()
        sent = [count if peer == (self.rank + 1) % self.size else 0 for peer in range(self.size)]
        received = [count if peer == (self.rank - 1) % self.size else 0 for peer in range(self.size)]
        moved = c10d.all_to_all_single(value.reshape(-1).contiguous(), received, sent, AXIS)
        found: Tensor = c10d.wait_tensor(moved).view(value.shape)
        return found


class _Pair(Function):
    """One function forward, another backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, forward: Callable[[Tensor], Tensor], backward: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.back = backward
        return forward(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return ctx.back(grads[0]), None, None


_pair: Any = _Pair.apply


def f(here: Ranks, x: Tensor) -> Tensor:
    """Identity forward, sum backward."""
    found: Tensor = _pair(x, lambda t: t.clone(), here.sum)
    return found


def g(here: Ranks, x: Tensor) -> Tensor:
    """Sum forward, identity backward."""
    found: Tensor = _pair(x, here.sum, lambda t: t.clone())
    return found


def sum_both(here: Ranks, x: Tensor) -> Tensor:
    """Sum forward and backward: statistics that every rank uses."""
    found: Tensor = _pair(x, here.sum, here.sum)
    return found


def gathered(here: Ranks, x: Tensor) -> Tensor:
    """All-gather of dimension 0 forward, reduce-scatter backward."""
    found: Tensor = _pair(x, here.gather, here.scatter_sum)
    return found


def scattered(here: Ranks, x: Tensor) -> Tensor:
    """Reduce-scatter of dimension 0 forward, all-gather backward."""
    found: Tensor = _pair(x, here.scatter_sum, here.gather)
    return found


Tensors = dict[str, Tensor]
Step = Callable[[Ranks, Tensors], Tensors]
"""One rank's step: its pieces of inputs and parameters by role (``input:ids``, ``param:q.weight``) to results by role."""


@dataclass(frozen=True)
class Handwritten:
    """A step in one process, and the same step on ranks.

    shapes: global shape of every input and parameter; integers: number of values that an integer input takes; layouts: of roles
    that are cut; bugs: name -> what goes wrong.
    """

    name: str
    shapes: dict[str, tuple[int, ...]]
    reference: Callable[[Tensors], Tensors]
    step: Step
    bugs: dict[str, str]
    integers: dict[str, int] = dataclasses.field(default_factory=dict)
    layouts: dict[str, str] = dataclasses.field(default_factory=dict)


def with_gradients(loss: Tensor, leaves: Tensors) -> Tensors:
    """``grad:name`` of every parameter that the loss depends on (zeros for others)."""
    names = [name for name in leaves if name.startswith("param:")]
    found = grad(loss, [leaves[name] for name in names], allow_unused=True)
    return {
        name.replace("param:", "gradient:"): torch.zeros_like(leaves[name]) if one is None else one
        for name, one in zip(names, found, strict=True)
    }


def as_leaves(tensors: Tensors) -> Tensors:
    """Parameters as leaves of a new autograd graph; the rest as it is."""
    return {name: t.detach().requires_grad_() if name.startswith("param:") else t for name, t in tensors.items()}
