"""torch's recurrent layers as chains, while a program is being captured.

``nn.RNN``, ``nn.GRU`` and ``nn.LSTM`` come down to one opaque op a stack of layers (``aten.rnn_tanh``, ``rnn_relu``, ``gru``,
``lstm``), which capture unrolls into thousands of nodes. Within ``recurrences`` a call becomes one chain node a layer and
direction instead, with the product of all inputs done before it:

    rnn    h' = act(x W + b + h U)
    gru    h' = lerp(n, h, z),   r, z = sigmoid(x W + b + h U),   n = tanh(x W_n + b + r (h U_n + b_n))
    lstm   c' = f c + i g,  h' = o tanh(c'),   i, f, g, o from x W + b + h U

A layer that nobody differentiates stays whole: its chain starts from x, and says which layer of torch it is (``How.native``).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ...runtime.fixedpoint.how import How
from .adjoint import chain, run
from .trace import is_tracing, trace_step

Step = Callable[[list[Tensor], list[Tensor]], tuple[list[Tensor], list[Tensor]]]


@dataclass(frozen=True)
class Layer:
    """Weights of one direction of one layer. inside, outside: of the state and of the input; the biases may be None."""

    outside: Tensor
    inside: Tensor
    bias_outside: Tensor | None
    bias_inside: Tensor | None

    @property
    def weights(self) -> list[Tensor]:
        """In torch's order."""
        return [w for w in (self.outside, self.inside, self.bias_outside, self.bias_inside) if w is not None]


def _plain(activation: Callable[[Tensor], Tensor]) -> Callable[[Layer, Tensor], tuple[Tensor, Step]]:
    def prepare(layer: Layer, x: Tensor) -> tuple[Tensor, Step]:
        inside = layer.inside.t()

        def step(state: list[Tensor], slices: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
            new = activation(torch.addmm(slices[0], state[0], inside))
            return [new], [new]

        return _products(layer, x, layer.bias_inside), step

    return prepare


def _gated(layer: Layer, x: Tensor) -> tuple[Tensor, Step]:
    inside, size = layer.inside.t(), layer.inside.shape[1]
    early, late = (None, None) if layer.bias_inside is None else layer.bias_inside.split([2 * size, size])
    padded = None if early is None else torch.cat([early, torch.zeros_like(early[:size])])

    def step(state: list[Tensor], slices: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        products = torch.mm(state[0], inside)
        gates = torch.sigmoid(slices[0][:, : 2 * size] + products[:, : 2 * size])
        own = products[:, 2 * size :] if late is None else products[:, 2 * size :] + late
        proposal = torch.tanh(slices[0][:, 2 * size :] + gates[:, :size] * own)
        new = proposal + gates[:, size:] * (state[0] - proposal)
        return [new], [new]

    return _products(layer, x, padded), step


def _long(layer: Layer, x: Tensor) -> tuple[Tensor, Step]:
    inside, size = layer.inside.t(), layer.inside.shape[1]

    def step(state: list[Tensor], slices: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        products = torch.addmm(slices[0], state[0], inside)
        open_, forget = torch.sigmoid(products[:, : 2 * size]).split(size, 1)
        cell = forget * state[1] + open_ * torch.tanh(products[:, 2 * size : 3 * size])
        new = torch.sigmoid(products[:, 3 * size :]) * torch.tanh(cell)
        return [new, cell], [new]

    return _products(layer, x, layer.bias_inside), step


def _products(layer: Layer, x: Tensor, more: Tensor | None) -> Tensor:
    """x W + b for all steps at once; ``more`` joins the bias."""
    bias = layer.bias_outside if more is None or layer.bias_outside is None else layer.bias_outside + more
    return F.linear(x, layer.outside, bias)


CELLS: dict[str, Callable[[Layer, Tensor], tuple[Tensor, Step]]] = {
    "rnn_tanh": _plain(torch.tanh),
    "rnn_relu": _plain(torch.relu),
    "gru": _gated,
    "lstm": _long,
}


class _Recurrences(TorchFunctionMode):
    """Sees the calls of torch's recurrent layers before they are unrolled."""

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        name = getattr(func, "__name__", "")
        if name in CELLS and not kwargs and _is_dense(args) and is_tracing():
            with torch._C.DisableTorchFunction():
                return _run(name, *args)
        return func(*args, **(kwargs or {}))


def recurrences() -> contextlib.AbstractContextManager[Any]:
    """Within this, recurrent layers are captured as chains."""
    return _Recurrences()


def _is_dense(args: tuple[Any, ...]) -> bool:
    """Whether a call is of equally long sequences, without projections."""
    if len(args) != 9 or not isinstance(args[2], (tuple, list)) or args[0].dim() != 3:
        return False
    per = 4 if args[3] else 2
    directions = args[4] * (2 if args[7] else 1)
    return bool(len(args[2]) == per * directions)


def _run(
    name: str,
    x: Tensor,
    hx: Any,
    weights: Sequence[Tensor],
    has_biases: bool,  # noqa: FBT001 - the op's own signature
    layers: int,
    *rest: Any,
) -> tuple[Tensor, ...]:
    dropout, train, bidirectional, batch_first = rest
    states = [hx] if isinstance(hx, Tensor) else list(hx)
    x = x.transpose(0, 1) if batch_first else x
    per, directions = (4 if has_biases else 2), (2 if bidirectional else 1)
    last: list[list[Tensor]] = []
    for depth in range(layers):
        outputs = []
        for direction in range(directions):
            index = depth * directions + direction
            own: Any = [*weights[index * per : (index + 1) * per], None, None]
            final, output = _layer(name, Layer(*own[:4]), x, [s[index] for s in states], backwards=direction == 1)
            last.append(final)
            outputs.append(output)
        x = outputs[0] if directions == 1 else torch.cat(outputs, -1)
        if depth < layers - 1 and dropout and train:
            x = F.dropout(x, dropout)
    return x.transpose(0, 1) if batch_first else x, *[torch.stack(column) for column in zip(*last, strict=True)]


def _layer(name: str, layer: Layer, x: Tensor, state: list[Tensor], *, backwards: bool) -> tuple[list[Tensor], Tensor]:
    x = x.flip(0) if backwards else x
    given = [x, *state, *layer.weights]
    if torch.is_grad_enabled() and any(t.requires_grad for t in given):
        products, step = CELLS[name](layer, x)
        body, shared = trace_step(step, state, [products[0]], f"torch.{name}")
        final, emits = chain(body, x.shape[0], [*state, *shared, products])
    else:
        final, emits = _whole(name, layer, x, state)
    return final, emits[0].flip(0) if backwards else emits[0]


def _whole(name: str, layer: Layer, x: Tensor, state: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """A layer that nobody differentiates as one chain from its input, product and all, so that torch's kernel can stand for it."""

    def step(carries: list[Tensor], slices: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        product, inner = CELLS[name](layer, slices[0])
        return inner(carries, [product])

    body, shared = trace_step(step, state, [x[0]], f"torch.{name}")
    order = [id(tensor) for tensor in shared]
    is_native = sorted(order) == sorted(map(id, layer.weights))
    if is_native:
        body.reorder_shared([order.index(id(weight)) for weight in layer.weights])
        shared = list(layer.weights)
    found = run(body, x.shape[0], [*state, *shared, x], How(native=name if is_native else ""))
    return found[: body.carries], found[body.carries :]
