"""The two sides of a lemma: how two values are computed from the nearest values that both programs share.

Where a lemma cuts, the value may be anything. So it never cuts at integers, at values that no input enters, or at values that a
mask may have made -inf; and where a mask may have made a value exactly 0, only if both sides are polynomials in it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.fx as fx

from ...program import NOTE, Note, Program, Role, RoleKind, Signature, graph_module, note
from ..forms import TensorForm, meta_value
from ..templates import Template
from .algebra import MINUS_INFINITY
from .calls import Ref
from .numbering import Numbering
from .ops.chain import is_chain

aten = torch.ops.aten

MAX_CONE = 64
"""Calls on either side of a lemma."""

MAX_ELEMENTS = 1 << 18
"""Of all values of a lemma: beyond, it is left to smaller sizes."""

MAX_STEPS = 64
"""Of a chain in a lemma, whose loop is evaluated in full: longer ones are left to smaller sizes, where they are as true."""

_CLEAN, _ZERO, _INFINITE = range(3)

_ENDS_INFINITY = {getattr(aten, name) for name in ("exp", "exp2", "_softmax", "_safe_softmax", "sigmoid")}
"""-inf becomes 0."""

_NAMES = """
add sub rsub mul neg sum mean cumsum mm bmm addmm baddbmm mv dot convolution view _unsafe_view reshape permute
transpose t unsqueeze squeeze expand slice select narrow cat stack split split_with_sizes unbind clone detach
alias contiguous _to_copy constant_pad_nd flip roll repeat tril triu slice_backward select_backward embedding
gather index index_select where masked_fill copy slice_scatter select_scatter index_add scatter_add square
zeros zeros_like full full_like new_zeros new_full ones ones_like arange
"""
POLYNOMIAL = {getattr(aten, name) for name in _NAMES.split()}
"""Ops that mean the same at 0 as anywhere."""


@dataclass
class Cones:
    """The two sides of a lemma. roots: the values that are to be the same; leaves: numbers that are arbitrary inputs of both; left,
    right: calls of each side, arguments first."""

    roots: tuple[int, int]
    leaves: list[int]
    left: list[int]
    right: list[int]


@dataclass
class Cutter:
    """Finds cones in a table whose first ``boundary`` values are the original program's. most: elements of all values of a cone."""

    table: Numbering
    boundary: int
    most: int = MAX_ELEMENTS
    marks: list[int] = field(default_factory=list)
    drawn: list[bool] = field(default_factory=list)
    masked: dict[Template, bool] = field(default_factory=dict)

    def cut(self, claim: int, number: int, behind: int) -> Cones | None:
        """Both sides over the nearest shared values; None where they are too large, or nothing may be arbitrary."""
        self._mark()
        leaves: dict[int, None] = {}
        right = self._cone(number, leaves, behind)
        left = None if right is None else [] if claim in leaves else self._cone(claim, leaves, None)
        if left is None or right is None or not leaves:
            return None
        forms = [self.table.form(n) for n in (*left, *right, *leaves)]
        if sum(math.prod(form.shape) for form in forms if type(form) is TensorForm) > self.most:
            return None
        if max(map(self._steps, (*left, *right)), default=0) > MAX_STEPS:
            return None
        if any(self.marks[leaf] is _ZERO for leaf in leaves) and not all(map(self._is_polynomial, (*left, *right))):
            return None
        return Cones((claim, number), list(leaves), left, right)

    def _cone(self, root: int, leaves: dict[int, None], behind: int | None) -> list[int] | None:
        """Calls between the root and the leaves, arguments first. behind: extend the leaves, to values that many shared values
        behind the first; None to stop at the given leaves, and else at inputs only."""
        depth = {root: 0}
        found: set[int] = set()
        stack = [root]
        while stack:
            number = stack.pop()
            if number in found:
                continue
            if (
                number != root
                and behind is not None
                and number < self.boundary
                and depth[number] >= behind
                and self._may_cut(number)
            ):
                leaves.setdefault(number)
            if number in leaves and number != root:
                continue
            call = self.table.calls[number]
            if call.target is None and number not in self.table.constants:
                leaves.setdefault(number)
                continue
            found.add(number)
            if len(found) > MAX_CONE:
                return None
            step = depth[number] + (number < self.boundary)
            for used in self.table.uses(number):
                depth[used] = min(depth.get(used, step), step)
                stack.append(used)
        return sorted(found)

    def _may_cut(self, number: int) -> bool:
        form = self.table.form(number)
        return type(form) is TensorForm and form.is_float and self.drawn[number] and self.marks[number] != _INFINITE

    def _steps(self, number: int) -> int:
        """Steps of a chain; 0 for any other call."""
        template = self.table.calls[number].template
        if template is None or getattr(template.target, "namespace", "") != "hocket" or not is_chain(template.target):
            return 0
        return max(arg for arg in template.args if type(arg) is int)

    def _is_polynomial(self, number: int) -> bool:
        call = self.table.calls[number]
        return call.target is None or getattr(call.target, "overloadpacket", None) in POLYNOMIAL

    def _mark(self) -> None:
        """Of every value: whether an input enters it, and whether it may be -inf or exactly 0 by a mask."""
        table = self.table
        for number in range(len(self.marks), len(table.calls)):
            call, uses = table.calls[number], table.uses(number)
            self.drawn.append((call.target is None and number not in table.constants) or any(self.drawn[n] for n in uses))
            mark = max((self.marks[n] for n in uses), default=_CLEAN)
            if number in table.constants:
                value = table.constants[number]
                mark = _INFINITE if value.is_floating_point() and bool((value < MINUS_INFINITY).any()) else _CLEAN
            elif call.template is not None and self._is_masked(call.template):
                mark = _INFINITE
            elif mark == _INFINITE and getattr(call.target, "overloadpacket", None) in _ENDS_INFINITY:
                mark = _ZERO
            self.marks.append(mark)

    def _is_masked(self, template: Template) -> bool:
        known = self.masked.get(template)
        if known is None:
            known = self.masked[template] = _has_mask_value((template.args, tuple(template.kwargs.values())))
        return known

    def key(self, cones: Cones) -> Any:
        """Lemmas with equal keys are the same lemma: names of values do not matter, forms of the leaves do."""
        places: dict[int, Any] = {leaf: (Ref, i, self.table.form(leaf)) for i, leaf in enumerate(cones.leaves)}
        sides: list[Any] = []
        for calls in (cones.left, cones.right):
            side = []
            for number in calls:
                call = self.table.calls[number]
                if number not in places:
                    places[number] = (Ref, len(places))
                what: Any = number if call.template is None else call.template
                side.append((places[number], what, tuple([places[operand] for operand in call.operands])))
            sides.append(tuple(side))
        return (*sides, *(places[root] for root in cones.roots))

    def programs(self, cones: Cones) -> tuple[Program, Program]:
        """Both sides as programs of their own."""
        left, right = (
            _Side(self.table, cones.leaves, calls, root).program()
            for root, calls in zip(cones.roots, (cones.left, cones.right), strict=True)
        )
        return left, right


