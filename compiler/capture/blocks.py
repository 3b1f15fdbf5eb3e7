"""Finds the repeated blocks of a model: members of a ModuleList or Sequential that are built alike.

Two blocks are alike if their modules have the same types, modes, parameter and buffer forms and the same attributes, all the way
down. Numbers and strings may differ (``layer_idx``): such an attribute is *poisoned* while a block is traced for all its copies, so
that code which really reads it fails there, and the blocks are then traced one by one.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_BOOKKEEPING = frozenset(nn.Module().__dict__)
_EXACT = (bool, type(None), type, torch.dtype, torch.device, torch.layout, torch.memory_format)
_POISONABLE = (int, float, str)


@dataclass(frozen=True)
class BlockGroup:
    """Blocks that are built alike: copy number -> module. poisoned: (path of a submodule, attribute) that differs between them."""

    container: str
    blocks: dict[int, nn.Module]
    poisoned: tuple[tuple[str, str], ...]

    @property
    def pattern(self) -> str:
        """``layers.*``."""
        return f"{self.container}.*" if self.container else "*"

    def name(self, copy: int) -> str:
        """Qualified name of a copy."""
        return f"{self.container}.{copy}" if self.container else str(copy)


def find_blocks(model: nn.Module) -> list[BlockGroup]:
    """The outermost groups of at least two blocks with parameters, in order of the model."""
    groups: list[BlockGroup] = []
    pending: list[tuple[str, nn.Module]] = [("", model)]
    while pending:
        name, module = pending.pop()
        inside: set[int] = set()
        if isinstance(module, (nn.ModuleList, nn.Sequential)):
            found = list(_groups_of(name, module))
            groups += found
            inside = {id(block) for group in found for block in group.blocks.values()}
        children = [(f"{name}.{key}" if name else key, child) for key, child in module.named_children()]
        pending.extend(entry for entry in reversed(children) if id(entry[1]) not in inside)
    return groups


def _groups_of(name: str, container: nn.Module) -> Iterator[BlockGroup]:
    forms: dict[Hashable, dict[int, nn.Module]] = {}
    values: dict[int, dict[tuple[str, str], Any]] = {}
    for key, block in container._modules.items():
        if block is None or not key.isdigit() or next(block.parameters(), None) is None:
            continue
        loose: dict[tuple[str, str], Any] = {}
        forms.setdefault(_form(block, loose), {})[int(key)] = block
        values[int(key)] = loose
    for blocks in forms.values():
        if len(blocks) >= 2 and _disjoint(blocks):
            first = values[next(iter(blocks))]
            yield BlockGroup(name, blocks, tuple(p for p in first if any(values[copy][p] != first[p] for copy in blocks)))


def _disjoint(blocks: dict[int, nn.Module]) -> bool:
    """No module or parameter belongs to two blocks."""
    seen: set[int] = set()
    for block in blocks.values():
        mine = {id(part) for part in (*block.modules(), *block.parameters())}
        if seen & mine:
            return False
        seen |= mine
    return True


def _form(block: nn.Module, loose: dict[tuple[str, str], Any]) -> Hashable:
    """Equal for blocks built alike; attributes that may differ go into ``loose`` by (path, name)."""
    order: dict[int, int] = {}
    parts: list[Hashable] = []
    for path, module in block.named_modules():
        if any(getattr(module, hooks, None) for hooks in _HOOKS) or "forward" in module.__dict__:
            return id(block)
        parts.append((path, type(module), module.training))
        tensors = [*module._parameters.items(), *module._buffers.items()]
        for key, tensor in tensors:
            parts.append((key, None if tensor is None else (order.setdefault(id(tensor), len(order)), tensor_form(tensor))))
        for key, value in module.__dict__.items():
            if key in _BOOKKEEPING:
                continue
            if isinstance(value, _POISONABLE) and not isinstance(value, bool):
                loose[path, key] = value
                parts.append((key, type(value)))
            else:
                parts.append((key, _value(value)))
    return tuple(parts)


def tensor_form(tensor: torch.Tensor) -> tuple[Hashable, ...]:
    """What a trace depends on besides values."""
    return tuple(tensor.shape), tensor.stride(), tensor.dtype, tensor.device, tensor.requires_grad


def _value(value: Any) -> Hashable:
    """Equal for attributes that behave alike; objects of unknown kind are only alike if they are the same object."""
    if isinstance(value, (*_EXACT, *_POISONABLE)):
        return type(value), value
    if isinstance(value, (list, tuple)) and type(value) in (list, tuple, torch.Size):
        return type(value), tuple(_value(item) for item in value)
    if type(value) is dict:
        return dict, tuple((_value(key), _value(item)) for key, item in value.items())
    return id(value)


class Poison:
    """Stands for an attribute that differs between copies; anything done with it fails."""

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"a block's own {name}")


def _refuse(*_: object) -> Any:
    raise TypeError("this attribute differs between copies of the block")


for _name in (
    *("add", "radd", "sub", "rsub", "mul", "rmul", "truediv", "rtruediv", "floordiv", "rfloordiv", "mod", "rmod", "pow", "rpow"),
    *(
        "eq",
        "ne",
        "lt",
        "le",
        "gt",
        "ge",
        "hash",
        "bool",
        "int",
        "float",
        "index",
        "str",
        "repr",
        "format",
        "len",
        "iter",
        "contains",
    ),
    *("neg", "pos", "abs", "round", "getitem", "and", "or", "xor", "lshift", "rshift", "complex", "trunc", "floor", "ceil"),
):
    setattr(Poison, f"__{_name}__", _refuse)
