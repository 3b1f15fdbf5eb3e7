"""A step on several lanes at once, as a body whose rows are the lanes.

    f(c, s, x)   ->   F(C, s, X)[i] = f(C[i], s, X[i])        vmap; F is a body of rows where all its ops are row by row

For steps whose own rows are not independent, or that have none: a state without a batch, or one that meets a value of its own shape
in every step.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.fx as fx
from torch.fx.experimental.proxy_tensor import make_fx

from ...compiler.chains.bodies import BodyGraph
from ...compiler.chains.trace import fake_mode
from ...compiler.program import output_node
from .rows import ROWS, WHOLE, any_rows, type_rows

aten = torch.ops.aten
LANES = 7
"""Lanes of the trace; a body that types as rows holds for any number."""


def lane_body(body: BodyGraph) -> BodyGraph | None:
    """The body of the module; None where it is not row by row."""
    step, carries, shared = body.function(), body.carries, body.shared

    def one(state: list[Any], values: list[Any], slices: list[Any]) -> Any:
        after, emits = step(*state, *values, *slices)
        return [*after, *emits]

    examples = [n.meta["val"] for n in body.placeholders]
    with fake_mode(examples), torch.no_grad():
        groups = [
            [e.new_empty((LANES, *e.shape)) for e in examples[:carries]],
            [torch.empty_like(e) for e in examples[carries : carries + shared]],
            [e.new_empty((LANES, *e.shape)) for e in examples[carries + shared :]],
        ]
        traced = make_fx(torch.func.vmap(one, in_dims=(0, None, 0)))(*groups)
    return _by_rows(traced.graph, carries, shared)


def _by_rows(graph: fx.Graph, carries: int, shared: int) -> BodyGraph | None:
    for node in [n for n in graph.nodes if n.target in (aten.detach.default, aten.alias.default)]:
        node.replace_all_uses_with(node.args[0])
        graph.erase_node(node)
    results = list(output_node(graph).args[0])  # type: ignore[arg-type]
    output_node(graph).args = ((tuple(results[:carries]), tuple(results[carries:])),)
    body = BodyGraph(graph, carries, shared, rows=True)
    graph.eliminate_dead_code(is_impure_node=lambda n: n.op in ("placeholder", "output"))
    starts: dict[fx.Node, Any] = dict.fromkeys([*body.carry_inputs, *body.stream_inputs], ROWS)
    typed = type_rows(body.calls, starts | dict.fromkeys(body.shared_inputs, WHOLE))
    if any(n not in typed for n in body.calls) or any(typed.get(n) != ROWS for n in results):
        return None
    for node in body.calls:
        node.args = any_rows(node, typed[node])
    return body
