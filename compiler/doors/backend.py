"""``torch.compile(model, backend="hocket", options={"mesh": "tp=2"})``: dynamo's graph through the same hall."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.fx as fx
from torch import nn

from ..errors import InputError
from .parallelize import open_session

OPTIONS = ("mesh", "tactics", "engine", "constraints", "verify", "memory_limit", "inductor")


def hocket_backend(
    graph: fx.GraphModule, example_inputs: Sequence[Any], *, options: Mapping[str, Any] | None = None
) -> Callable[..., Any]:
    """Compile one of dynamo's graphs for a mesh. options: ``mesh`` (needed) and those of ``hocket.parallelize``.

    Dynamo hands parameters over as inputs of the graph; here they become parameters of it again, so that the ranks read them in
    place. Training and inference both work; a graph break gives several graphs, each on ranks of its own. Raises InputError for
    bad options.
    """
    given = dict(options or {})
    unknown = sorted(set(given) - set(OPTIONS))
    if unknown:
        raise InputError(f"backend 'hocket' has no option {unknown[0]!r}; it has {', '.join(OPTIONS)}")
    if "mesh" not in given:
        raise InputError("backend 'hocket' needs a mesh: torch.compile(model, backend='hocket', options={'mesh': 'tp=2'})")
    if not any(isinstance(value, torch.Tensor) for value in example_inputs):
        return graph.forward
    held = {i: value for i, value in enumerate(example_inputs) if isinstance(value, nn.Parameter)}
    session = open_session(_WithParameters(graph, held), **given)

    def run(*args: Any) -> Any:
        free = tuple(value for i, value in enumerate(args) if i not in held)
        return session.call(session.state.captured, free, {})

    return run


class _WithParameters(nn.Module):
    """Dynamo's graph with some of its inputs held as parameters, under names made from their place."""

    def __init__(self, graph: fx.GraphModule, held: Mapping[int, nn.Parameter]) -> None:
        super().__init__()
        names = [node.name for node in graph.graph.nodes if node.op == "placeholder"]
        self._graph = graph
        self._held = {i: names[i] for i in held}
        for i, parameter in held.items():
            self.register_parameter(names[i], parameter)

    def forward(self, *free: Any) -> Any:
        rest = iter(free)
        total = len(free) + len(self._held)
        return self._graph(*(getattr(self, self._held[i]) if i in self._held else next(rest) for i in range(total)))