@dataclass
class _Side:
    """One side of a lemma as a program of its own: its inputs are the leaves, its output the root."""

    table: Numbering
    leaves: list[int]
    calls: list[int]
    root: int

    def program(self) -> Program:
        graph, made = fx.Graph(), {}
        constants: dict[str, torch.Tensor] = {}
        roles = []
        held = [number for number in self.calls if self.table.calls[number].target is None]
        for number in (*self.leaves, *held):
            constant = self.table.constants.get(number)
            roles.append(Role(RoleKind.INPUT if constant is None else RoleKind.CONSTANT, f"v{number}"))
            if constant is not None:
                constants[f"v{number}"] = constant
            made[number] = self._noted(graph.placeholder(f"v{number}"), number)
        for number in self.calls:
            if number not in made:
                call = self.table.calls[number]
                assert call.template is not None
                args, kwargs = call.template.filled([made[operand] for operand in call.operands])
                made[number] = self._noted(graph.create_node("call_function", call.target, args, kwargs, f"v{number}"), number)
        graph.output((made[self.root],))
        signature = Signature(tuple(roles), (Role(RoleKind.OUTPUT, "value"),))
        return Program(graph_module(graph), signature, constants=constants)

    def _noted(self, node: fx.Node, number: int) -> fx.Node:
        node.meta["val"] = meta_value(self.table.form(number))
        node.meta[NOTE] = Note(source=note(self.table.calls[number].node).source)
        return node


def _has_mask_value(argument: Any) -> bool:
    if isinstance(argument, (list, tuple)):
        return any(map(_has_mask_value, argument))
    return type(argument) is float and not abs(argument) <= -MINUS_INFINITY
