"""Where two programs part: the first node of the transformed one whose value is no piece of the value it stands for.

Values are exact, so relations can be *read off* them without rules: a node's values on the ranks are tested for being the original
node's value replicated (R), summed (P) or concatenated along a dimension (S(d)), axis by axis. A node that matches none of these,
and from which an unbroken line of such nodes leads to a wrong output, is where the error enters.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.fx as fx

from ....runtime.mesh import Mesh
from ...program import Program, note
from .algebra import Algebra
from .arithmetic import ring_of
from .collectives import reduce_values
from .compare import ONE_RANK, evaluate
from .equality import same
from .inputs import draw_inputs
from .interpret import Extension
from .ops.views import join
from .pieces import ReplicasDiffer
from .tables import PRIMES
from .value import RingTensor, Value


@dataclass(frozen=True)
class Divergence:
    """node: of the transformed program; original: the node it stands for; added_by: the pass that made it, "" for copied nodes."""

    node: str
    original: str
    source: str
    original_source: str
    added_by: str
    ranks: int

    def __str__(self) -> str:
        maker = f", made by {self.added_by}" if self.added_by else ""
        return (
            f"{self.node}{maker} (at {self.source or 'unknown source'}) stands for {self.original} "
            f"(at {self.original_source or 'unknown source'}) but on {self.ranks} ranks is neither "
            "that value, nor a sum, nor a piece of it"
        )


def localise(
    original: Program,
    transformed: Program,
    *,
    p: int = PRIMES[0],
    seed: int = 0,
    extensions: Mapping[Any, Extension] | None = None,
) -> Divergence | None:
    """The node where an error enters; None where every output agrees or no node that stands for an original one is to blame."""
    first, second = Algebra(ring_of(p), seed), Algebra(ring_of(p), seed)
    inputs = draw_inputs(original, transformed, first, seed)
    reference: dict[str, Value] = {}
    expected = evaluate(original, inputs, first, watch=lambda node, values: reference.__setitem__(node.name, values[0]))
    mesh = transformed.mesh or ONE_RANK
    related: dict[fx.Node, bool] = {}

    def watch(node: fx.Node, values: list[Value]) -> None:
        stands_for = reference.get(_counterpart(node))
        if isinstance(stands_for, (RingTensor, torch.Tensor)):
            related[node] = is_related(second, values, stands_for, mesh)

    found = evaluate(transformed, inputs, second, watch=watch, extensions=extensions)
    wrong = [
        node
        for role, node in zip(transformed.signature.outputs, transformed.results, strict=True)
        if node is not None and role in expected and _differs(second, expected[role], found[role])
    ]
    suspects = _unbroken(wrong, related)
    for node in transformed.nodes:
        if node in suspects and related.get(node) is False:
            return _divergence(node, original, mesh)
    return None


def _counterpart(node: fx.Node) -> str:
    written = note(node)
    return written.carries or written.origin


def _differs(algebra: Algebra, expected: Value, found: Value) -> bool:
    return isinstance(found, ReplicasDiffer) or not same(algebra, expected, found)


def _unbroken(wrong: Sequence[fx.Node], related: Mapping[fx.Node, bool]) -> set[fx.Node]:
    """Nodes from which a path leads to a wrong output without meeting a node that is as it should be."""
    suspects: set[fx.Node] = set()
    pending = list(wrong)
    while pending:
        node = pending.pop()
        if node in suspects or (related.get(node, False) and node not in wrong):
            continue
        suspects.add(node)
        pending.extend(node.all_input_nodes)
    return suspects


def _divergence(node: fx.Node, original: Program, mesh: Mesh) -> Divergence:
    name = _counterpart(node)
    source = next((note(other).source for other in original.nodes if other.name == name), "")
    return Divergence(node.name, name, note(node).source, source, note(node).added_by, mesh.size)


def is_related(algebra: Algebra, values: Sequence[Value], whole: Value, mesh: Mesh) -> bool:
    """Whether the ranks' values are ``whole`` replicated, summed or concatenated over the mesh axes."""
    if not all(isinstance(value, type(whole)) for value in values):
        return False
    return any(same(algebra, whole, candidate) for candidate in _joined(algebra, list(values), whole, [n for _, n in mesh.axes]))


def _joined(algebra: Algebra, values: list[Value], whole: Value, sizes: list[int]) -> Iterator[Value]:
    """Global values that the ranks' values could make, innermost axis first."""
    if not sizes:
        yield values[0]
        return
    parts = sizes[-1]
    groups = [values[start : start + parts] for start in range(0, len(values), parts)]
    if all(value is group[0] or same(algebra, group[0], value) for group in groups for value in group):
        yield from _joined(algebra, [group[0] for group in groups], whole, sizes[:-1])
    if parts == 1 or (len({tuple(value.shape)[1:] for value in values}) > 1 and len({len(value.shape) for value in values}) > 1):
        return
    if all(value.shape == group[0].shape for group in groups for value in group) and _may_sum(values):
        yield from _joined(algebra, [reduce_values(algebra, group, "sum") for group in groups], whole, sizes[:-1])
    for dim in range(len(whole.shape)):
        if _joins(groups, dim, whole):
            joined = [_cat(algebra, group, dim) for group in groups]
            yield from _joined(algebra, joined, whole, sizes[:-1])


def _may_sum(values: Sequence[Value]) -> bool:
    return all(isinstance(value, RingTensor) or value.dtype != torch.bool for value in values)


def _joins(groups: Sequence[Sequence[Value]], dim: int, whole: Value) -> bool:
    for group in groups:
        shapes = [list(value.shape) for value in group]
        if any(len(shape) != len(whole.shape) for shape in shapes):
            return False
        rest = {tuple(n for d, n in enumerate(shape) if d != dim) for shape in shapes}
        if len(rest) != 1 or sum(shape[dim] for shape in shapes) > whole.shape[dim]:
            return False
    return True


def _cat(algebra: Algebra, values: Sequence[Value], dim: int) -> Value:
    return join(algebra, values, dim) if isinstance(values[0], RingTensor) else torch.cat(list(values), dim)
