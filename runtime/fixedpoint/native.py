"""Torch's own kernel for a whole chain, where there is one: what the loop is compared with.

    chain(h, weights, x)  =  torch.gru(x, h, weights)[0]        and likewise rnn_tanh, rnn_relu and lstm

A chain whose ``how`` names one of these layers is the layer itself, unsplit: its carries are the states of one direction of one
layer, its shared values the weights in torch's order (of the input, of the state, then both biases or none), its one stream the
layer's input, and it gives out the first state. Its meaning is still the loop of its body; the verifier holds torch's reference
decomposition of the layer against it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import ProgramError
from .body import Body
from .how import NATIVES

STATES: Mapping[str, int] = {name: 2 if name == "lstm" else 1 for name in NATIVES}
"""How many tensors the state of a layer is."""

_LAYERS: Mapping[str, Callable[..., Any]] = {
    "rnn_tanh": torch.rnn_tanh,
    "rnn_relu": torch.rnn_relu,
    "gru": torch.gru,
    "lstm": torch.lstm,
}
_ONE_LAYER = (1, 0.0, False, False, False)
"""Number of layers, dropout, training, bidirectional, batch first."""


def check_native(body: Body, name: str) -> None:
    """ProgramError unless a body has the inputs and the results of the layer that it is said to be."""
    fits = body.carries == STATES[name] and body.shared in (2, 4) and body.streams == 1
    if not fits or body.emits != body.following[:1]:
        raise ProgramError(
            f"a chain that is torch's {name} has {STATES[name]} carries, 2 or 4 weights, one stream, and gives out its first "
            f"state; found {body.carries}, {body.shared}, {body.streams} and {len(body.emits)} emits"
        )


def run_native(name: str, init: Sequence[Tensor], weights: Sequence[Tensor], x: Tensor) -> list[Tensor]:
    """The last states, then the first state after every step: what the chain op returns."""
    states = [state[None] for state in init]
    output, *last = _LAYERS[name](x, states if name == "lstm" else states[0], list(weights), len(weights) == 4, *_ONE_LAYER)
    return [*[state[0] for state in last], output]
