"""Erasure: the 1-rank program that a well-typed program on many ranks computes, piece by piece.

    collectives -> nothing        local sizes -> global sizes        a change of reading -> a permutation

If the types hold, rank r of the program on pieces holds piece r of what the erased program computes, for every value and on every
rank. So the types prove the distribution, and what is left to prove is one equality between two programs on one rank.

What becomes of a node depends on its template, on how the types judged it, and on which of its operands are integers that are now
literals. Nodes that were judged as one (``check``) agree in all of that, so it is worked out once and replayed.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.fx as fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.passes.fake_tensor_prop import FakeTensorProp

from ...errors import UnsupportedError
from ...program import NOTE, Program, annotate, graph_module, note
from ..forms import Form, TensorForm, form_of, propagate_forms
from ..templates import Line, Lines, Place, Template, fill
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
    erased = erased_lines(program, report or check_types(program))
    graph = fx.Graph()
    made: list[fx.Node] = []
    for line in erased.lines:
        if line.template is None:
            made.append(graph.placeholder(line.node.name))
        else:
            args, kwargs = line.template.filled([made[place] for place in line.operands])
            made.append(graph.create_node("call_function", line.template.target, args, kwargs))
        annotate_like(made[-1], line.node)
    output = graph.output(tuple(made[result] if type(result) is Place else result for result in erased.results))
    output.meta.update(next(node.meta for node in reversed(program.graph.graph.nodes) if node.op == "output"))
    forms = [line.form for line in erased.lines if line.template is None]
    if not propagate_forms(graph, forms):
        _propagate_fakes(graph, forms)
    return program.replace(graph=graph_module(graph), mesh=None)


def erased_lines(program: Program, report: TypeReport) -> Lines:
    """The same as a list, with the templates of the report. Raises UnsupportedError where the types do not hold for all of it."""
    if report.status != "typed":
        first = (*report.problems, *report.untyped)[0]
        raise UnsupportedError(f"expected a program whose types all hold, found {report.status}: {first}")
    return _Eraser(program, report).run()


class _Step(NamedTuple):
    """A call of the 1-rank program. operands: of the node where not negative, else -1 for the first step, -2 for the second, ..."""

    template: Template
    operands: tuple[int, ...]


class _Steps(NamedTuple):
    """What a node becomes. result: as an operand of a step."""

    steps: tuple[_Step, ...]
    result: int


class _Eraser:
    def __init__(self, program: Program, report: TypeReport) -> None:
        self.program = program
        self.report = report
        self.lines: list[Line] = []
        self.places: dict[fx.Node, int] = {}
        self.steps: dict[Op, _Steps] = {}

    def run(self) -> Lines:
        """Node by node."""
        for node in self.program.graph.graph.nodes:
            if node.op == "placeholder":
                self.places[node] = len(self.lines)
                self.lines.append(Line(node, None, (), form=self._input(node)))
            elif node.op == "call_function" and not is_integer_function(node.target):
                self._call(node)
        results = [self._result(node) for node in self.program.results]
        return Lines(self.program.replace(mesh=None), self.lines, results, self.report.templates)

    def _result(self, node: fx.Node | None) -> Any:
        if node is None:
            return None
        return Place(self.places[node]) if node in self.places else self.report.types[node]

    def _input(self, node: fx.Node) -> Form:
        value, found = node.meta["val"], self.report.types[node]
        return TensorForm(tuple(found.shape), value.dtype) if isinstance(found, Type) else form_of(value)

    def _call(self, node: fx.Node) -> None:
        template, operands = self.report.calls[node]
        op = self.report.typed[node]
        found = self.steps.get(op)
        if found is None:
            literals = {i: self.report.types[operand] for i, operand in enumerate(operands) if operand not in self.places}
            found = self.steps[op] = _Rewriting(template, op, literals, self.report).run()
        made: list[int] = []
        for step in found.steps:
            held = tuple([self.places[operands[at]] if at >= 0 else made[-1 - at] for at in step.operands])
            made.append(len(self.lines))
            self.lines.append(Line(node, step.template, held, is_whole=-len(made) == found.result))
        at = found.result
        self.places[node] = self.places[operands[at]] if at >= 0 else made[-1 - at]


class _Held(int):
    """An operand of the node, or what an earlier step made, in the arguments of a step."""

    __slots__ = ()


@dataclass
class _Rewriting:
    """Works out what a node becomes. literals: operands that are integers, by place."""

    template: Template
    op: Op
    literals: dict[int, Any]
    report: TypeReport

    def __post_init__(self) -> None:
        self.made: list[_Step] = []
        self.operands = [self.literals.get(i, _Held(i)) for i in range(self.template.holes)]

    def run(self) -> _Steps:
        op, template = self.op, self.template
        if template.target is operator.getitem:
            result: Any = self._emit(operator.getitem, fill(template.args, self.operands), {})
            return _Steps(tuple(self.made), int(result))
        args, kwargs = self._arguments()
        if op.becomes >= 0:
            result = args[op.becomes]
        else:
            target = getattr(aten, op.target).default if op.target else INSTEAD.get(template.target, template.target)
            result = self._emit(target, tuple(args), kwargs)
        for move in op.moves_out:
            result = self._move(result, move)
        if op.times is not None:
            result = self._emit(aten.mul.Scalar, (result, op.times), {})
        return _Steps(tuple(self.made), int(result))

    def _arguments(self) -> tuple[list[Any], dict[str, Any]]:
        op = self.op
        args = [fill(item, self.operands) for item in self.template.args]
        kwargs = {name: fill(item, self.operands) for name, item in self.template.kwargs.items()}
        for position, value in op.new_args.items():
            if position < len(args):
                args[position] = value
            else:
                kwargs[schema_of(self.template.target)[position][0]] = value
        for move in op.moves_in:
            args[0] = self._move(args[0], move)
        for position, parts in op.undo_scale:
            args[position] = self._emit(aten.mul.Scalar, (args[position], parts), {})
        return args, kwargs

    def _move(self, value: _Held, move: Moved) -> _Held:
        split, order = permutation(self.report.axes, move)
        apart = self._emit(aten.reshape.default, (value, split), {})
        turned = self._emit(aten.permute.default, (apart, order), {})
        return self._emit(aten.reshape.default, (turned, [dim.size for dim in move.after]), {})

    def _emit(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Held:
        template, operands = self.report.templates.of(target, args, kwargs, _Held)
        self.made.append(_Step(template, tuple([int(held) for held in operands])))
        return _Held(-len(self.made))


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
