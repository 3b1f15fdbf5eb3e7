"""Clipping by the norm over all gradients, as a graph.

    factor = min(1, most / (sqrt(sum_p sum(g_p^2)) + 1e-6))        g_p' = factor g_p

This is ``torch.nn.utils.clip_grad_norm_`` with the squares added up in the order of the parameters: sums of squares can be made
from the pieces of a gradient, and by every stage for its own parameters, so that only scalars meet.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from ..errors import InputError
from ..program import Role, RoleKind
from .flatten import Flat, flatten
from .trace import Raw

_EPSILON = 1e-6
_HALF = (torch.float16, torch.bfloat16)


def clip(gradients: Sequence[torch.Tensor], most: float) -> list[torch.Tensor]:
    """The gradients, scaled by one factor where their common norm is larger than ``most``. Sums are made in at least float32."""
    squares = [(wide * wide).sum() for wide in (g.float() if g.dtype in _HALF else g for g in gradients)]
    total = squares[0]
    for square in squares[1:]:
        total = total + square
    factor = torch.clamp(most / (torch.sqrt(total) + _EPSILON), max=1.0)
    return [g * factor.to(g.dtype) for g in gradients]


def check_clip_norm(most: float | None) -> None:
    """InputError unless it is None or a positive number."""
    if most is not None and (isinstance(most, bool) or not isinstance(most, int | float) or not most > 0):
        raise InputError(f"clip_norm must be a positive number, the largest norm of all gradients together; found {most!r}")


def trace_clip(gradients: Sequence[torch.Tensor], most: float) -> Flat:
    """``clip`` as a graph. gradients: fake tensors that only tell the form."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with mode:
        fakes = [torch.empty_strided(g.shape, g.stride(), dtype=g.dtype, device=g.device) for g in gradients]
        graph = make_fx(lambda *flat: clip(flat, most), _allow_non_fake_inputs=True)(*fakes)
    names = [node.name for node in graph.graph.nodes if node.op == "placeholder"]
    roles = [Role(RoleKind.INPUT, f"gradient {i}") for i in range(len(names))]
    results = [Role(RoleKind.OUTPUT, f"clipped {i}") for i in range(len(names))]
    return flatten(Raw(graph, dict(zip(names, roles, strict=True)), results, None, []), mode)
