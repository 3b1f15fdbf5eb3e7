"""Shape and dtype of every value of a program, worked out from its inputs alone: what passes wrote into ``meta`` is not believed.

One call on arguments of one form is inferred once in a process, so the eighty layers of a model cost as much as one.
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.fx as fx
from torch._subclasses.fake_tensor import FakeTensorMode

DEVICE_ARGUMENTS = frozenset(("layout", "device", "pin_memory", "memory_format", "non_blocking"))
"""Keyword arguments that change neither the value nor the form."""


class TensorForm(NamedTuple):
    """shape and dtype of a tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def is_float(self) -> bool:
        """Whether it holds real floating point numbers."""
        return bool(self.dtype.is_floating_point)


Form = Any
"""TensorForm | tuple of Forms | int | frozen float or bool | str | None; UNKNOWN where only running the program can tell."""


class _Unknown:
    def __repr__(self) -> str:
        return "unknown form"


UNKNOWN = _Unknown()


def form_of(value: Any) -> Form:
    """The form of a tensor, or of a nest of them; other values stand for themselves, apart from each other."""
    if isinstance(value, torch.Tensor):
        return TensorForm(tuple([int(n) for n in value.shape]), value.dtype)
    if isinstance(value, (list, tuple)):
        return tuple([form_of(item) for item in value])
    return freeze(value, _no_node) if type(value) in (float, bool) else value


def _no_node(node: Any) -> Any:
    raise AssertionError(f"{node} has no form of its own")


def propagate_forms(graph: fx.Graph, inputs: Sequence[Form]) -> bool:
    """Write ``meta["val"]`` of every node of a logical graph, as meta tensors; False where a form is unknown. inputs: its forms."""
    forms: dict[fx.Node, Form] = {}
    given = iter(inputs)
    for node in graph.nodes:
        if node.op == "output":
            break
        if node.op == "placeholder":
            form = next(given)
        elif node.target is operator.getitem:
            form = forms[node.args[0]][node.args[1]]
        else:
            form = infer(node.target, freeze(node.args, forms.__getitem__), freeze(node.kwargs, forms.__getitem__))
        if form is UNKNOWN:
            return False
        forms[node] = form
        node.meta["val"] = meta_value(form)
    return True


def meta_value(form: Form) -> Any:
    """A value of this form that holds nothing: a meta tensor, or a nest of them."""
    if type(form) is TensorForm:
        return torch.empty(form.shape, dtype=form.dtype, device="meta")
    return tuple(map(meta_value, form)) if type(form) is tuple else _thaw(form) if type(form) is _Number else form


class _Number(NamedTuple):
    """A float or bool in a key: equal keys are to mean equal arguments, and 1 == 1.0 == True, 0.0 == -0.0 in Python."""

    kind: type
    value: Any
    sign: float


class _Range(NamedTuple):
    start: Any
    stop: Any
    step: Any


def freeze(argument: Any, of_node: Callable[[Any], Any], node_type: type = fx.Node) -> Any:
    """A hashable stand-in for an argument, with ``of_node`` of every node in it. Different arguments have different ones."""
    kind = type(argument)
    if kind is node_type:
        return of_node(argument)
    if kind is int or kind is str or argument is None:
        return argument
    if kind is tuple or kind is list or isinstance(argument, (list, tuple)):
        found = []
        for item in argument:  # most are nodes and integers: no call for those
            kind = type(item)
            found.append(of_node(item) if kind is node_type else item if kind is int else freeze(item, of_node, node_type))
        return tuple(found)
    if kind is float or kind is bool:
        return _Number(kind, argument, math.copysign(1.0, argument))
    if kind is slice:
        return _Range(*[freeze(item, of_node, node_type) for item in (argument.start, argument.stop, argument.step)])
    if isinstance(argument, Mapping):
        return tuple((name, freeze(item, of_node, node_type)) for name, item in argument.items())
    return argument


def infer(target: Any, args: Any, kwargs: Any) -> Form:
    """The form of ``target(*args, **kwargs)``; args, kwargs: frozen, with TensorForms in place of tensors."""
    try:
        return _infer(target, args, kwargs)
    except TypeError:  # an argument without a hash
        return UNKNOWN


@functools.lru_cache(maxsize=1 << 14)
def _infer(target: Any, args: Any, kwargs: Any) -> Form:
    try:
        with _mode():
            return form_of(target(*_thaw(args), **{name: _thaw(value) for name, value in kwargs}))
    except Exception:  # what the op says to wrong arguments is said again, with its line, where the program is run
        return UNKNOWN


@functools.cache
def _mode() -> FakeTensorMode:
    return FakeTensorMode()


def _thaw(key: Any) -> Any:
    kind = type(key)
    if kind is TensorForm:
        return torch.empty(key.shape, dtype=key.dtype)
    if kind is _Number:
        return key.value
    if kind is _Range:
        return slice(*[_thaw(item) for item in key])
    if isinstance(key, tuple):
        return [_thaw(item) for item in key]
    return key
