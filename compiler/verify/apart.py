"""Ranks that run different programs, in one process, in floating point: each runs to its next meeting, then the meeting is held.

What ``lockstep`` is for one program on all ranks, this is for a program a rank: the stages of a pipeline, or ranks that skip what
the causal mask hides from them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.fx as fx

from ...runtime.mesh import Mesh
from ..errors import CollectiveMismatch, HocketError, VerificationError
from ..layout import assemble, coordinate, cut
from ..program import Role, note
from .lockstep import ONE_RANK, LockstepRun, layout_of
from .ranks import RankGraphs
from .together import is_collective, run_collective, run_exchange
from .widen import widen_call, widen_tensor

c10d = torch.ops._c10d_functional


@dataclass
class _Rank:
    """One rank's graph, how far it has come, and the values that it holds."""

    number: int
    nodes: Sequence[fx.Node]
    feed: Sequence[Any]
    where: Mapping[str, int]
    dtype: torch.dtype | None
    at: int = 0
    values: dict[fx.Node, Any] = field(default_factory=dict)
    results: tuple[Any, ...] = ()

    def advance(self) -> fx.Node | None:
        """Run to the next collective, which is returned; None at the end."""
        feed = iter(self.feed[sum(n.op == "placeholder" for n in self.nodes[: self.at]) :])
        while self.at < len(self.nodes):
            node = self.nodes[self.at]
            if is_collective(node.target) and node.target is not c10d.wait_tensor.default:
                return node
            if node.op == "placeholder":
                self.values[node] = next(feed)
            elif node.op == "output":
                self.results = tuple(self.values[n] if isinstance(n, fx.Node) else n for n in node.args[0])  # type: ignore[union-attr]
            elif node.target is c10d.wait_tensor.default:
                self.values[node] = self.values[node.args[0]]  # type: ignore[index]
            elif node.target is coordinate:
                self.values[node] = self.where[str(node.args[0])]
            else:
                self.values[node] = self._call(node)
            self.at += 1
        return None

    def arguments(self, node: fx.Node) -> tuple[Any, ...]:
        """Positional arguments with values in place of nodes."""
        found: tuple[Any, ...] = fx.node.map_arg(node.args, lambda n: self.values[n])
        return found

    def _call(self, node: fx.Node) -> Any:
        target, args, kwargs = widen_call(node.target, node.args, node.kwargs, self.dtype)
        args, kwargs = fx.node.map_arg((args, kwargs), lambda n: self.values[n])
        target = torch.ops.aten.reshape.default if target is torch.ops.aten.view.default else target
        try:
            return target(*args, **kwargs)
        except HocketError:
            raise
        except Exception as error:
            where = note(node).source or "unknown source"
            raise VerificationError(f"{node.name} = {node.target} (from {where}) failed on rank {self.number}: {error}") from error


def run_apart(program: RankGraphs, inputs: Mapping[Role, torch.Tensor], *, dtype: torch.dtype | None = None) -> LockstepRun:
    """Run every rank's own graph on pieces of global inputs and put the outputs together.

    dtype: compute every float in it. Raises VerificationError where an op fails, CollectiveMismatch where the ranks do not agree on
    the next collective.
    """
    mesh = program.mesh or ONE_RANK
    feeds: list[list[Any]] = [[] for _ in range(mesh.size)]
    for node, role in zip(program.placeholders, program.signature.inputs, strict=True):
        layout = layout_of(node, mesh)
        assert layout is not None
        for feed, piece in zip(feeds, cut(widen_tensor(inputs[role], dtype), layout, mesh), strict=True):
            feed.append(piece.contiguous())
    ranks = [
        _Rank(number, list(graph.graph.nodes), feeds[number], mesh.coordinate(number), dtype)
        for number, graph in enumerate(program.graphs)
    ]
    with torch.no_grad():
        while True:
            waiting = [rank.advance() for rank in ranks]
            if all(node is None for node in waiting):
                break
            _meet(ranks, waiting, mesh)
    outputs: dict[Role, torch.Tensor | None] = {}
    for position, (role, made) in enumerate(zip(program.signature.outputs, program.results, strict=True)):
        held = [rank.results[position] for rank in ranks]
        layout = None if made is None else layout_of(made, mesh)
        outputs[role] = None if layout is None else assemble(held, layout, mesh)
    return LockstepRun(outputs)


def _meet(ranks: Sequence[_Rank], waiting: Sequence[fx.Node | None], mesh: Mesh) -> None:
    nodes = [node for node in waiting if node is not None]
    if len(nodes) != len(ranks) or len({node.target for node in nodes}) != 1:
        shown = ", ".join(f"rank {i}: {node.target if node else 'at its end'}" for i, node in enumerate(waiting))
        raise CollectiveMismatch(f"the ranks do not agree on the next collective: {shown}")
    arguments = [rank.arguments(node) for rank, node in zip(ranks, nodes, strict=True)]
    values = [first for first, *_ in arguments]
    if nodes[0].target is c10d.all_to_all_single.default:
        results = run_exchange(values, [(a[1], a[2]) for a in arguments], mesh, str(arguments[0][3]))
    else:
        results = run_collective(nodes[0].target, values, arguments[0][1:], mesh)
    for rank, node, result in zip(ranks, nodes, results, strict=True):
        rank.values[node] = result
        rank.at += 1
