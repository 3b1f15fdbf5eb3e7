"""Does a plan fit a program? Checked at the door of lowering, so that everything behind it may rely on it."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence

import torch
import torch.fx as fx

from ..compiler.errors import PlanError
from ..compiler.layout import Layout, Partial, Replicate, Shard, format_layout, has_empty_piece
from ..compiler.plan.plan import Plan
from ..compiler.program import Program, note, tensor_inputs, tensor_leaves
from ..runtime.mesh import Mesh


def check_plan(program: Program, plan: Plan, mesh: Mesh) -> None:
    """Raise PlanError, naming the node and the user's line, unless

    1. the plan is for this mesh, names every placeholder and call of the program (``getitem`` apart) and nothing else;
    2. it gives one layout per tensor argument and per output, None exactly for outputs that are no tensors;
    3. every layout has one placement a mesh axis, and cuts only dimensions that exist; no call is left with an empty piece on some
       rank (kernels are not made for them: attention on CPU kills the process);
    4. it gives one layout per result of the program, None exactly for absent ones.
    """
    if plan.mesh != mesh:
        raise PlanError(f"expected a plan for mesh {mesh}, found one for {plan.mesh}; plan again for this mesh")
    planned = {node.name: node for node in program.nodes if node.op != "output" and node.target is not operator.getitem}
    for name in plan.nodes:
        if name not in planned:
            raise PlanError(f"the plan names {name!r}, but the program has no such node; was it made for another program?")
    for name, node in planned.items():
        if name not in plan.nodes:
            raise PlanError(f"the plan has no entry for {_where(node)}; was it made for another program?")
        _check_node(node, plan)
    _check_results(program, plan)


def _check_node(node: fx.Node, plan: Plan) -> None:
    entry = plan.nodes[node.name]
    arguments = tensor_inputs(node)
    if len(entry.inputs) != len(arguments):
        raise PlanError(f"{_where(node)} has {len(arguments)} tensor arguments, but the plan gives {len(entry.inputs)} layouts")
    leaves = tensor_leaves(node.meta["val"])
    where = _where(node)
    if len(entry.outputs) != len(leaves):
        raise PlanError(f"{where} has {len(leaves)} outputs, but the plan gives {len(entry.outputs)} layouts")
    for index, (argument, layout) in enumerate(zip(arguments, entry.inputs, strict=True)):
        shape = argument.meta["val"].shape
        _check_layout(layout, shape, plan.mesh, f"argument {index} ({argument.name}) of {where}")
        _check_nobody_is_idle(layout, shape, plan.mesh, f"argument {index} ({argument.name}) of {where}")
    _check_leaves(leaves, entry.outputs, plan.mesh, where)
    for index, made in enumerate(entry.outputs if node.op == "call_function" else ()):
        if made is not None:
            _check_nobody_is_idle(made, leaves[index].shape, plan.mesh, f"output {index} of {where}")


def _check_results(program: Program, plan: Plan) -> None:
    results = program.results
    if len(plan.results) != len(results):
        raise PlanError(f"the program has {len(results)} results, but the plan gives {len(plan.results)} layouts")
    for role, node, layout in zip(program.signature.outputs, results, plan.results, strict=True):
        value = node.meta["val"] if isinstance(node, fx.Node) else None
        _check_leaves([value], [layout], plan.mesh, f"result {role}")


def _check_leaves(leaves: Sequence[object], layouts: Iterable[Layout | None], mesh: Mesh, where: str) -> None:
    for index, (leaf, layout) in enumerate(zip(leaves, layouts, strict=True)):
        if isinstance(leaf, torch.Tensor) != (layout is not None):
            kind = "a tensor" if isinstance(leaf, torch.Tensor) else "no tensor"
            raise PlanError(f"output {index} of {where} is {kind}, but the plan gives it the layout {format_layout(layout)}")
        if isinstance(leaf, torch.Tensor):
            _check_layout(layout or (), leaf.shape, mesh, f"output {index} of {where}")


def _check_layout(layout: Layout, shape: Sequence[int], mesh: Mesh, what: str) -> None:
    if len(layout) != len(mesh.axes):
        raise PlanError(f"{what}: expected one placement per axis of mesh {mesh}, found {format_layout(layout)}")
    for placement in layout:
        known = type(placement) in (Replicate, Shard) or isinstance(placement, Partial)
        if not known or (isinstance(placement, Shard) and not 0 <= placement.dim < len(shape)):
            raise PlanError(f"{what}: layout {format_layout(layout)} does not fit shape {list(shape)}")


def _check_nobody_is_idle(layout: Layout, shape: Sequence[int], mesh: Mesh, what: str) -> None:
    if has_empty_piece(shape, layout, mesh):
        raise PlanError(f"{what}: layout {format_layout(layout)} on mesh {mesh} leaves some rank nothing of shape {list(shape)}")


def _where(node: fx.Node) -> str:
    return f"{node.name} = {node.target} (from {note(node).source or 'unknown source'})"
