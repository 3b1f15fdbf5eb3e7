"""State that no input of a program carries, and that a trace would freeze: attributes that the forward pass counts up, draws from
Python's and numpy's own generators, tensors inside objects that nobody takes apart.

A program is a function of its inputs. Where the user's function is not, the trace says so and keeps no value of the first call.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.fx as fx
from torch import nn

from ..errors import CaptureError, InputError
from ..program import Literal
from .lift import Snapshot

if TYPE_CHECKING:
    from .flatten import Flat

Attributes = Mapping[tuple[str, str], Any]
"""(qualified name of a submodule, attribute) -> value."""

_PLAIN = (bool, int, float, complex, str)


def attributes_of(module: nn.Module | None) -> dict[tuple[str, str], Any]:
    """Every attribute of a module and its submodules that is a number or a text."""
    if module is None:
        return {}
    return {
        (path, name): value
        for path, owner in module.named_modules()
        for name, value in owner.__dict__.items()
        if isinstance(value, _PLAIN)
    }


def moved(before: Attributes, now: Attributes) -> dict[tuple[str, str], Any]:
    """The attributes that are new or have another value now."""
    return {key: value for key, value in now.items() if key not in before or before[key] != value}


@contextmanager
def with_attributes(module: nn.Module, values: Attributes) -> Iterator[None]:
    """The module with other values of some attributes; left as found."""
    snapshot = Snapshot(module)
    try:
        for (path, name), value in values.items():
            module.get_submodule(path).__dict__[name] = value
        yield
    finally:
        snapshot.restore()


def check_counting(first: Flat, second: Flat | None, values: Attributes) -> None:
    """CaptureError unless a second call, after the first has left ``values``, runs the same graph. None: it could not be traced."""
    if second is not None and _same_graph(first, second):
        return
    path, name = next(iter(values))
    full = f"{path}.{name}" if path else name
    raise CaptureError(
        f"the forward pass changes the attribute {full} (to {values[path, name]!r}), and what it computes depends on it, so every "
        "call is another program. Way out: make it a buffer (register_buffer), which programs update, or pass it as an argument"
    )


def _same_graph(first: Flat, second: Flat) -> bool:
    if (first.inputs, first.outputs, set(first.constants)) != (second.inputs, second.outputs, set(second.constants)):
        return False
    if _listing(first.graph) != _listing(second.graph):
        return False
    return all(_same_tensor(value, second.constants[name]) for name, value in first.constants.items())


def _same_tensor(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a is b or (a.shape == b.shape and a.dtype == b.dtype and bool(torch.equal(a, b)))


def _listing(graph: fx.Graph) -> list[str]:
    place = {node: f"%{i}" for i, node in enumerate(graph.nodes)}
    return [
        f"{n.op} {n.target if n.op == 'call_function' else ''} {fx.map_arg((n.args, n.kwargs), place.__getitem__)}"
        for n in graph.nodes
    ]


@contextmanager
def refusing_draws() -> Iterator[None]:
    """CaptureError where the body draws from the generators of Python or numpy, whose state is left as found."""
    python, legacy = random.getstate(), np.random.get_state(legacy=False)
    yield
    drawn = "Python's random module" if random.getstate() != python else ""
    if not _same_state(np.random.get_state(legacy=False), legacy):
        drawn = "numpy.random"
    random.setstate(python)
    np.random.set_state(legacy)
    if drawn:
        raise CaptureError(
            f"the forward pass draws from {drawn}, and the program would keep that value for ever. Way out: draw with torch.rand "
            "and choose with torch.where, or draw outside the model and pass the value in"
        )


def _same_state(now: Any, before: Any) -> bool:
    return now["state"]["pos"] == before["state"]["pos"] and bool((now["state"]["key"] == before["state"]["key"]).all())


@contextmanager
def checked_arguments(literals: list[tuple[str, Literal]]) -> Iterator[None]:
    """InputError for an argument that holds tensors in an object of its own kind, or that the body changes; left as found."""
    for name, leaf in literals:
        if holds_tensors(leaf.value):
            raise InputError(
                f"{name} ({type(leaf.value).__name__}) holds tensors, which the program would keep as they are now: pass the "
                "tensors themselves, in a tuple, list, dict or dataclass"
            )
    snapshots = [(name, leaf, Snapshot(leaf.value)) for name, leaf in literals]
    try:
        yield
    finally:
        changed = [(name, leaf) for name, leaf, snapshot in snapshots if snapshot.changed()]
        for _, _, snapshot in snapshots:
            snapshot.restore()
    if changed:
        name, leaf = changed[0]
        raise InputError(
            f"the model changes its argument {name} ({type(leaf.value).__name__}), which a program cannot: return the new "
            "value instead (for a cache of keys and values: use_cache=False, or hocket.generate)"
        )


def holds_tensors(value: object) -> bool:
    """Whether an object that is no tensor has tensors somewhere inside. Modules are not looked into."""
    seen: set[int] = set()
    pending = [value]
    while pending:
        item = pending.pop()
        if isinstance(item, torch.Tensor):
            return True
        if id(item) in seen or isinstance(item, (*_PLAIN, type(None), type, nn.Module, torch.dtype, torch.device)):
            continue
        seen.add(id(item))
        if isinstance(item, Mapping):
            pending.extend(item.values())
        elif isinstance(item, (list, tuple, set, frozenset, deque)):
            pending.extend(item)
        attributes = getattr(item, "__dict__", None)
        if isinstance(attributes, dict) and not callable(item):
            pending.extend(attributes.values())
    return False
