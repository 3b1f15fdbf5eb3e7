"""Lower a program to one rank's pieces, as the plan lays them out (the partitioning of GSPMD, arXiv 2105.04663, section 4).

    y = op(x_1, .., x_n)   becomes   y_local = op(move(x_1_local), .., move(x_n_local))

where ``move`` takes a value from the layout in which it was made to the one that the rule chosen for ``op`` consumes. The graph is
rewritten node by node, without running the model again: ops stay, constant sizes become local sizes, and the steps between layouts
are appended where a layout is first needed. A value is brought into a layout once; everybody who wants it there, or in a layout
further along the same steps, shares it.
"""

from __future__ import annotations

import dataclasses
import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.fx as fx

from ..compiler.contract import Context, Contract, Equal
from ..compiler.errors import HocketError, PlanError
from ..compiler.layout import Layout, format_layout, format_placement, local_shape
from ..compiler.layout import Shard as Cut
from ..compiler.plan.plan import NodePlan, Plan
from ..compiler.program import NOTE, Decision, Note, Program, annotate, graph_module, note, producer, tensor_leaves
from ..compiler.redistribute import Step, StepKind, steps, wire_bytes
from ..compiler.rules.localise import localise
from .check_plan import check_plan
from .collectives import emit_step
from .local_graph import LocalGraph

aten = torch.ops.aten


@dataclass(frozen=True)
class Shard:
    """Rewrite a logical program for one rank of ``context.plan.mesh``; every rank runs the result.

    The signature stays; ``Note.layouts`` and ``Note.global_shapes`` of placeholders and results say how pieces make whole values.
    Raises PlanError when there is no plan, or when the plan does not fit the program.
    """

    name: ClassVar[str] = "shard"
    contract: ClassVar[Contract] = Equal()

    def __call__(self, program: Program, context: Context) -> Program:
        """The lowered program, with a Decision for every collective."""
        if program.mesh is not None:
            raise HocketError(f"expected a logical program, found one that is already lowered to mesh {program.mesh}")
        if context.plan is None:
            raise PlanError("expected a plan in the context, found none; run the planner before the shard pass")
        check_plan(program, context.plan, context.mesh)
        return _Lowering(program, context.plan).run()


class _Lowering:
    """The state of one rewrite: for each logical node, the lowered nodes that hold its value, by layout."""

    def __init__(self, program: Program, plan: Plan) -> None:
        self.program = program
        self.plan = plan
        self.local = LocalGraph(plan.mesh)
        self.made: dict[fx.Node, fx.Node] = {}
        self.held: dict[tuple[fx.Node, Layout], fx.Node] = {}
        self.decisions: list[Decision] = []

    def run(self) -> Program:
        for node in self.program.nodes:
            if node.op == "output":
                self._finish(node)
            else:
                self._lower(node)
        return self.program.replace(graph=graph_module(self.local.graph), mesh=self.plan.mesh).decided(*self.decisions)

    def _lower(self, node: fx.Node) -> None:
        if node.op == "placeholder":
            new = self.local.graph.placeholder(node.name)
        elif node.target is operator.getitem:
            source, index = node.args
            new = self.local.graph.create_node("call_function", operator.getitem, (self.made[source], index), {}, node.name)  # type: ignore[index]
        else:
            new = self._call(node, self.plan.nodes[node.name])
        self._describe(node, new)
        self.made[node] = new
        if isinstance(node.meta["val"], torch.Tensor):
            self.held[node, _layout_of(node, self.plan)] = new

    def _call(self, node: fx.Node, wanted: NodePlan) -> fx.Node:
        remaining = iter(wanted.inputs)

        def move(argument: fx.Node) -> fx.Node:
            if isinstance(argument.meta["val"], torch.Tensor):
                return self._move(argument, next(remaining), node)
            return self.made[argument]

        args, kwargs = fx.node.map_arg((node.args, node.kwargs), move)
        first = _first_tensor(node)
        if first is not None:
            layout = wanted.outputs[first]
            assert layout is not None  # check_plan
            shape = _shapes(node)[first]
            assert shape is not None
            self.local.template = _added_for(node)
            target, args, kwargs = localise(node.target, args, kwargs, self.local.sizes(shape, layout))
            if target is aten.reshape.default:
                _check_reshape(node, wanted, self.plan)
        else:
            target = node.target
        return self.local.graph.create_node("call_function", target, args, kwargs, node.name)

    def _describe(self, node: fx.Node, new: fx.Node) -> None:
        """Rank 0's piece and the note of a node that stands for a logical one."""
        layouts, shapes = _layouts(node, self.plan), _shapes(node)
        pieces = [
            value if layout is None or shape is None else self.local.piece_of(value, layout)
            for value, layout, shape in zip(tensor_leaves(node.meta["val"]), layouts, shapes, strict=True)
        ]
        value = node.meta["val"]
        new.meta.update(node.meta)
        new.meta["val"] = type(value)(pieces) if isinstance(value, (tuple, list)) else pieces[0]
        old = note(node)
        new.meta[NOTE] = dataclasses.replace(
            old, layouts=layouts, global_shapes=shapes, origin=old.origin or node.name, carries=node.name
        )

    def _finish(self, output: fx.Node) -> None:
        """Every result in the layout in which it must leave."""
        results: list[fx.Node | None] = []
        for value, layout in zip(self.program.results, self.plan.results, strict=True):
            if value is None or layout is None:
                results.append(value and self.made[value])
            else:
                results.append(self._move(value, layout, output))
        new = self.local.graph.output(tuple(results))
        new.meta.update(output.meta)

    def _move(self, value: fx.Node, target: Layout, consumer: fx.Node) -> fx.Node:
        """The node that holds ``value`` in the target layout; the steps are appended where nobody has needed them yet."""
        current = self.held.get((value, target))
        if current is not None:
            return current
        try:
            path = steps(_layout_of(value, self.plan), target)
        except HocketError as error:
            raise PlanError(f"the plan wants {value.name} for {consumer.name} ({_place(consumer, value)}): {error}") from None
        shape = tuple(value.meta["val"].shape)
        current = self.made[value]
        for step in path:
            found = self.held.get((value, step.after))
            if found is None:
                self.local.template = _added_for(value if consumer.op == "output" else consumer)
                found = emit_step(self.local, step, current, shape, f"{value.name}_{step.kind}_{self.plan.mesh.names[step.axis]}")
                annotate(found, layouts=(step.after,), global_shapes=(shape,), carries=value.name)
                self.held[value, step.after] = found
                self._decide(step, value, consumer, found)
            current = found
        return current

    def _decide(self, step: Step, value: fx.Node, consumer: fx.Node, made: fx.Node) -> None:
        axis, parts = self.plan.mesh.axes[step.axis]
        if step.kind is StepKind.SLICE or parts == 1:
            return
        val = value.meta["val"]
        sent = wire_bytes(step, val.shape, val.element_size(), self.plan.mesh)
        change = f"{format_placement(step.source)} -> {format_placement(step.target)}"
        wants = "leaves the program" if consumer.op == "output" else f"is needed by {consumer.name}"
        reason = f"{step.kind} over {axis}, {change}, {sent:g} bytes a rank: {value.name} {wants}"
        self.decisions.append(Decision(Shard.name, made.name, applied=True, reason=reason, source=_place(consumer, value)))


