"""Erasure: the 1-rank program that a well-typed program on many ranks computes, piece by piece.

    collectives -> nothing        local sizes -> global sizes        a change of reading -> a permutation

If the types hold, rank r of the program on pieces holds piece r of what the erased program computes, for every value and on every
rank. So the types prove the distribution, and what is left to prove is one equality between two programs on one rank.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
import torch.fx as fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.passes.fake_tensor_prop import FakeTensorProp

from ...errors import UnsupportedError
from ...program import NOTE, Program, annotate, graph_module, note
from ..forms import Form, TensorForm, form_of, propagate_forms
from .arguments import schema_of
from .check import check_types
from .factors import permutation
from .findings import TypeReport
from .integers import is_integer_function
from .problem import Moved, Op
from .value import Type

aten = torch.ops.aten

INSTEAD: dict[Any, Any] = {aten.view.default: aten.reshape.default, aten._unsafe_view.default: aten.reshape.default}
"""A view of pieces may be a view of memory where the same view of the whole value is not."""


def erase(program: Program, report: TypeReport | None = None) -> Program:
    """The logical program that a lowered one computes. Raises UnsupportedError where the types do not hold for all of it."""
    report = report or check_types(program)
    if report.status != "typed":
        first = (*report.problems, *report.untyped)[0]
        raise UnsupportedError(f"expected a program whose types all hold, found {report.status}: {first}")
    return _Eraser(program, report).run()


class _Eraser:
    def __init__(self, program: Program, report: TypeReport) -> None:
        self.program = program
        self.report = report
        self.graph = fx.Graph()
        self.made: dict[fx.Node, Any] = {}

    def run(self) -> Program:
        """Node by node; afterwards the values are propagated, which checks every shape once more."""
        forms = []
        for node in self.program.nodes:
            if node.op == "placeholder":
                self.made[node] = self.graph.placeholder(node.name)
                annotate_like(self.made[node], node)
                forms.append(self._input(node))
            elif node.op == "output":
                new = self.graph.output(tuple(None if r is None else self.made[r] for r in self.program.results))
                new.meta.update(node.meta)
            else:
                self.made[node] = self._call(node)
        if not propagate_forms(self.graph, forms):
            _propagate_fakes(self.graph, forms)
        return self.program.replace(graph=graph_module(self.graph), mesh=None)

    def _input(self, node: fx.Node) -> Form:
        value, found = node.meta["val"], self.report.types[node]
        return TensorForm(tuple(found.shape), value.dtype) if isinstance(found, Type) else form_of(value)

    def _call(self, node: fx.Node) -> Any:
        if is_integer_function(node.target):
            return self.report.types[node]
        op = self.report.typed[node]
        if node.target is operator.getitem:
            return self._emit(node, operator.getitem, (self.made[node.args[0]], node.args[1]), {})  # type: ignore[index]
        args, kwargs = self._arguments(node, op)
        if op.becomes >= 0:
            result = args[op.becomes]
        else:
            target = getattr(aten, op.target).default if op.target else INSTEAD.get(node.target, node.target)
            result = self._emit(node, target, tuple(args), kwargs)
        for move in op.moves_out:
            result = self._move(node, result, move)
        if op.times is not None:
            result = self._emit(node, aten.mul.Scalar, (result, op.times), {})
        return result

    def _arguments(self, node: fx.Node, op: Op) -> tuple[list[Any], dict[str, Any]]:
        args = [self._mapped(arg) for arg in node.args]
        kwargs = {name: self._mapped(arg) for name, arg in node.kwargs.items()}
        for position, value in op.new_args.items():
            if position < len(args):
                args[position] = value
            else:
                kwargs[schema_of(node.target)[position][0]] = value
        for move in op.moves_in:
            args[0] = self._move(node, args[0], move)
        for position, parts in op.undo_scale:
            args[position] = self._emit(node, aten.mul.Scalar, (args[position], parts), {})
        return args, kwargs

    def _mapped(self, argument: Any) -> Any:
        if isinstance(argument, fx.Node):
            return self.made[argument]
        if isinstance(argument, (list, tuple)):
            return [self._mapped(item) for item in argument]
        return argument

    def _move(self, node: fx.Node, value: fx.Node, move: Moved) -> fx.Node:
        split, order = permutation(self.report.axes, move)
        apart = self._emit(node, aten.reshape.default, (value, split), {})
        turned = self._emit(node, aten.permute.default, (apart, order), {})
        return self._emit(node, aten.reshape.default, (turned, [dim.size for dim in move.after]), {})

    def _emit(self, node: fx.Node, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> fx.Node:
        new = self.graph.create_node("call_function", target, args, kwargs)
        annotate_like(new, node)
        return new


def _propagate_fakes(graph: fx.Graph, forms: Sequence[Form]) -> None:
    """As ``propagate_forms``, op by op, for a program with an op whose form has to be asked for with its strides."""
    mode = FakeTensorMode()
    with mode:
        values = [torch.empty(form.shape, dtype=form.dtype) if isinstance(form, TensorForm) else form for form in forms]
    FakeTensorProp(fx.GraphModule(torch.nn.Module(), graph), mode).propagate_dont_convert_inputs(*values)


def annotate_like(new: fx.Node, old: fx.Node) -> None:
    """The note of the old node, without what it says about pieces."""
    new.meta[NOTE] = note(old)
    annotate(new, layouts=None, global_shapes=None)
