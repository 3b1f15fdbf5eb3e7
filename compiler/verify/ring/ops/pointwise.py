"""Elementwise ops, forward and backward. Activations are reduced to exp wherever they are rational functions of it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from ....errors import UnsupportedError
from ..algebra import Algebra
from ..order import compare, maximum, minimum, sign
from ..value import RingTensor, Value

aten = torch.ops.aten
prims = torch.ops.prims

GELU_SCALE = math.sqrt(2 / math.pi)
GELU_CUBIC = 0.044715


def add(alg: Algebra, x: Value, y: Value, alpha: float = 1) -> RingTensor:
    """x + alpha y."""
    return alg.add(x, y if alpha == 1 else alg.mul(y, alpha))


def sub(alg: Algebra, x: Value, y: Value, alpha: float = 1) -> RingTensor:
    """x - alpha y."""
    return alg.sub(x, y if alpha == 1 else alg.mul(y, alpha))


def rsub(alg: Algebra, x: Value, y: Value, alpha: float = 1) -> RingTensor:
    """y - alpha x."""
    return sub(alg, y, x, alpha)


def div(alg: Algebra, x: Value, y: Value, rounding_mode: str | None = None) -> RingTensor:
    """x / y; rounded division of drawn values has no exact meaning."""
    if rounding_mode is not None:
        return _known_only(alg, lambda a, b: torch.div(a, b, rounding_mode=rounding_mode), x, y)
    return alg.div(x, y)


def power(alg: Algebra, x: Value, exponent: Value) -> RingTensor:
    """x ** y: exact for quarter-integers, exp(y log c) for a constant base, else a keyed function."""
    if isinstance(exponent, RingTensor) and exponent.known is not None and exponent.numel() == 1:
        exponent = float(exponent.known)
    if isinstance(exponent, (int, float)):
        if isinstance(x, RingTensor) and x.known is not None and not float(exponent).is_integer():
            return alg.mask_known(_lift_real(alg, x, torch.pow(x.known, exponent)))
        return alg.power(x, exponent)
    if isinstance(x, (int, float)) and x > 0:
        return alg.exp(alg.mul(exponent, math.log(x)))
    return alg.hash("pow", x, exponent)


def _lift_real(alg: Algebra, like: RingTensor, real: torch.Tensor) -> RingTensor:
    return alg.lift(real, like.dtype)


def sqrt(alg: Algebra, x: RingTensor) -> RingTensor:
    """Multiplicative root map; exact roots of constants."""
    return power(alg, x, 0.5)


def rsqrt(alg: Algebra, x: RingTensor) -> RingTensor:
    """1 / sqrt(x)."""
    return power(alg, x, -0.5)


def _known_only(alg: Algebra, function: Callable[..., torch.Tensor], *arguments: Value) -> RingTensor:
    """Rounding and the like: only of values that no drawn input enters."""
    values = [alg.lift(a) for a in arguments]
    known = [v.known for v in values]
    if any(k is None for k in known):
        raise UnsupportedError(
            "rounding of a computed value has no exact meaning; only constants, masks and positions can be rounded"
        )
    return alg.lift(function(*known), values[0].dtype)


def floor_divide(alg: Algebra, x: Value, y: Value) -> RingTensor:
    """floor(x / y) of constants."""
    return _known_only(alg, torch.floor_divide, x, y)


def floor(alg: Algebra, x: RingTensor) -> RingTensor:
    """floor of constants."""
    return _known_only(alg, torch.floor, x)


def ceil(alg: Algebra, x: RingTensor) -> RingTensor:
    """ceil of constants."""
    return _known_only(alg, torch.ceil, x)


def round_(alg: Algebra, x: RingTensor, decimals: int = 0) -> RingTensor:
    """round of constants."""
    return _known_only(alg, lambda a: torch.round(a, decimals=decimals), x)


def trunc(alg: Algebra, x: RingTensor) -> RingTensor:
    """trunc of constants."""
    return _known_only(alg, torch.trunc, x)


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


def clamp(alg: Algebra, x: Value, min: Value = None, max: Value = None) -> RingTensor:
    """max first, as torch: min(max(x, low), high)."""
    if min is not None:
        x = maximum(alg, x, min)
    return alg.lift(x) if max is None else minimum(alg, x, max)


def clamp_max(alg: Algebra, x: Value, high: Value) -> RingTensor:
    """min(x, high)."""
    return minimum(alg, x, high)


def absolute(alg: Algebra, x: RingTensor) -> RingTensor:
    """x or -x by its sign."""
    return alg.where(sign(alg, x) >= 0, x, alg.neg(x))


def sign_value(alg: Algebra, x: RingTensor) -> RingTensor:
    """-1, 0 or 1 as a value; not a constant of the program although it is a small integer."""
    result = alg.lift(sign(alg, x), x.dtype)
    result.known = None
    return result


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


def to_dtype(alg: Algebra, x: Value, dtype: torch.dtype | None = None, **options: Any) -> Value:
    """A cast: free between floating types (rounding is outside the proof); to an integer only of constants."""
    value = alg.lift(x, dtype)
    if dtype is None or dtype.is_floating_point:
        return RingTensor(value.data, value.factor, value.loose, dtype or value.dtype, value.known)
    if dtype == torch.bool:
        return compare(alg, "ne", value, 0)
    if value.known is None:
        raise UnsupportedError(
            f"a computed floating point value is cast to {dtype}: what it rounds to is not determined by exact arithmetic"
        )
    return value.known.to(dtype)


def to_any(alg: Algebra, x: Value, *arguments: Any, dtype: torch.dtype | None = None, **options: Any) -> Value:
    """The overloads of ``to``: the dtype counts, the device does not."""
    found = [argument for argument in arguments if isinstance(argument, torch.dtype)]
    return to_dtype(alg, x, found[0] if found else dtype)


def identity(alg: Algebra, x: Value, *arguments: Any, **options: Any) -> RingTensor:
    """The value itself."""
    return alg.lift(x)


def comparison(name: str) -> Callable[..., torch.Tensor]:
    """The op for one of eq, ne, gt, ge, lt, le."""
    return lambda alg, x, y: compare(alg, name, x, y)


POINTWISE: dict[Any, Callable[..., Any]] = {
    aten.add: add,
    aten.sub: sub,
    aten.rsub: rsub,
    aten.neg: lambda alg, x: alg.neg(x),
    aten.mul: lambda alg, x, y: alg.mul(x, y),
    aten.div: div,
    aten.true_divide: div,
    aten.floor_divide: floor_divide,
    aten.reciprocal: lambda alg, x: alg.reciprocal(x),
    aten.pow: power,
    aten.square: lambda alg, x: alg.mul(x, x),
    aten.sqrt: sqrt,
    aten.rsqrt: rsqrt,
    aten.exp: lambda alg, x: alg.exp(x),
    aten.exp2: lambda alg, x: alg.exp(alg.mul(x, math.log(2))),
    aten.expm1: lambda alg, x: alg.sub(alg.exp(x), 1),
    aten.log: lambda alg, x: alg.log(x),
    aten.log2: lambda alg, x: alg.mul(alg.log(x), 1 / math.log(2)),
    aten.log1p: lambda alg, x: alg.log(alg.add(x, 1)),
    aten.sigmoid: sigmoid,
    aten.sigmoid_backward: sigmoid_backward,
    aten.tanh: tanh,
    aten.tanh_backward: tanh_backward,
    aten.silu: silu,
    aten.silu_backward: silu_backward,
    aten.softplus: softplus,
    aten.softplus_backward: softplus_backward,
    aten.log_sigmoid_forward: log_sigmoid_forward,
    aten.log_sigmoid_backward: log_sigmoid_backward,
    aten.gelu: gelu,
    aten.gelu_backward: gelu_backward,
    aten.erf: erf,
    aten.sin: lambda alg, x: alg.cos_sin(x)[1],
    aten.cos: lambda alg, x: alg.cos_sin(x)[0],
    aten.relu: relu,
    aten.threshold_backward: threshold_backward,
    aten.leaky_relu: leaky_relu,
    aten.leaky_relu_backward: leaky_relu_backward,
    aten.elu: elu,
    aten.elu_backward: elu_backward,
    aten.clamp: clamp,
    aten.clamp_min: clamp,
    aten.clamp_max: clamp_max,
    aten.maximum: maximum,
    aten.minimum: minimum,
    aten.abs: absolute,
    aten.sign: sign_value,
    aten.sgn: sign_value,
    aten.floor: floor,
    aten.ceil: ceil,
    aten.round: round_,
    aten.trunc: trunc,
    aten.where: lambda alg, condition, x, y: alg.where(condition, x, y),
    aten.masked_fill: lambda alg, x, mask, value: alg.where(mask, value, x),
    aten.isnan: lambda alg, x: torch.zeros(x.shape, dtype=torch.bool),
    aten.isinf: lambda alg, x: alg.is_minus_infinity(x),
    aten._to_copy: to_dtype,
    aten.to: to_any,
    prims.convert_element_type: to_dtype,
    **{getattr(aten, name): comparison(name) for name in ("eq", "ne", "gt", "ge", "lt", "le")},
    **dict.fromkeys(
        (aten.clone, aten.detach, aten.alias, aten.contiguous, aten.lift_fresh_copy, aten.lift_fresh, aten.positive), identity
    ),
}
