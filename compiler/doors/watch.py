"""Notices when a module is no longer what it was when the ranks were told of it: other tensors, submodules or attributes."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.distributed.tensor import DTensor

_OWN = frozenset(nn.Module().__dict__)
"""What every module has: its mode, its tables of tensors, submodules and hooks."""

_PLAIN = (bool, int, float, complex, str, bytes, type(None))
"""Types of attributes that are compared by value."""


class StateWatch:
    """Remembers every parameter and buffer of a module and where its memory is, every submodule, and every attribute.

    In-place changes of tensors (an optimizer step, ``load_state_dict``) are seen by the ranks as they happen and need no watching.
    What does: ``p.data = other``, ``load_state_dict(assign=True)``, ``module.to(dtype)``, a parameter replaced or frozen, another
    submodule, and another value of an attribute (``model.dropout.p = 0.2``), since programs hold attributes as constants. What is
    inside lists, dicts and other objects is not looked at.
    """

    def __init__(self, module: nn.Module) -> None:
        self._seen = [
            (owner._parameters, name, f"{prefix}{name}", *_identity(tensor))
            for prefix, owner, name, tensor in _slots(module, buffers=False)
        ] + [
            (owner._buffers, name, f"{prefix}{name}", *_identity(tensor))
            for prefix, owner, name, tensor in _slots(module, buffers=True)
        ]
        parts = [(f"{path}." if path else "", owner) for path, owner in module.named_modules()]
        self._children = [(owner._modules, list(owner._modules.items()), prefix) for prefix, owner in parts if owner._modules]
        self._attributes: list[tuple[dict[str, Any], str, Any, str]] = [
            (owner.__dict__, name, value, prefix + name)
            for prefix, owner in parts
            for name, value in owner.__dict__.items()
            if name not in _OWN
        ]
        self._plain = [_fetched(owner.__dict__) for _, owner in parts if _plain_names(owner.__dict__)]
        self._others = [(table, name, value) for table, name, value, _ in self._attributes if not isinstance(value, _PLAIN)]

    def changed(self) -> str:
        """Qualified name of the first thing that is not what it was, "" if none."""
        for table, key, name, tensor, address, requires_grad in self._seen:
            now = table.get(key)
            if now is not tensor or (now is not None and (_address(now) != address or now.requires_grad != requires_grad)):
                return name
        return self.changed_submodule() or self.changed_attribute()

    def changed_submodule(self) -> str:
        """Qualified name of the first submodule that was added, replaced or taken away, "" if none."""
        for children, before, prefix in self._children:
            if list(children.items()) != before:
                return prefix + _first_difference(dict(before), children)
        return ""

    def changed_attribute(self) -> str:
        """Qualified name of the first attribute that has another value, "" if none."""
        if self._attributes_stand():
            return ""
        return next((full for table, name, value, full in self._attributes if name not in table or _differ(table[name], value)), "")

    def _attributes_stand(self) -> bool:
        """Looked at in every call, so by a tuple of values a module."""
        try:
            for fetch, table, before in self._plain:
                if fetch(table) != before:
                    return False
        except (KeyError, RuntimeError, ValueError, TypeError):  # gone, or something that does not compare, such as a tensor
            return False
        return all(table.get(name) is value for table, name, value in self._others)


def _plain_names(table: dict[str, Any]) -> list[str]:
    return [name for name, value in table.items() if name not in _OWN and isinstance(value, _PLAIN)]


def _fetched(table: dict[str, Any]) -> tuple[Callable[[dict[str, Any]], Any], dict[str, Any], Any]:
    """(a function that fetches all plain attributes in one go, where from, what it gives now)."""
    names = _plain_names(table)
    fetch = operator.itemgetter(names[0], *names)  # a tuple even of one name: tuples take an object for equal to itself, nan too
    return fetch, table, fetch(table)


def _differ(now: Any, before: Any) -> bool:
    if isinstance(before, _PLAIN) and isinstance(now, _PLAIN):
        return now is not before and bool(now != before)
    return now is not before


def _first_difference(before: dict[str, Any], now: dict[str, Any]) -> str:
    names = (name for name in {**before, **now} if before.get(name) is not now.get(name))
    return next(names, next(iter(now), ""))  # the same ones in another order: the first stands for all


def state_of(module: nn.Module) -> dict[tuple[str, str], Tensor]:
    """Parameters and buffers by (kind, qualified name), every name of a tied tensor included."""
    found: dict[tuple[str, str], Tensor] = {}
    for kind, items in (
        ("param", module.named_parameters(remove_duplicate=False)),
        ("buffer", module.named_buffers(remove_duplicate=False)),
    ):
        for name, tensor in items:
            found[kind, name] = tensor
    return found


def copy_attributes(source: nn.Module, target: nn.Module) -> None:
    """Give a copy of a module the plain attributes that the original has by now."""
    for path, owner in source.named_modules():
        table = target.get_submodule(path).__dict__
        table.update({name: value for name, value in owner.__dict__.items() if name not in _OWN and isinstance(value, _PLAIN)})


def _slots(module: nn.Module, *, buffers: bool) -> Iterator[tuple[str, nn.Module, str, Tensor | None]]:
    for path, owner in module.named_modules(remove_duplicate=False):
        prefix = f"{path}." if path else ""
        table = owner._buffers if buffers else owner._parameters
        for name, tensor in table.items():
            yield prefix, owner, name, tensor


def _identity(tensor: Tensor | None) -> tuple[Tensor | None, int, bool]:
    return (None, 0, False) if tensor is None else (tensor, _address(tensor), tensor.requires_grad)


def _address(tensor: Tensor) -> int:
    """Where the memory of a tensor, or of this rank's piece of it, begins."""
    return (tensor._local_tensor if isinstance(tensor, DTensor) else tensor).data_ptr()


@contextmanager
def in_mode(model: nn.Module, *, training: bool) -> Iterator[None]:
    """Give the model itself the mode of its parallel view; its submodules are shared and have theirs already."""
    before = model.training
    model.__dict__["training"] = training
    try:
        yield
    finally:
        model.__dict__["training"] = before
