"""The result of planning: pure data, keyed by node names, valid for every program with the same skeleton (other sizes included)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from ...runtime.mesh import Mesh
from ..cost.cost import Cost
from ..layout import Layout
from ..program import Decision


@dataclass(frozen=True)
class NodePlan:
    """What one node consumes and makes.

    inputs: layout wanted of each tensor argument, in the order of ``program.tensor_inputs``; outputs: layout made, one per output,
    None where that is no tensor; rules: origin of the rule used on each mesh axis. For a placeholder ``inputs`` is empty and
    ``outputs`` holds the layout in which the value arrives.
    """

    inputs: tuple[Layout, ...]
    outputs: tuple[Layout | None, ...]
    rules: tuple[str, ...] = ()


@dataclass(frozen=True)
class Certificate:
    """How good the plan is under its own cost model (seconds): ``lower_bound <= optimum <= objective``."""

    objective: float
    lower_bound: float
    method: str

    @property
    def gap(self) -> float:
        """(objective - lower bound) / objective; 0 for an exact solution."""
        return (self.objective - self.lower_bound) / self.objective if self.objective > 0 else 0.0


@dataclass(frozen=True)
class Plan:
    """What runs where, and why.

    nodes: by node name, for every placeholder and call_function node except ``getitem``; results: layout in which each program
    output must leave (same order as ``signature.outputs``, None for absent ones).
    """

    mesh: Mesh
    nodes: Mapping[str, NodePlan]
    results: tuple[Layout | None, ...]
    cost: Cost
    certificate: Certificate
    decisions: tuple[Decision, ...] = field(default=())
