"""A rule: if the inputs of an op lie like this along one axis, its outputs lie like that."""

from __future__ import annotations

from dataclasses import dataclass

from ..layout import Placement, Replicate, format_placement


@dataclass(frozen=True)
class Rule:
    """Placements along a single axis (a mesh axis, or a loop axis such as tiles or micro-batches).

    inputs: one per tensor argument in the order of ``program.tensor_inputs(node)``; outputs: one per element of
    ``program.tensor_leaves(node.meta["val"])``, None where that is not a tensor; origin: where the rule comes from, such as
    ``"torch:single-dim"``, ``"hocket:sdpa"`` or ``"discovered"``.
    """

    inputs: tuple[Placement, ...]
    outputs: tuple[Placement | None, ...]
    origin: str

    @property
    def is_replicate(self) -> bool:
        """True for the rule every op has: all inputs and outputs whole on every rank."""
        return all(isinstance(p, Replicate) for p in self.inputs + self.outputs if p is not None)

    def __str__(self) -> str:
        inputs, outputs = (", ".join(map(format_placement, side)) for side in (self.inputs, self.outputs))
        return f"{inputs} -> {outputs} [{self.origin}]"
