"""The integers of a lowered graph: the same on all ranks, or one per rank as an array over the mesh."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from ...layout import chunk_size, coordinate, local_offset, local_size, padded_size, padding
from .problem import Untypable
from .value import Axes, Integer, chunk_length

FUNCTIONS: Mapping[Any, Callable[..., Any]] = {
    local_size: chunk_length,
    local_offset: lambda total, parts, index: np.minimum(index * -(-total // parts), total),
    padded_size: lambda total, parts: parts * -(-total // parts),
    padding: lambda have, want: want - have,
    chunk_size: lambda total, parts: -(-total // parts),
    operator.add: operator.add,
    operator.sub: operator.sub,
    operator.mul: operator.mul,
    operator.floordiv: operator.floordiv,
    operator.mod: operator.mod,
    operator.neg: operator.neg,
    min: np.minimum,
    max: np.maximum,
}


def is_integer_function(target: Any) -> bool:
    """Whether a call target computes an integer of a lowered graph."""
    return target is coordinate or (callable(target) and not hasattr(target, "overloadpacket") and target in FUNCTIONS)


def evaluate(axes: Axes, target: Any, args: Sequence[Any]) -> Integer:
    """The integer on all ranks at once; an int where all agree."""
    if target is coordinate:
        position = axes.position(str(args[0]))
        if position is None:
            raise Untypable(f"coordinate({args[0]!r}) names no axis of the mesh {axes.mesh}")
        found: Any = axes.index[position]
    else:
        found = FUNCTIONS[target](*args)
    return shared(found)


def shared(value: Any) -> Integer:
    """An int where the array holds one value only."""
    if isinstance(value, np.ndarray):
        first = value.flat[0]
        return int(first) if (value == first).all() else value
    return int(value)
