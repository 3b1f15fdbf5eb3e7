"""Nodes that are judged as one: the layers of a model ask the same questions over and over.

A judgement is a function of the call's template, of the types and local forms of its operands, of what the note declares, of the
node's own local form, and of the shapes of the original node that it stands for. All of that is in the key, so nothing is assumed
of a node whose key was met before: it is the same question. What depends on more is never kept: a rule that looked at the nodes
behind its own, operands whose size differs from rank to rank, and every judgement that found something wrong.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any, NamedTuple

import torch
import torch.fx as fx

from ...layout import Layout
from ...program import Note
from ..forms import form_of
from ..templates import Template
from .problem import Op
from .value import Type


class Judgement(NamedTuple):
    """types: of the outputs; state: stands for the node in the keys of its users, None where it cannot."""

    types: Any
    op: Op
    state: int | None


class Repeats:
    """What was judged so far. states: of the nodes that may be operands in a key."""

    def __init__(self, originals: dict[str, fx.Node]) -> None:
        self.known: dict[Hashable, Judgement] = {}
        self.states: dict[fx.Node, int | None] = {}
        self._originals = originals
        self._numbers: dict[Hashable, int] = {}
        self._layouts: dict[int, tuple[Any, Hashable]] = {}

    def key(
        self, node: fx.Node, known: Note, template: Template, operands: tuple[fx.Node, ...], *, flipped: bool
    ) -> Hashable | None:
        """What the judgement of a call depends on; None where that cannot be told beforehand."""
        states: list[Any] = [self.states[operand] for operand in operands]
        if None in states:
            return None
        if len(operands) > 1 and len(set(operands)) < len(operands):
            states.append(tuple([operands.index(operand) for operand in operands]))  # which of them are one value
        declared = None if known.layouts is None else (self._layout_key(known.layouts), known.global_shapes)
        original = self._originals.get(known.carries or known.origin)
        whole = None if original is None else _local_form(original)
        return (template, *states, _local_form(node), declared, whole, bool(known.origin), bool(known.added_by), flipped)

    def keep(self, node: fx.Node, types: Any, op: Op, key: Hashable | None) -> None:
        """Remember a judgement that found nothing wrong; key: None if it is for this node alone."""
        state = self.states[node] = self._state(node, types)
        if key is not None:
            self.known[key] = Judgement(types, op, state)

    def forget(self, node: fx.Node) -> None:
        """A node whose users have to be judged one by one."""
        self.states[node] = None

    def _state(self, node: fx.Node, types: Any) -> int | None:
        described = _described(types)
        if described is None or (node.op == "placeholder" and not isinstance(types, Type)):
            return None
        return self._numbers.setdefault((described, _local_form(node)), len(self._numbers))

    def _layout_key(self, layouts: tuple[Layout | None, ...]) -> Hashable:
        """Layouts by value, where placements of different classes are never equal. Looked up by identity: most are shared."""
        found = self._layouts.get(id(layouts))
        if found is None:
            described = tuple(
                None if one is None else tuple((type(p), str(p)) for p in one)  # their text names the dimension and the reduction
                for one in layouts
            )
            found = self._layouts[id(layouts)] = (layouts, described)  # keeps the tuple, and so its id, alive
        return found[1]


def _described(types: Any) -> Hashable | None:
    """Types by value; None for what differs from rank to rank, or has no type."""
    if isinstance(types, Type):
        return (types.dims, types.partial, types.zero, types.scaled)
    if type(types) is int:
        return ("integer", types)
    if isinstance(types, (tuple, list)):
        items = tuple(("none",) if item is None else _described(item) for item in types)
        return None if None in items else items
    return None


def _local_form(node: fx.Node) -> Hashable:
    value = node.meta.get("val")
    return (value.shape, value.dtype) if isinstance(value, torch.Tensor) else form_of(value)
