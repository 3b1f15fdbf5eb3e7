"""What a rule depends on: an op, the sizes and types of its tensors, and its constants. Values, strides and names are left out."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
import torch.fx as fx

from ..errors import RuleError
from ..program import tensor_leaves


@dataclass(frozen=True)
class TensorSpec:
    """Sizes and type of one tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    def __repr__(self) -> str:
        return f"{str(self.dtype).removeprefix('torch.')}{list(self.shape)}"


@dataclass(frozen=True)
class OpSignature:
    """A call with TensorSpecs in the place of tensors. Lists become tuples; kwargs keep their order, which counts tensor inputs."""

    target: Any
    args: tuple[Any, ...]
    kwargs: tuple[tuple[str, Any], ...]
    outputs: tuple[TensorSpec | None, ...]

    @cached_property
    def tensors(self) -> tuple[TensorSpec, ...]:
        """The tensor inputs in the order of ``program.tensor_inputs``."""
        return tuple(leaf for leaf in leaves((self.args, self.kwargs)) if isinstance(leaf, TensorSpec))

    @cached_property
    def key(self) -> str:
        """Text that is equal exactly for equal signatures; stable from run to run."""
        return f"{target_name(self.target)}{self.args!r}{self.kwargs!r}->{self.outputs!r}"

    @cached_property
    def arguments(self) -> dict[str, Any]:
        """Argument name -> value, defaults filled in; empty for targets without a schema."""
        schema = getattr(self.target, "_schema", None)
        if schema is None:
            return {}
        given = dict(self.kwargs)
        named = {}
        for position, argument in enumerate(schema.arguments):
            if position < len(self.args):
                named[argument.name] = self.args[position]
            else:
                named[argument.name] = given.get(argument.name, argument.default_value)
        return named

    @cached_property
    def tensor_names(self) -> tuple[str, ...]:
        """For each of ``tensors`` the schema argument that it belongs to."""
        schema = getattr(self.target, "_schema", None)
        names = [argument.name for argument in schema.arguments] if schema is not None else []
        found: list[str] = []
        for position, value in enumerate(self.args):
            name = names[position] if position < len(names) else str(position)
            found += [name] * sum(isinstance(leaf, TensorSpec) for leaf in leaves(value))
        for name, value in self.kwargs:
            found += [name] * sum(isinstance(leaf, TensorSpec) for leaf in leaves(value))
        return tuple(found)

    def with_outputs(self, outputs: tuple[TensorSpec | None, ...]) -> OpSignature:
        """A copy with other outputs."""
        return replace(self, outputs=outputs)

    def call(self, tensors: Iterator[Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """(args, kwargs) with the given values in the place of the specs, lists where the op takes lists."""

        def fill(value: Any) -> Any:
            return next(tensors) if isinstance(value, TensorSpec) else value

        args = tuple(replace_leaves(value, fill, list) for value in self.args)
        return args, {name: replace_leaves(value, fill, list) for name, value in self.kwargs}


def leaves(value: Any) -> Iterator[Any]:
    """Everything in nested tuples and lists, in order."""
    if isinstance(value, (tuple, list)):
        for item in value:
            yield from leaves(item)
    else:
        yield value


def replace_leaves(value: Any, change: Callable[[Any], Any], sequence: type = tuple) -> Any:
    """The same nesting with ``change`` applied to every leaf and every tuple or list made a ``sequence``."""
    if isinstance(value, (tuple, list)):
        return sequence(replace_leaves(item, change, sequence) for item in value)
    return change(value)


def target_name(target: Any) -> str:
    """``aten.mm.default`` for an overload, ``module.name`` for a function."""
    if isinstance(target, torch._ops.OpOverload):
        return str(target)
    return f"{getattr(target, '__module__', '')}.{getattr(target, '__qualname__', repr(target))}"


def signature_of(node: fx.Node) -> OpSignature:
    """The signature of a ``call_function`` node with ``meta["val"]``.

    Raises RuleError when a size is only known once the data is there.
    """
    args = replace_leaves(node.args, _leaf)
    kwargs = tuple((name, replace_leaves(value, _leaf)) for name, value in node.kwargs.items())
    outputs = tuple(spec_of(leaf) if isinstance(leaf, torch.Tensor) else None for leaf in tensor_leaves(node.meta["val"]))
    return OpSignature(node.target, args, kwargs, outputs)


def spec_of(value: torch.Tensor) -> TensorSpec:
    """Sizes and type of a tensor, fake or real."""
    return TensorSpec(tuple(_integer(size) for size in value.shape), value.dtype)


def _leaf(value: Any) -> Any:
    if isinstance(value, fx.Node):
        value = value.meta.get("val")
    if isinstance(value, torch.Tensor):
        return spec_of(value)
    if isinstance(value, (tuple, list)):
        return replace_leaves(value, _leaf)
    if isinstance(value, torch.SymInt):
        return _integer(value)
    if isinstance(value, (torch.SymFloat, torch.SymBool)):
        raise RuleError(f"a constant depends on the data ({value})")
    return value


def _integer(size: int | torch.SymInt) -> int:
    """A size as an int; symbolic sizes by their hint."""
    if isinstance(size, int):
        return size
    hint = size.node.hint if size.node.has_hint() else None
    if hint is None:
        raise RuleError(f"a size depends on the data ({size})")
    return int(hint)
