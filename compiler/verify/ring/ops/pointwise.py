"""Elementwise ops: arithmetic, powers, rounding of constants, comparisons, selections and casts."""

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
    aten.sin: lambda alg, x: alg.cos_sin(x)[1],
    aten.cos: lambda alg, x: alg.cos_sin(x)[0],
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
