"""Placement types (the first level of proof): re-derive how every value of a lowered program lies over the ranks.

Only the layouts of the inputs are believed. Every op is typed by its rule, for all ranks at once: the cost does not depend on how
many there are. The layouts that a pass declared are then compared with what was derived. What is checked:

1. every op means on pieces what it means on whole values (no partial sum is squared, no cut dimension is normalised, ...);
2. every collective has something to do, over an axis that exists, on pieces of equal length;
3. the declared layout of every node is the derived one, and no result leaves with a reduction missing;
4. rank 0's piece has the shape that the type says.

If all of it holds, the program on pieces equals the 1-rank program that ``erase`` makes, piece by piece on every rank.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Hashable
from typing import Any

import torch
import torch.fx as fx

from ....runtime.collector import without_collector
from ...errors import InputError
from ...program import Program, note, tensor_leaves
from ..templates import Template, Templates
from .arguments import all_whole, arguments, factor_varies, mentions
from .declared import agree, hints_of
from .findings import Finding, TypeReport, resolve
from .integers import evaluate
from .problem import IllTyped, Moved, Op, Untypable
from .repeats import Repeats
from .table import facts_of
from .value import Axes, Dim, Type


class _Untyped:
    """Stands for a value without a type."""


UNTYPED = _Untyped()


def check_types(program: Program, original: Program | None = None, templates: Templates | None = None) -> TypeReport:
    """Type a lowered program. original: if given, its shapes must be the global ones; templates: of programs that this one is to be
    compared with. Raises InputError for a logical program."""
    if program.mesh is None:
        raise InputError("expected a program lowered to a mesh, found a logical one; there is nothing to type")
    with without_collector():
        return resolve(functools.partial(_check, program, original, templates or Templates()), program)


def _check(program: Program, original: Program | None, templates: Templates, flipped: frozenset[fx.Node]) -> TypeReport:
    checker = _Checker(program, original, templates)
    for node in program.nodes:
        if node.op != "output":
            checker.node(node, flipped=node in flipped)
    checker.results()
    problems, untyped = tuple(checker.problems), tuple(checker.untyped)
    return TypeReport(problems, untyped, checker.ops, checker.axes, checker.types, checker.typed, checker.calls, checker.templates)


class _Checker:
    def __init__(self, program: Program, original: Program | None, templates: Templates) -> None:
        assert program.mesh is not None
        self.program = program
        self.axes = Axes(program.mesh)
        self.types: dict[fx.Node, Any] = {}
        self.typed: dict[fx.Node, Op] = {}
        self.problems: list[Finding] = []
        self.untyped: list[Finding] = []
        self.ops = 0
        self.original = original
        self.originals = {} if original is None else {n.name: n for n in original.nodes if "val" in n.meta}
        self.templates = templates
        self.calls: dict[fx.Node, tuple[Template, tuple[fx.Node, ...]]] = {}
        self.repeats = Repeats(self.originals)
        self.looked_ahead = False

    # one node ----------------------------------------------------------------------------------------------------------------

    def node(self, node: fx.Node, *, flipped: bool) -> None:
        """Type one node, or take over how one just like it was typed."""
        key = None
        if node.op == "call_function":
            self.ops += 1
            template, operands = self.calls[node] = self.templates.of(node.target, node.args, node.kwargs)
            key = self.repeats.key(node, note(node), template, operands, flipped=flipped)
            known = None if key is None else self.repeats.known.get(key)
            if known is not None:
                self.types[node], self.typed[node], self.repeats.states[node] = known
                return
        self._judge(node, key, flipped=flipped)

    def _judge(self, node: fx.Node, key: Hashable | None, *, flipped: bool) -> None:
        """Type one node; key: to remember the judgement by."""
        op = Op(self.axes, node, hints_of(node, self.axes))
        op.flipped, self.looked_ahead = flipped, False
        before = len(self.problems) + len(self.untyped)
        try:
            found = self._derive(node, op)
            self._compare_shapes(node, found)
        except IllTyped as problem:
            self.problems.append(self._finding(node, problem))
            found = self._declared(op, node)
        except Untypable as problem:
            self.untyped.append(self._finding(node, problem))
            found = self._declared(op, node)
        else:
            self.typed[node] = op
            found = self._compare(node, op, found)
        self.types[node] = found
        if len(self.problems) + len(self.untyped) > before:
            self.repeats.forget(node)
        else:
            self.repeats.keep(node, found, op, None if self.looked_ahead else key)

    def _derive(self, node: fx.Node, op: Op) -> Any:
        target = node.target
        if node.op == "placeholder":
            return self._input(node, op)
        if target is operator.getitem:
            source = self.types[node.args[0]]  # type: ignore[index]
            return source[node.args[1]] if isinstance(source, (tuple, list)) else source  # type: ignore[index]
        args = arguments(node, self.types)
        facts = facts_of(target)
        if facts.is_integer:
            return evaluate(self.axes, target, args)
        if mentions(args, UNTYPED):
            raise Untypable("it depends on a value without a type")
        if factor_varies(target, args):
            raise Untypable("the ranks compute with different numbers")
        if not facts.is_asked and all_whole(args) and all(hint is None or self._is_whole_hint(hint) for hint in op.hints):
            return self._whole(node)
        if facts.rule is None:
            raise Untypable(f"no type rule for {target} on pieces")
        op.look_ahead = functools.partial(self._look_ahead, node)
        try:
            return facts.rule(op, *args)
        except (TypeError, ValueError, IndexError, AttributeError, ZeroDivisionError) as error:
            raise Untypable(f"the type rule does not fit these arguments ({type(error).__name__}: {error})") from error

    def _is_whole_hint(self, hint: Any) -> bool:
        declared = self.axes.from_layout(*hint)
        return declared is not None and declared.is_whole

    def _whole(self, node: fx.Node) -> Any:
        value = node.meta["val"]
        leaves = [self.axes.whole(leaf.shape) if isinstance(leaf, torch.Tensor) else None for leaf in tensor_leaves(value)]
        return tuple(leaves) if isinstance(value, (tuple, list)) else leaves[0]

    def _input(self, node: fx.Node, op: Op) -> Any:
        value = node.meta["val"]
        if not isinstance(value, torch.Tensor):
            return value
        hint = op.hint()
        if hint is None:
            raise Untypable(f"input {node.name} has no layout of plain shards, replicas and partial values")
        return hint

    def _look_ahead(self, node: fx.Node) -> Type | None:
        """The declared type of the first declared node behind this one; a complex one as the pairs of reals that lead to it."""
        self.looked_ahead = True
        pairs = False
        for _ in range(8):
            users = list(node.users)
            if len(users) != 1 or users[0].op == "output" or note(users[0]).origin:
                return None
            node = users[0]
            pairs |= node.target is torch.ops.aten.view_as_complex.default
            found = Op(self.axes, node, hints_of(node, self.axes)).hint()
            if found is not None:
                return found.with_dims((*found.dims, Dim(2))) if pairs else found
        return None

    # what was declared -------------------------------------------------------------------------------------------------------

    def _declared(self, op: Op, node: fx.Node) -> Any:
        """The declared types of a node that has no derived one, so that the rest can still be judged."""
        value = node.meta.get("val")
        leaves = tensor_leaves(value)
        found = [op.hint(i) if isinstance(leaf, torch.Tensor) else None for i, leaf in enumerate(leaves)]
        if any(isinstance(leaf, torch.Tensor) and item is None for leaf, item in zip(leaves, found, strict=True)):
            return UNTYPED
        if isinstance(value, int):
            return UNTYPED
        return tuple(found) if isinstance(value, (tuple, list)) else found[0]

    def _compare(self, node: fx.Node, op: Op, found: Any) -> Any:
        if not isinstance(found, (tuple, list)):
            return self._agree(node, op, 0, found) if isinstance(found, Type) else found
        return tuple(self._agree(node, op, i, item) if isinstance(item, Type) else item for i, item in enumerate(found))

    def _agree(self, node: fx.Node, op: Op, index: int, found: Type) -> Type:
        hint = op.hint(index)
        if hint is None:
            return found
        same, moved = agree(op, found, hint, may_move=not note(node).origin and node.op == "call_function")
        if moved is not None:
            op.moves_out.append(Moved(found.dims, moved))
        if same is not None:
            self._compare_original(node, index, same)
            return same
        self.problems.append(self._finding(node, IllTyped(self._disagreement(node, found, hint))))
        return hint

    def _disagreement(self, node: fx.Node, found: Type, hint: Type) -> str:
        missing = [self.axes.names[i] for i, (a, b) in enumerate(zip(found.partial, hint.partial, strict=True)) if a and not b]
        again = [self.axes.names[i] for i, (a, b) in enumerate(zip(found.partial, hint.partial, strict=True)) if b and not a]
        kind = "the result is" if node in set(self.program.results) else "it is"
        text = f"{kind} declared {self._show(hint)} but is {self._show(found)}"
        if missing:
            return f"{text}: a reduction over {', '.join(missing)} is missing"
        return f"{text}: it would be reduced over {', '.join(again)} again" if again else text

    def _show(self, value: Type) -> str:
        return f"{self.axes.describe(value)} of {list(value.shape)}"

    def _compare_original(self, node: fx.Node, index: int, found: Type) -> None:
        same = self.originals.get(note(node).carries or note(node).origin)
        leaves = tensor_leaves(same.meta["val"]) if same is not None else []
        if index < len(leaves) and isinstance(leaves[index], torch.Tensor) and tuple(leaves[index].shape) != found.shape:
            text = f"the pieces make a value of {list(found.shape)}, the original is {list(leaves[index].shape)}"
            self.problems.append(self._finding(node, IllTyped(text)))

    def _compare_shapes(self, node: fx.Node, found: Any) -> None:
        items = found if isinstance(found, (tuple, list)) else [found]
        for leaf, item in zip(tensor_leaves(node.meta.get("val")), items, strict=False):
            if isinstance(leaf, torch.Tensor) and isinstance(item, Type):
                local = tuple([dim.size if not dim.cuts else self.axes.first_rank(self.axes.length(dim)) for dim in item.dims])
                if local != leaf.shape:
                    raise IllTyped(
                        f"rank 0 holds a piece of {list(leaf.shape)}, its type {self.axes.describe(item)} says {list(local)}"
                    )

    # results -----------------------------------------------------------------------------------------------------------------

    def results(self) -> None:
        """No result leaves unfinished by accident."""
        whole = {} if self.original is None else dict(zip(self.original.signature.outputs, self.original.results, strict=True))
        for role, node in zip(self.program.signature.outputs, self.program.results, strict=True):
            if node is None or not isinstance(self.types.get(node), Type):
                continue
            found: Type = self.types[node]
            true = whole.get(role)
            if true is not None and tuple(true.meta["val"].shape) != found.shape:
                text = f"the result {role} is {self._show(found)}, the original is {list(true.meta['val'].shape)}"
                self.problems.append(self._finding(node, IllTyped(text)))
            if note(node).layouts is None and found.is_partial:
                text = f"the result {role} leaves as {self.axes.describe(found)} and is declared nowhere: a reduction is missing"
                self.problems.append(self._finding(node, IllTyped(text)))

    def _finding(self, node: fx.Node, problem: IllTyped | Untypable) -> Finding:
        operands = getattr(problem, "operands", ())
        lines = [note(node).source]
        for position in operands:
            argument = node.args[position] if position < len(node.args) else None
            if isinstance(argument, fx.Node):
                lines.append(note(argument).source)
        return Finding(node.name, str(node.target), str(problem), tuple(lines))
