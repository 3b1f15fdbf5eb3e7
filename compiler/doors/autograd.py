"""One forward in the user's process: torch's autograd sees a single function whose forward and backward run on the ranks."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor

from ...runtime.engines.base import Engine
from ..errors import InputError, UnsupportedError
from ..program import RoleKind
from .loaded import Loaded
from .state import ModelState


class Call:
    """The state of one forward until its backward."""

    def __init__(self, engine: Engine, loaded: Loaded, leaves: Sequence[Any], seed: int, state: ModelState) -> None:
        """leaves: of the user's (args, kwargs)."""
        self.engine = engine
        self.state = state
        self.loaded = loaded
        self.leaves = leaves
        self.inputs = loaded.inputs(leaves, seed)
        self.ticket: Any = None
        self.spent = False
        self.versions = [tensor._version for tensor in loaded.parameters.values()]

    def forward(self) -> list[Tensor | None]:
        """Run the first segment; global outputs in segment order."""
        self.ticket, outputs = self.engine.forward(self.loaded.handle, self.inputs)
        self.loaded.write_back(outputs, self.leaves)
        return outputs

    def backward(self, tangents: Sequence[Tensor | None]) -> list[Tensor | None]:
        """Run the second segment; one gradient per differentiable tensor. InputError on a second call or on changed parameters."""
        if self.spent:
            raise InputError(
                "backward ran a second time through the same forward, whose activations are gone after the first; "
                "call the model again, or sum the losses before one backward"
            )
        self.spent = True
        for (name, tensor), version in zip(self.loaded.parameters.items(), self.versions, strict=True):
            if tensor._version != version:
                raise InputError(
                    f"parameter {name} was changed in place between the forward and its backward (version {version} -> "
                    f"{tensor._version}), so its gradient would be wrong; step the optimizer after the backward"
                )
        results = self.engine.backward(self.loaded.handle, self.ticket, self.loaded.tangents(tangents))
        return [
            self.state.gradient(name, value) if kind is RoleKind.PARAM and value is not None else value
            for (kind, name), value in zip(self.loaded.differentiable, self.loaded.gradients(results, tangents), strict=True)
        ]


class RanksFunction(torch.autograd.Function):
    """Differentiable call: tensors that may need a gradient go in, the outputs of the first segment come out."""

    @staticmethod
    def forward(ctx: Any, call: Call, *_: Tensor) -> tuple[Tensor | None, ...]:
        """The other tensors only tell autograd what the outputs depend on; the engine reads its own bindings."""
        outputs = call.loaded.outputs(call.forward())
        ctx.call = call
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(_release_with(call))
        ctx.mark_non_differentiable(*(t for t, yes in zip(outputs, call.loaded.has_tangent, strict=True) if not yes))
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *tangents: Tensor | None) -> tuple[Tensor | None, ...]:
        """Gradients of the other tensors, in order. Under ``create_graph=True`` they refuse to be differentiated again."""
        call: Call = ctx.call
        with torch.no_grad():
            gradients = call.backward(tangents)
        if torch.is_grad_enabled():
            places = [i for i, value in enumerate(gradients) if value is not None]
            guarded = _FirstDerivatives.apply(*(gradients[i].detach().requires_grad_() for i in places))  # type: ignore[no-untyped-call, union-attr]
            for i, value in zip(places, guarded, strict=True):
                gradients[i] = value
        return (None, *gradients)


class _FirstDerivatives(torch.autograd.Function):
    """The identity, for gradients whose own gradient nobody computes: without it a penalty on them would vanish in silence."""

    @staticmethod
    def forward(_: Any, *gradients: Tensor) -> tuple[Tensor, ...]:
        """The gradients as they are."""
        return tuple(value.view_as(value) for value in gradients)

    @staticmethod
    def backward(_: Any, *__: Tensor) -> NoReturn:
        """Raises UnsupportedError."""
        raise UnsupportedError(
            "a gradient of a parallel module was differentiated again (create_graph=True, a gradient penalty): only first "
            "derivatives are computed on the ranks; compute that term with the plain model, which has the same parameters"
        )


def _release_with(call: Call) -> Tensor:
    """A tensor that autograd saves: when it lets go of it (after the backward, or when the graph dies), the ranks may free too."""
    token = np.zeros(1, dtype=np.uint8)
    weakref.finalize(token, call.engine.release, call.ticket)
    return torch.from_numpy(token)
