"""The op table: what each ATen op means over the ring. It is the trusted base of the proof: data in one place, tested as such.

An op that is not here is not guessed at: the interpreter raises UnsupportedError.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

from .ops.activations import ACTIVATIONS
from .ops.attention import ATTENTION
from .ops.bags import BAGS
from .ops.chain import CHAIN
from .ops.decomposed import decompositions
from .ops.factories import FACTORIES
from .ops.indexing import INDEXING
from .ops.linear import LINEAR
from .ops.loss import LOSS
from .ops.normalisation import NORMALISATION
from .ops.pointwise import POINTWISE
from .ops.reductions import REDUCTIONS
from .ops.views import VIEWS

Meaning = Callable[..., Any]
"""f(algebra, *args, **kwargs) on values, with the arguments of the ATen op."""

FAMILIES: tuple[Mapping[Any, Meaning], ...] = (
    POINTWISE,
    ACTIVATIONS,
    REDUCTIONS,
    VIEWS,
    INDEXING,
    BAGS,
    LINEAR,
    NORMALISATION,
    ATTENTION,
    LOSS,
    FACTORIES,
    CHAIN,
)


@functools.cache
def op_table() -> Mapping[Any, Meaning]:
    """Op packet -> meaning. ValueError if two families define one op."""
    table: dict[Any, Meaning] = {}
    for family in FAMILIES:
        double = table.keys() & family.keys()
        if double:
            raise ValueError(f"defined twice in the op table: {sorted(map(str, double))}")
        table.update(family)
    return table


@functools.cache
def decomposition_map() -> Mapping[Any, Meaning]:
    """Op overload -> torch's decomposition that gives its meaning."""
    return decompositions()


def supported(op: Any) -> bool:
    """Whether an op overload has a meaning over the ring when floating point values enter it."""
    return op.overloadpacket in op_table() or op in decomposition_map()
