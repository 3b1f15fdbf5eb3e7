"""One step of a recurrence, traced while the whole program is being traced: a body graph and the tensors that it closes over."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.fx as fx
import torch.utils._pytree as pytree
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx.experimental.proxy_tensor import get_proxy_mode, make_fx
from torch.utils._python_dispatch import _disable_current_modes

from ..errors import CaptureError
from ..program import output_node
from ..rules.decompose import exact_decompositions
from .bodies import BodyGraph

_IDENTITIES = (
    torch.ops.aten.detach.default,
    torch.ops.aten.alias.default,
    torch.ops.aten.lift_fresh_copy.default,
    torch.ops.aten.lift_fresh.default,
)


def is_tracing() -> bool:
    """Whether a program is being captured around this call."""
    return get_proxy_mode() is not None


def fake_mode(tensors: Sequence[Tensor]) -> FakeTensorMode:
    """The mode of the first fake tensor among some."""
    for tensor in tensors:
        if isinstance(tensor, FakeTensor):
            return tensor.fake_mode
    return FakeTensorMode(allow_non_fake_inputs=True)


def trace_step(
    step: Callable[..., tuple[Sequence[Tensor], Sequence[Tensor]]], carries: Sequence[Tensor], slices: Sequence[Tensor], where: str
) -> tuple[BodyGraph, list[Tensor]]:
    """The body of ``step(carries, slices) -> (next, emits)`` and the tensors it closes over, which become its shared values.

    carries, slices: tensors of the outer trace. where: names the step in errors. CaptureError for a step that draws random numbers,
    changes an input, or changes the form of a carry.
    """
    mode = fake_mode((*carries, *slices))
    with _disable_current_modes(), mode, torch.no_grad():
        examples = [torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=t.device) for t in (*carries, *slices)]
        count = len(carries)

        def flat(*inputs: Tensor) -> Any:
            after, emits = step(list(inputs[:count]), list(inputs[count:]))
            return (*after, *emits)

        traced = make_fx(
            torch.func.functionalize(flat, remove="mutations"),
            decomposition_table=exact_decompositions(),
            _allow_non_fake_inputs=True,
        )(*examples)
    return _lifted(traced, count, where)


def _lifted(traced: fx.GraphModule, carries: int, where: str) -> tuple[BodyGraph, list[Tensor]]:
    graph = traced.graph
    shared: list[Tensor] = []
    nodes: dict[int, fx.Node] = {}
    inputs = [n for n in graph.nodes if n.op == "placeholder"]
    anchor = inputs[carries - 1]
    for node in list(graph.nodes):
        if node.op == "get_attr":
            value = getattr(traced, str(node.target))
            if id(value) not in nodes:
                with graph.inserting_after(anchor):
                    nodes[id(value)] = anchor = graph.placeholder(f"shared_{len(shared)}")
                anchor.meta["val"] = node.meta.get("val", value)
                shared.append(value)
            node.replace_all_uses_with(nodes[id(value)])
            graph.erase_node(node)
        elif node.target in _IDENTITIES:
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
        elif isinstance(node.target, torch._ops.OpOverload):
            _check(node, where)
    graph.eliminate_dead_code()
    body = BodyGraph(graph, carries, len(shared))
    result = output_node(graph).args[0]
    found = tuple(result) if isinstance(result, (tuple, list)) else (result,)
    output_node(graph).args = ((found[:carries], found[carries:]),)
    for before, new in zip(body.carry_inputs, body.following, strict=True):
        old_form, new_form = before.meta["val"], new.meta["val"]
        if old_form.shape != new_form.shape or old_form.dtype != new_form.dtype:
            raise CaptureError(
                f"{where}: the state keeps its shape and dtype from step to step; it goes in as {tuple(old_form.shape)} "
                f"{old_form.dtype} and comes out as {tuple(new_form.shape)} {new_form.dtype}"
            )
    return body, shared


def _check(node: fx.Node, where: str) -> None:
    op: Any = node.target
    if torch.Tag.nondeterministic_seeded in op.tags:
        raise CaptureError(f"{where}: the step draws random numbers ({op}); draw them before the chain and pass them in ``xs``")
    if op._schema.is_mutable:
        raise CaptureError(f"{where}: the step changes one of its inputs in place ({op}); return the new value instead")


def tensors_of(tree: Any, where: str) -> tuple[list[Tensor], pytree.TreeSpec]:
    """The leaves of a tree, all of which must be tensors."""
    leaves, spec = pytree.tree_flatten(tree)
    wrong = next((leaf for leaf in leaves if not isinstance(leaf, Tensor)), None)
    if wrong is not None or not leaves:
        raise CaptureError(f"{where}: expected tensors only, found {type(wrong).__name__ if wrong is not None else 'none at all'}")
    return leaves, spec
