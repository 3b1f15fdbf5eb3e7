"""Activations, forward and backward, reduced to exp wherever they are rational functions of it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from ..algebra import Algebra
from ..order import compare, maximum, minimum
from ..value import RingTensor, Value

aten = torch.ops.aten

GELU_SCALE = math.sqrt(2 / math.pi)
GELU_CUBIC = 0.044715


def sigmoid(alg: Algebra, x: Value) -> RingTensor:
    """1 / (1 + exp(-x))."""
    return alg.reciprocal(alg.add(alg.exp(alg.neg(x)), 1))


def sigmoid_backward(alg: Algebra, grad: Value, y: Value) -> RingTensor:
    """g y (1 - y)."""
    return alg.mul(grad, alg.mul(y, alg.sub(1, y)))


def tanh(alg: Algebra, x: Value) -> RingTensor:
    """(exp(2x) - 1) / (exp(2x) + 1)."""
    e = alg.exp(alg.mul(x, 2))
    return alg.div(alg.sub(e, 1), alg.add(e, 1))


def tanh_backward(alg: Algebra, grad: Value, y: Value) -> RingTensor:
    """g (1 - y^2)."""
    return alg.mul(grad, alg.sub(1, alg.mul(y, y)))


def silu(alg: Algebra, x: Value) -> RingTensor:
    """x sigmoid(x)."""
    return alg.mul(x, sigmoid(alg, x))


def silu_backward(alg: Algebra, grad: Value, x: Value) -> RingTensor:
    """g s (1 + x (1 - s))."""
    s = sigmoid(alg, x)
    return alg.mul(grad, alg.mul(s, alg.add(1, alg.mul(x, alg.sub(1, s)))))


def softplus(alg: Algebra, x: Value, beta: float = 1, threshold: float = 20) -> RingTensor:
    """log(1 + exp(beta x)) / beta; the threshold is a numerical shortcut."""
    return alg.div(alg.log(alg.add(alg.exp(alg.mul(x, beta)), 1)), beta)


def softplus_backward(alg: Algebra, grad: Value, x: Value, beta: float, threshold: float) -> RingTensor:
    """g sigmoid(beta x)."""
    return alg.mul(grad, sigmoid(alg, alg.mul(x, beta)))


def log_sigmoid_forward(alg: Algebra, x: Value) -> tuple[RingTensor, RingTensor]:
    """log(sigmoid(x)) and an empty buffer."""
    return alg.log(sigmoid(alg, x)), alg.full((0,), 0, torch.float32)


def log_sigmoid_backward(alg: Algebra, grad: Value, x: Value, buffer: Value) -> RingTensor:
    """g (1 - sigmoid(x))."""
    return alg.mul(grad, alg.sub(1, sigmoid(alg, x)))


def _gelu_inner(alg: Algebra, x: Value) -> RingTensor:
    return alg.mul(alg.add(x, alg.mul(alg.power(x, 3), GELU_CUBIC)), GELU_SCALE)


def gelu(alg: Algebra, x: Value, approximate: str = "none") -> RingTensor:
    """x Phi(x); erf is an odd keyed function."""
    inner = tanh(alg, _gelu_inner(alg, x)) if approximate == "tanh" else erf(alg, alg.mul(x, math.sqrt(0.5)))
    return alg.mul(alg.mul(x, 0.5), alg.add(1, inner))


def gelu_backward(alg: Algebra, grad: Value, x: Value, approximate: str = "none") -> RingTensor:
    """g (Phi(x) + x Phi'(x))."""
    if approximate == "tanh":
        t = tanh(alg, _gelu_inner(alg, x))
        slope = alg.mul(alg.add(alg.mul(alg.power(x, 2), 3 * GELU_CUBIC), 1), GELU_SCALE)
        tail = alg.mul(alg.mul(alg.mul(x, 0.5), alg.sub(1, alg.mul(t, t))), slope)
        return alg.mul(grad, alg.add(alg.mul(alg.add(1, t), 0.5), tail))
    cdf = alg.mul(alg.add(1, erf(alg, alg.mul(x, math.sqrt(0.5)))), 0.5)
    density = alg.mul(alg.exp(alg.mul(alg.mul(x, x), -0.5)), 1 / math.sqrt(2 * math.pi))
    return alg.mul(grad, alg.add(cdf, alg.mul(x, density)))


def erf(alg: Algebra, x: Value) -> RingTensor:
    """An odd keyed function."""
    return alg.odd_hash("erf", x)


def relu(alg: Algebra, x: Value) -> RingTensor:
    """x where its sign is positive."""
    return alg.where(compare(alg, "gt", x, 0), x, 0)


def threshold_backward(alg: Algebra, grad: Value, x: Value, threshold: float) -> RingTensor:
    """g where x > threshold."""
    return alg.where(compare(alg, "gt", x, threshold), grad, 0)


def leaky_relu(alg: Algebra, x: Value, slope: float = 0.01) -> RingTensor:
    """x or slope x."""
    return alg.where(compare(alg, "gt", x, 0), x, alg.mul(x, slope))


def leaky_relu_backward(alg: Algebra, grad: Value, x: Value, slope: float, is_result: bool) -> RingTensor:
    """g or slope g."""
    return alg.where(compare(alg, "gt", x, 0), grad, alg.mul(grad, slope))


def elu(alg: Algebra, x: Value, alpha: float = 1, scale: float = 1, input_scale: float = 1) -> RingTensor:
    """scale x, or alpha scale (exp(input_scale x) - 1)."""
    negative = alg.mul(alg.sub(alg.exp(alg.mul(x, input_scale)), 1), alpha)
    return alg.mul(alg.where(compare(alg, "gt", x, 0), x, negative), scale)


def elu_backward(
    alg: Algebra,
    grad: Value,
    alpha: float,
    scale: float,
    input_scale: float,
    is_result: bool,
    y: Value,
) -> RingTensor:
    """The derivative from the input, or from the result when ``is_result``."""
    slope = alg.mul(alg.add(y, alpha) if is_result else alg.mul(alg.exp(alg.mul(y, input_scale)), alpha), input_scale)
    return alg.mul(alg.mul(grad, scale), alg.where(compare(alg, "gt", y, 0), 1, slope))


def logaddexp(alg: Algebra, x: Value, y: Value) -> RingTensor:
    """log(exp x + exp y)."""
    return alg.log(alg.add(alg.exp(x), alg.exp(y)))


def logit(alg: Algebra, x: Value, eps: float | None = None) -> RingTensor:
    """log(x / (1 - x)), of x moved into [eps, 1 - eps]."""
    if eps is not None:
        x = minimum(alg, maximum(alg, x, eps), 1 - eps)
    return alg.log(alg.div(x, alg.sub(1, x)))


def logit_backward(alg: Algebra, grad: Value, x: Value, eps: float | None = None) -> RingTensor:
    """g / (x (1 - x)), 0 where x was moved."""
    slope = alg.div(grad, alg.mul(x, alg.sub(1, x)))
    if eps is None:
        return slope
    return alg.where(compare(alg, "lt", x, eps) | compare(alg, "gt", x, 1 - eps), 0, slope)


ACTIVATIONS: dict[Any, Callable[..., Any]] = {
    aten.sigmoid: sigmoid,
    aten.sigmoid_backward: sigmoid_backward,
    aten.tanh: tanh,
    aten.tanh_backward: tanh_backward,
    aten.silu: silu,
    aten.silu_backward: silu_backward,
    aten.softplus: softplus,
    aten.softplus_backward: softplus_backward,
    aten.logaddexp: logaddexp,
    aten.logit: logit,
    aten.logit_backward: logit_backward,
    aten.log_sigmoid: lambda alg, x: log_sigmoid_forward(alg, x)[0],
    aten.log_sigmoid_forward: log_sigmoid_forward,
    aten.log_sigmoid_backward: log_sigmoid_backward,
    aten.gelu: gelu,
    aten.gelu_backward: gelu_backward,
    aten.erf: erf,
    aten.relu: relu,
    aten.threshold_backward: threshold_backward,
    aten.leaky_relu: leaky_relu,
    aten.leaky_relu_backward: leaky_relu_backward,
    aten.elu: elu,
    aten.elu_backward: elu_backward,
}
