"""Run ordinary eager torch code over the ring: a tensor subclass that holds a RingTensor and dispatches to the op table.

Autograd works on it, so a loss can be differentiated over the ring. Used for torch's reference decompositions and in tests.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils._pytree import tree_map

from .algebra import Algebra
from .value import RingTensor


class RingArray(torch.Tensor):
    """A tensor whose values live in the ring of one Algebra."""

    ring_value: RingTensor
    algebra: Algebra

    @staticmethod
    def __new__(cls: type[RingArray], value: RingTensor, algebra: Algebra, *, requires_grad: bool = False) -> RingArray:
        array: RingArray = torch.Tensor._make_wrapper_subclass(
            cls, tuple(value.shape), dtype=value.dtype, requires_grad=requires_grad
        )
        array.ring_value = value
        array.algebra = algebra
        return array

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"RingArray(shape={tuple(self.shape)}, dtype={self.dtype})"

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        from .evaluate import apply  # evaluate runs decompositions through this class

        algebra = _algebra_of((args, kwargs))
        plain_args, plain_kwargs = tree_map(unwrap, args), tree_map(unwrap, kwargs or {})
        if func._schema.is_mutable:
            target = args[0]
            result = apply(algebra, _functional(func), plain_args, plain_kwargs)
            if not isinstance(target, RingArray):
                raise NotImplementedError(f"{func}: a plain tensor cannot take ring values in place")
            target.ring_value = algebra.lift(result)
            return target
        return wrap(algebra, apply(algebra, func, plain_args, plain_kwargs))


def _algebra_of(tree: Any) -> Algebra:
    found: list[Algebra] = []
    tree_map(lambda leaf: found.append(leaf.algebra) if isinstance(leaf, RingArray) else None, tree)
    return found[0]


def _functional(func: Any) -> Any:
    """``add_.Tensor -> add.Tensor``."""
    namespace, name = func._schema.name.split("::")
    packet = getattr(getattr(torch.ops, namespace), name.removesuffix("_"))
    return getattr(packet, func._overloadname)


def unwrap(leaf: Any) -> Any:
    """The RingTensor of a RingArray; anything else unchanged."""
    return leaf.ring_value if isinstance(leaf, RingArray) else leaf


def wrap(algebra: Algebra, tree: Any) -> Any:
    """RingTensors of a nest as RingArrays."""
    if isinstance(tree, RingTensor):
        return RingArray(tree, algebra)
    if isinstance(tree, (list, tuple)):
        items = [wrap(algebra, item) for item in tree]
        return tuple(items) if isinstance(tree, tuple) else items  # torch's named results included
    return tree


def run_eagerly(algebra: Algebra, function: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    """Call torch code on ring values; floating point results come back as RingTensors."""
    result = function(*wrap(algebra, args), **{name: wrap(algebra, value) for name, value in kwargs.items()})
    plain = tree_map(unwrap, result)
    return tree_map(lambda leaf: algebra.lift(leaf) if isinstance(leaf, torch.Tensor) and leaf.is_floating_point() else leaf, plain)
