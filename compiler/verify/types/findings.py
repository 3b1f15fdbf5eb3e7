"""What typing a program found."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch.fx as fx

from ...program import Program
from ..templates import Template, Templates
from .problem import Op
from .value import Axes

RETRIES = 32


@dataclass(frozen=True)
class Finding:
    """One node that is wrong, or that the types cannot judge. sources: the user's lines, of the node and of the operands named."""

    node: str
    op: str
    message: str
    sources: tuple[str, ...]

    def __str__(self) -> str:
        lines = " and ".join(dict.fromkeys(source for source in self.sources if source)) or "an unknown line"
        return f"{self.node} = {self.op}: {self.message} (from {lines})"


@dataclass(frozen=True)
class TypeReport:
    """problems: nodes that are wrong. untyped: nodes without a derivation; assumed: those of them whose declared layout was used.

    types: per node, a Type, an integer, or a tuple of them; None where there is no type. typed: how each node was judged; repeated
    nodes share it. calls: template and operands of every call, from ``templates``.
    """

    problems: tuple[Finding, ...]
    untyped: tuple[Finding, ...]
    ops: int
    axes: Axes
    types: dict[fx.Node, Any] = field(repr=False)
    typed: dict[fx.Node, Op] = field(repr=False)
    calls: dict[fx.Node, tuple[Template, tuple[fx.Node, ...]]] = field(repr=False)
    templates: Templates = field(repr=False)

    @property
    def status(self) -> str:
        """``ill-typed``, ``typed``, or ``untypable`` when some values have to be judged by an execution."""
        return "ill-typed" if self.problems else "untypable" if self.untyped else "typed"


def resolve(check: Callable[[frozenset[fx.Node]], TypeReport], program: Program) -> TypeReport:
    """Check; where it fails behind views that had a choice, try the other choices, breadth first.

    Around a dimension of local length 1 an axis may belong to either neighbour after a view. Both readings are right, so a program
    is well typed if any choice types it. Views of the same sizes are flipped together. The report of the first attempt is returned
    where none of the RETRIES is without problems.
    """
    first = check(frozenset())
    if not first.problems:
        return first
    order = {node.name: i for i, node in enumerate(program.nodes)}
    queue, seen = deque([(frozenset[fx.Node](), first)]), {frozenset[fx.Node]()}
    while queue:
        flipped, report = queue.popleft()
        for group in _choices(report, order):
            option = flipped ^ group
            if option in seen or len(seen) > RETRIES:
                continue
            seen.add(option)
            found = check(option)
            if not found.problems:
                return found
            queue.append((option, found))
    return first


def _choices(report: TypeReport, order: dict[str, int]) -> list[frozenset[fx.Node]]:
    """Groups of views of the same sizes that had a choice, before the first problem; the nearest first."""
    at = order[report.problems[0].node]
    alike: dict[str, set[fx.Node]] = {}
    for node in reversed([node for node, op in report.typed.items() if op.ambiguous and order[node.name] <= at]):
        alike.setdefault(_sizes(node), set()).add(node)
    return [frozenset(group) for group in alike.values()]


def _sizes(node: fx.Node) -> str:
    return f"{tuple(node.all_input_nodes[0].meta['val'].shape)} {node.args[1:]}"
