"""Random inputs by role, on which a wrong program shows: nothing is zero, and integers are valid where they index.

Parameters are scaled as an initialisation would be (1 / sqrt of the inputs of a row), but biases are not zero and gains not one:
a bias that is counted twice is invisible at zero. Values are float32 numbers, so that both precisions start from the same point.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
import torch.fx as fx

from ..program import Program, Role, RoleKind
from .ring.inputs import Range, index_ranges

POSITIVE = ("var", "_sq", "step", "count")
"""Parts of the names of buffers and optimizer states that are never negative: a root is taken of them, or they count."""


def sample_inputs(program: Program, seed: int = 0) -> dict[Role, torch.Tensor]:
    """A global float64 (or integer) value for every input role that is no constant. The same seed gives the same values."""
    generator = torch.Generator().manual_seed(seed)
    ranges = index_ranges(program)
    found = {}
    for node, role in zip(program.placeholders, program.signature.inputs, strict=True):
        if role.kind is not RoleKind.CONSTANT:
            found[role] = _sample(node, role, ranges, generator)
    return found


def _sample(node: fx.Node, role: Role, ranges: Mapping[fx.Node, Range], generator: torch.Generator) -> torch.Tensor:
    value = node.meta["val"]
    shape = [int(n) for n in value.shape]
    if value.is_complex():
        parts = torch.randn([*shape, 2], generator=generator).double()
        return torch.view_as_complex(parts)
    if value.is_floating_point():
        return _scaled(role, torch.randn(shape, generator=generator)).double()
    if role.kind is RoleKind.SEED:
        return torch.randint(0, 1 << 31, shape, generator=generator)
    limit = ranges[node].limit if node in ranges else 2
    drawn = torch.randint(0, max(limit, 1), shape, generator=generator)
    if node not in ranges and shape and shape[-1]:
        drawn[..., 0] = 1  # a mask leaves something in every row
    if node not in ranges and not shape and role.kind in (RoleKind.BUFFER, RoleKind.STATE):
        drawn = drawn + 3  # a counter that has counted
    return drawn.to(value.dtype)


def _scaled(role: Role, drawn: torch.Tensor) -> torch.Tensor:
    if role.kind in (RoleKind.BUFFER, RoleKind.STATE) and any(part in role.name.lower() for part in POSITIVE):
        return drawn.abs() + 0.5
    if role.kind is RoleKind.PARAM and drawn.dim() > 1:
        return drawn / math.sqrt(max(drawn[0].numel(), 1))
    if role.kind is RoleKind.PARAM:
        return 0.3 * drawn if role.name.endswith("bias") else 1 + 0.2 * drawn
    return drawn
