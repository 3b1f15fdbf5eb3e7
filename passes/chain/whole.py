"""Keep a layer of torch whole: its chain starts from the layer's input, so that torch's own kernel may run in its place.

    chain(h, (U, W, ..), x)  with  native = "gru"        solvers split off what needs no order when they run (``fixedpoint.hoist``)

The step is typed row by row as it is; one that does not type is split like any other chain, and torch's kernel is not tried.
"""

from __future__ import annotations

import operator
from typing import Any

import torch.fx as fx

from ...compiler.chains.bodies import BodyGraph, How, chain_op
from .batch import Inserter
from .rows import ROWS, WHOLE, any_rows, type_rows
from .split import ChainNode, Split


def keep_whole(chain: ChainNode, how: How, inserter: Inserter) -> Split | None:
    """Write the chain again, row by row, in front of the old one; None where its step does not type."""
    body = _by_rows(chain.body)
    if body is None:
        return None
    node = inserter.call(chain_op(), chain.init, chain.shared, chain.streams, chain.count, body.data().to_json(), how.to_json())
    replaced = {index: inserter.call(operator.getitem, node, index) for index in chain.uses}
    return Split(node, body, replaced, 0, len(body.calls), 0, rows=True)


def _by_rows(body: BodyGraph) -> BodyGraph | None:
    ins = [*body.carry_inputs, *body.stream_inputs]
    starts: dict[fx.Node, Any] = dict.fromkeys(ins, ROWS)
    typed = type_rows(body.calls, starts | dict.fromkeys(body.shared_inputs, WHOLE))
    if any(n not in typed for n in body.calls) or any(typed.get(n) != ROWS for n in (*body.following, *body.emits)):
        return None
    for node in body.calls:
        node.args = any_rows(node, typed[node])
    return BodyGraph(body.graph, body.carries, body.shared, rows=True)
