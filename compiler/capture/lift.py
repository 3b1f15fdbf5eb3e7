"""A module's parameters and buffers by name, and the module with other tensors in their place for a while.

While a module is traced it holds fake tensors; afterwards it is left exactly as found: every dict, list and set that hangs on it is
put back, so counters, caches and attributes that a forward pass changes in Python do not leak out of the trace.
"""

from __future__ import annotations

import collections
import contextlib
import types
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch._subclasses import FakeTensorMode


@dataclass(frozen=True)
class ModuleTensors:
    """params, buffers: qualified name -> tensor, each tensor once; tied: further names of one -> its first name."""

    params: dict[str, torch.Tensor]
    buffers: dict[str, torch.Tensor]
    tied: dict[str, str]


def tensors_of(module: nn.Module | None) -> ModuleTensors:
    """The parameters and buffers of a module (none for a plain function)."""
    if module is None:
        return ModuleTensors({}, {}, {})
    params: dict[str, torch.Tensor] = dict(module.named_parameters())
    buffers = dict(module.named_buffers())
    first = {id(tensor): name for name, tensor in {**buffers, **params}.items()}
    every = [*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)]
    tied = {name: first[id(tensor)] for name, tensor in every if first[id(tensor)] != name}
    return ModuleTensors(params, buffers, tied)


def fake_like(tensor: torch.Tensor, mode: FakeTensorMode) -> torch.Tensor:
    """A fake tensor of the same sizes, strides, dtype, device and need of a gradient, with storage of its own."""
    with mode:
        fake = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device)
    if isinstance(tensor, nn.Parameter):
        parameter = nn.Parameter(fake, requires_grad=tensor.requires_grad)
        parameter.__dict__.update({k: v for k, v in tensor.__dict__.items() if not isinstance(v, torch.Tensor)})
        return parameter
    return fake.requires_grad_(tensor.requires_grad)


_ATOMS = (
    torch.Tensor,
    torch.Generator,
    torch.dtype,
    torch.device,
    str,
    bytes,
    int,
    float,
    complex,
    type(None),
    type,
    tuple,
    types.FunctionType,
    types.BuiltinFunctionType,
    types.MethodType,
    types.ModuleType,
)


class Snapshot:
    """The contents of every mutable container that hangs on ``root``: attributes, dicts, lists, sets, deques, at any depth."""

    def __init__(self, root: object) -> None:
        self._saved: list[tuple[Any, Any]] = []
        seen: set[int] = set()
        pending: list[object] = [root]
        while pending:
            item = pending.pop()
            if isinstance(item, _ATOMS) or id(item) in seen:
                continue
            seen.add(id(item))
            if isinstance(item, dict):
                self._saved.append((item, dict(item)))
                pending.extend(item.values())
            elif isinstance(item, (list, collections.deque)):
                self._saved.append((item, list(item)))
                pending.extend(item)
            elif isinstance(item, set):
                self._saved.append((item, set(item)))
            attributes = getattr(item, "__dict__", None)
            if isinstance(attributes, dict):
                pending.append(attributes)

    def changed(self) -> bool:
        """True if some container no longer holds the same objects."""
        return any(not _same(container, saved) for container, saved in self._saved)

    def substitute(self, replacements: Mapping[int, torch.Tensor]) -> None:
        """Put other tensors in place of those whose id is named, wherever a dict or list holds them."""
        for container, saved in self._saved:
            if isinstance(saved, dict):
                for key, value in saved.items():
                    if isinstance(value, torch.Tensor) and id(value) in replacements:
                        dict.__setitem__(container, key, replacements[id(value)])
            elif isinstance(container, list):
                for index, value in enumerate(saved):
                    if isinstance(value, torch.Tensor) and id(value) in replacements:
                        list.__setitem__(container, index, replacements[id(value)])

    def restore(self) -> None:
        """Give every container its saved contents back, in place."""
        for container, saved in self._saved:
            if _same(container, saved):
                continue
            if isinstance(saved, dict):
                dict.clear(container)
                dict.update(container, saved)
            elif isinstance(saved, set):
                container.clear()
                container.update(saved)
            else:
                container.clear()
                container.extend(saved)


def _same(container: Any, saved: Any) -> bool:
    if len(container) != len(saved):
        return False
    if isinstance(saved, dict):
        return all(a is b and container[a] is saved[b] for a, b in zip(container, saved, strict=True))
    if isinstance(saved, set):
        return bool(container == saved)
    return all(a is b for a, b in zip(container, saved, strict=True))


@contextlib.contextmanager
def holding(module: nn.Module | None, replacements: Mapping[int, torch.Tensor]) -> Iterator[None]:
    """The module with ``replacements`` (id of a tensor -> another one) in it; left exactly as found."""
    if module is None:
        yield
        return
    snapshot = Snapshot(module)
    try:
        snapshot.substitute(replacements)
        yield
    finally:
        snapshot.restore()
