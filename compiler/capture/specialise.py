"""Compiled forms of one model, by the form of the call: a bounded cache that forgets the least recently used.

A program has fixed shapes. A call whose tree, shapes, dtypes, literals or modes were not seen before is compiled
again, and one line in the log says so.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable, Mapping
from typing import Any, Generic, TypeVar

import torch
import torch.utils._pytree as pytree
from torch import nn

from ..errors import InputError
from .leaves import flatten_inputs

T = TypeVar("T")
log = logging.getLogger("hocket")


def _form_key(args: tuple[Any, ...], kwargs: Mapping[str, Any], *, training: bool) -> Hashable:
    """What a program depends on besides values: tree, shapes, dtypes, requires_grad, devices, literals, grad mode, autocast."""
    leaves, spec = pytree.tree_flatten((tuple(args), dict(kwargs)))
    form = tuple(
        (leaf.shape, leaf.dtype, leaf.requires_grad, leaf.device) if isinstance(leaf, torch.Tensor) else _literal_key(leaf)
        for leaf in leaves
    )
    autocast = tuple((kind, torch.get_autocast_dtype(kind)) for kind in ("cpu", "cuda") if torch.is_autocast_enabled(kind))
    return str(spec), form, training, torch.is_grad_enabled(), autocast


def _news(before: Any, now: Any) -> str:
    """What tells a call from the latest one where the tensors are of the same form; "" where they are not."""
    (spec, form, training, grad, autocast), (modes, frozen) = now
    (old_spec, old_form, old_training, old_grad, old_autocast), (old_modes, old_frozen) = before
    if spec != old_spec or len(form) != len(old_form):
        return ""
    changed = [new for new, old in zip(form, old_form, strict=True) if new != old]
    if any(isinstance(new[0], torch.Size) for new in changed):
        return ""
    if changed:
        return f"new value {', '.join(repr(new[1]) for new in changed)} of an argument that is no tensor"
    if modes != old_modes:
        return "another train or eval mode"
    if (training, grad) != (old_training, old_grad):
        return "a call with gradients" if training else "a call without gradients"
    return "other parameters frozen" if frozen != old_frozen else "another autocast" if autocast != old_autocast else ""


def _modes_key(modules: Iterable[nn.Module], parameters: Iterable[torch.Tensor]) -> Hashable:
    return tuple(module.training for module in modules), tuple(parameter.requires_grad for parameter in parameters)


def _literal_key(value: object) -> Hashable:
    """Equal for values that trace alike; True, 1 and 1.0 are told apart. An unhashable object counts by identity."""
    try:
        hash(value)
    except TypeError:
        return (type(value), id(value))
    return (type(value), value)


class Specialisations(Generic[T]):
    """At most ``capacity`` compiled forms, the least recently used evicted first. Not safe to share between threads."""

    def __init__(self, capacity: int = 8, dropped: Callable[[T], None] | None = None) -> None:
        """dropped: called with every form that is forgotten. Raises InputError unless capacity is at least 1."""
        if capacity < 1:
            raise InputError(f"the number of specialisations to keep must be at least 1; found {capacity}")
        self.capacity = capacity
        self._dropped = dropped
        self._kept: OrderedDict[Hashable, T] = OrderedDict()
        self._parts: tuple[object, list[nn.Module], list[torch.Tensor]] = (None, [], [])

    def __len__(self) -> int:
        return len(self._kept)

    def get(
        self,
        target: object,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
        *,
        training: bool,
        make: Callable[[bool, tuple[Any, ...], dict[str, Any]], T],
    ) -> T:
        """The form for this call, from ``make(training, args, kwargs)`` if it is new; a failing ``make`` leaves the cache alone."""
        kwargs = dict(kwargs or {})
        key = (_form_key(args, kwargs, training=training), self._modes_of(target))
        if key in self._kept:
            self._kept.move_to_end(key)
            return self._kept[key]
        if self._kept:
            kept = min(len(self._kept) + 1, self.capacity)
            news = _news(next(reversed(self._kept)), key) or f"new input shape {_shown(args, kwargs)}"
            log.warning("hocket: %s: re-specialising (%d of %d kept)", news, kept, self.capacity)
        made = make(training, args, kwargs)
        self._kept[key] = made
        while len(self._kept) > self.capacity:
            self._forget(self._kept.popitem(last=False)[1])
        return made

    def clear(self) -> None:
        """Forget all forms."""
        while self._kept:
            self._forget(self._kept.popitem(last=False)[1])
        self._parts = (None, [], [])

    def _forget(self, form: T) -> None:
        if self._dropped is not None:
            self._dropped(form)

    def _modes_of(self, target: object) -> Hashable:
        """Modes and frozen parameters; walking a deep model costs more than a step's dispatch, so its parts are remembered."""
        if self._parts[0] is not target:
            module = target if isinstance(target, nn.Module) else nn.Module()
            self._parts = (target, list(module.modules()), list(module.parameters()))
        return _modes_key(self._parts[1], self._parts[2])


def _shown(args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    leaves, _ = flatten_inputs(args, kwargs)
    shapes = [f"{name} {str(leaf.dtype)[6:]}{list(leaf.shape)}" for name, leaf in leaves if isinstance(leaf, torch.Tensor)]
    return ", ".join(shapes[:4]) + (", ..." if len(shapes) > 4 else "")