def _place(consumer: fx.Node, value: fx.Node) -> str:
    return note(value if consumer.op == "output" else consumer).source or "unknown source"


def _added_for(consumer: fx.Node) -> Note:
    """The note of a node that the pass adds for a consumer."""
    old = note(consumer)
    return Note(phase=old.phase, region=old.region, source=old.source, module=old.module, stage=old.stage, added_by=Shard.name)


def _layout_of(node: fx.Node, plan: Plan) -> Layout:
    """The layout in which a tensor is made."""
    source, index = producer(node)
    layout = plan.nodes[source.name].outputs[index]
    assert layout is not None  # check_plan
    return layout


def _layouts(node: fx.Node, plan: Plan) -> tuple[Layout | None, ...]:
    if node.target is operator.getitem:
        source, index = producer(node)
        return (plan.nodes[source.name].outputs[index],)
    return plan.nodes[node.name].outputs


def _shapes(node: fx.Node) -> tuple[tuple[int, ...] | None, ...]:
    """Global shape per output, None for what is no tensor."""
    leaves = tensor_leaves(node.meta["val"])
    return tuple(tuple(map(int, leaf.shape)) if isinstance(leaf, torch.Tensor) else None for leaf in leaves)


def _first_tensor(node: fx.Node) -> int | None:
    return next((i for i, leaf in enumerate(tensor_leaves(node.meta["val"])) if isinstance(leaf, torch.Tensor)), None)


def _check_reshape(node: fx.Node, wanted: NodePlan, plan: Plan) -> None:
    """Pieces of a reshape hold the same number of elements before and after, on every rank."""
    source = node.args[0]
    assert isinstance(source, fx.Node)
    before, after = wanted.inputs[0], wanted.outputs[0]
    old, new = _shapes(source)[0], _shapes(node)[0]
    assert after is not None
    assert old is not None
    assert new is not None
    even = _is_even(old, before, plan) and _is_even(new, after, plan)
    for rank in range(1 if even else plan.mesh.size):
        have, want = local_shape(old, before, plan.mesh, rank), local_shape(new, after, plan.mesh, rank)
        if math.prod(have) != math.prod(want):
            raise PlanError(
                f"the plan reshapes pieces that do not match: {node.name} takes {list(old)} in {format_layout(before)} to "
                f"{list(new)} in {format_layout(after)}, but rank {rank} has {list(have)} and would need {list(want)} "
                f"(from {note(node).source or 'unknown source'})"
            )


def _is_even(shape: Sequence[int], layout: Layout, plan: Plan) -> bool:
    """All ranks hold pieces of the same shape."""
    sizes = list(shape)
    for placement, parts in zip(layout, plan.mesh.shape, strict=True):
        if isinstance(placement, Cut):
            sizes[placement.dim], rest = divmod(sizes[placement.dim], parts)
            if rest:
                return False
    return True
