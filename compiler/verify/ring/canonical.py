"""Canonical forms of expressions with square roots.

The ring's root map s is multiplicative, but s(x)^2 = x holds only for some x (every finite field of odd order has non-squares). So
equal real expressions that square a root may differ in the ring; ``compare`` then tries again on canonical forms. Every rewrite
below is an identity for positive x, so equality of the canonical forms proves equality of the programs.

    sqrt(x) sqrt(x), sqrt(x)^2          ->  x
    norm(x)^2                           ->  sum(x x)
    x rsqrt(x), x / sqrt(x)             ->  sqrt(x)
    rsqrt(x) / x, rsqrt(x) (1/x)        ->  rsqrt(x)^3
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.fx as fx

from ...program import Program, copy_program

aten = torch.ops.aten

Rewrite = Callable[[fx.Graph, fx.Node], fx.Node | None]


def canonical_form(program: Program) -> Program:
    """The rewritten program, or the same object where nothing applies."""
    copy, _ = copy_program(program)
    graph = copy.graph.graph
    changed = False
    for node in list(graph.nodes):
        if node.op != "call_function":
            continue
        for rewrite in REWRITES:
            with graph.inserting_before(node):
                better = rewrite(graph, node)
            if better is not None:
                node.replace_all_uses_with(better)
                graph.erase_node(node)
                changed = True
                break
    if not changed:
        return program
    graph.eliminate_dead_code(is_impure_node=lambda node: node.op in ("placeholder", "output"))
    return program.replace(graph=fx.GraphModule(torch.nn.Module(), graph))


def _packet(node: Any) -> Any:
    return getattr(node.target, "overloadpacket", None) if isinstance(node, fx.Node) else None


def _is_root(node: Any) -> bool:
    return _packet(node) is aten.sqrt or (_packet(node) is aten.pow and node.args[1] == 0.5)


def _is_inverse_root(node: Any) -> bool:
    return _packet(node) is aten.rsqrt or (_packet(node) is aten.pow and node.args[1] == -0.5)


def _squared(node: fx.Node) -> Any:
    """b where the node is b * b."""
    packet = _packet(node)
    if packet is aten.mul and node.args[0] is node.args[1]:
        return node.args[0]
    if packet is aten.square or (packet is aten.pow and node.args[1] == 2):
        return node.args[0]
    return None


def square_of_root(graph: fx.Graph, node: fx.Node) -> fx.Node | None:
    """sqrt(x)^2 -> x."""
    base = _squared(node)
    if base is None or not _is_root(base):
        return None
    return _noted(graph.call_function(aten.alias.default, (base.args[0],)), node)


def square_of_norm(graph: fx.Graph, node: fx.Node) -> fx.Node | None:
    """norm(x)^2 -> sum(x x)."""
    base = _squared(node)
    if _packet(base) is not aten.linalg_vector_norm:
        return None
    x, order, dim, keepdim = (*base.args, *(2, None, False)[len(base.args) - 1 :])[:4]
    if order != 2:
        return None
    product = _noted(graph.call_function(aten.mul.Tensor, (x, x)), node)
    return _noted(graph.call_function(aten.sum.dim_IntList, (product, dim, keepdim)), node)


def root_of_itself(graph: fx.Graph, node: fx.Node) -> fx.Node | None:
    """x rsqrt(x) -> sqrt(x); x / sqrt(x) -> sqrt(x)."""
    packet = _packet(node)
    if packet is aten.mul:
        for x, root in (node.args[:2], node.args[1::-1]):
            if _is_inverse_root(root) and root.args[0] is x:  # type: ignore[union-attr]
                return _noted(graph.call_function(aten.sqrt.default, (x,)), node)
    if packet is aten.div and _is_root(node.args[1]) and node.args[1].args[0] is node.args[0]:  # type: ignore[union-attr]
        return _noted(graph.call_function(aten.sqrt.default, (node.args[0],)), node)
    return None


def cube_of_inverse_root(graph: fx.Graph, node: fx.Node) -> fx.Node | None:
    """rsqrt(x) / x -> rsqrt(x)^3; the same with 1/x."""
    packet = _packet(node)
    if packet is aten.div and _is_inverse_root(node.args[0]) and node.args[0].args[0] is node.args[1]:  # type: ignore[union-attr]
        return _noted(graph.call_function(aten.pow.Tensor_Scalar, (node.args[0], 3)), node)
    if packet is aten.mul:
        for root, other in (node.args[:2], node.args[1::-1]):
            inverse = _packet(other) is aten.reciprocal
            if _is_inverse_root(root) and inverse and other.args[0] is root.args[0]:  # type: ignore[union-attr]
                return _noted(graph.call_function(aten.pow.Tensor_Scalar, (root, 3)), node)
    return None


def _noted(new: fx.Node, old: fx.Node) -> fx.Node:
    new.meta = dict(old.meta)
    return new


REWRITES: tuple[Rewrite, ...] = (square_of_root, square_of_norm, root_of_itself, cube_of_inverse_root)
