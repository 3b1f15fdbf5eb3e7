"""Arithmetic on RingTensors: what the op table is written in.

An ``Algebra`` is one evaluation: a ring, a key for the uninterpreted functions, and what happened on the way (``poison`` counts
divisions by zero, ``used`` names the treatments that an equality depends on: ``hash``, ``root``, ``order``, ``settle``).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from typing import cast

import torch

from ...errors import UnsupportedError
from .arithmetic import Ring
from .literals import read
from .value import RingTensor, Value

MINUS_INFINITY = -1e8
"""A constant below this is a mask value and read as -inf (finfo.min and -1e9 are written for it)."""

_SINGLE = (torch.float32, torch.bfloat16, torch.float16)


class Algebra:
    """One evaluation over one ring. key: selects the uninterpreted functions, so that different keys give independent tests."""

    def __init__(self, ring: Ring, key: int = 0) -> None:
        self.ring = ring
        self.key = key
        self.poison = 0
        self.used: set[str] = set()

    # ---- into the ring -----------------------------------------------------------------------------------------------------

    def lift(self, x: Value, dtype: torch.dtype | None = None) -> RingTensor:
        """A RingTensor from a number or a concrete tensor, read exactly. Raises UnsupportedError for complex numbers."""
        if isinstance(x, RingTensor):
            return x
        if isinstance(x, torch.Tensor):
            return self._lift_tensor(x, dtype)
        if not isinstance(x, (int, float)):
            raise UnsupportedError(f"the ring holds real numbers; found {type(x).__name__} {x!r}")
        return self.full((), x, dtype or torch.float32)

    def full(self, shape: Sequence[int], value: float, dtype: torch.dtype) -> RingTensor:
        """A constant tensor; -inf and mask values become -inf, +inf and nan poison."""
        known = torch.full(tuple(shape), value, dtype=torch.float64)
        if value < MINUS_INFINITY:
            zero = torch.zeros((4, *shape), dtype=torch.int64)
            return RingTensor(zero, zero, dtype=dtype, known=known)
        if not math.isfinite(value):
            self.poison += 1
            return RingTensor(torch.zeros((4, *shape), dtype=torch.int64), dtype=dtype, known=known)
        element = self.ring.constant(read(value))
        data = element.view(4, *([1] * len(shape))).expand(4, *shape)
        return RingTensor(data, dtype=dtype, known=known)

    def _lift_tensor(self, x: torch.Tensor, dtype: torch.dtype | None) -> RingTensor:
        x = x.detach()
        if x.is_complex():
            raise UnsupportedError("the ring holds real numbers; found a complex tensor")
        if not x.is_floating_point():
            zero = torch.zeros_like(x, dtype=torch.int64)
            whole = x.long()
            data = torch.stack((whole % self.ring.r, whole % self.ring.p, zero, zero))
            return RingTensor(data, dtype=dtype or torch.float32, known=x.double())
        values, position = torch.unique(x.double().reshape(-1), return_inverse=True)
        single = x.dtype in _SINGLE
        finite = torch.isfinite(values)
        self.poison += int(((~finite) & (values != -math.inf)).sum())
        kept = [value if math.isfinite(value) and value >= MINUS_INFINITY else 0.0 for value in values.tolist()]
        table = [self.ring.constant(read(value, single=single)) for value in kept]
        stacked = torch.stack(table, 1) if table else torch.zeros((4, 0), dtype=torch.int64)
        result = RingTensor(stacked[:, position].reshape(4, *x.shape), dtype=dtype or x.dtype, known=x.double())
        return self.mask_known(result)

    def mask_known(self, x: RingTensor) -> RingTensor:
        """Make entries whose known value is a mask value -inf."""
        if x.known is None:
            return x
        masked = x.known < MINUS_INFINITY
        if not bool(masked.any()):
            return x
        zero = torch.zeros_like(x.data)
        factor = self.ring.ones(x.shape) if x.factor is None else x.factor
        data, factor = torch.where(masked, zero, x.data), torch.where(masked, zero, factor)
        return RingTensor(data, factor, x.loose, x.dtype, x.known)

    def pair(self, x: Value, y: Value) -> tuple[RingTensor, RingTensor]:
        """Both lifted and given the same rank."""
        a, b = self.lift(x), self.lift(y)
        ndim = max(a.ndim, b.ndim)
        return a.rank(ndim), b.rank(ndim)

    @staticmethod
    def dtype_of(x: Value, y: Value) -> torch.dtype:
        """dtype of the first RingTensor of positive rank, else of any."""
        found = [v for v in (x, y) if isinstance(v, RingTensor)]
        for v in found:
            if v.ndim:
                return v.dtype
        return found[0].dtype if found else torch.float32

    # ---- the log part ------------------------------------------------------------------------------------------------------

    def settle(self, x: RingTensor) -> RingTensor:
        """Without a log part: a + log b becomes an element, canonical for exp(a) b, defined modulo ker E."""
        if x.factor is None:
            return x
        if bool((x.factor == self._one(x.factor)).all()):
            return RingTensor(x.data, None, x.loose, x.dtype)
        self.poison += int(self.ring.zero_divisors(x.factor).sum())
        self.used.add("settle")
        data = self.ring.reduce(self.ring.project(x.data) + self.ring.log(x.factor))
        return RingTensor(data, None, loose=True, dtype=x.dtype)

    def _one(self, like: torch.Tensor) -> torch.Tensor:
        return torch.tensor([1, 1, 0, 0]).view(4, *([1] * (like.dim() - 1)))

    def factor_of(self, x: RingTensor) -> torch.Tensor:
        """The factor under the log, ones where there is none."""
        return self.ring.ones(x.shape) if x.factor is None else x.factor

    def is_minus_infinity(self, x: RingTensor) -> torch.Tensor:
        """Boolean, shape of x."""
        if x.factor is None:
            return torch.zeros(x.shape, dtype=torch.bool)
        return (x.factor[0] == 0).expand(x.shape)

    # ---- field operations --------------------------------------------------------------------------------------------------

    def add(self, x: Value, y: Value) -> RingTensor:
        """x + y."""
        a, b = self.pair(x, y)
        data = self.ring.reduce(a.data + b.data)
        loose, dtype = a.loose or b.loose, self.dtype_of(x, y)
        if a.factor is None and b.factor is None:
            return RingTensor(data, None, loose, dtype)
        factor = self.ring.mul(*torch.broadcast_tensors(self.factor_of(a), self.factor_of(b)))
        return RingTensor(torch.where(factor[:1] == 0, 0, data), factor, loose, dtype)

    def neg(self, x: Value) -> RingTensor:
        """-x."""
        a = self.lift(x)
        factor = None if a.factor is None else self._inverse(a.factor)
        return RingTensor(self.ring.reduce(-a.data), factor, a.loose, a.dtype)

    def sub(self, x: Value, y: Value) -> RingTensor:
        """x - y."""
        a, b = self.pair(x, y)
        if a.factor is None and b.factor is None:
            return RingTensor(self.ring.reduce(a.data - b.data), None, a.loose or b.loose, self.dtype_of(x, y))
        result = self.add(a, self.neg(b))
        result.dtype = self.dtype_of(x, y)
        return result

    def mul(self, x: Value, y: Value) -> RingTensor:
        """x y."""
        for value, number in ((x, y), (y, x)):
            if isinstance(value, RingTensor) and value.factor is not None and isinstance(number, (int, float)):
                return self._scaled(value, number, self.lift(number))
            if isinstance(value, RingTensor) and isinstance(number, (int, float)) and math.isfinite(number):
                element = self.ring.constant(read(number))
                if not bool(element[2:].any()):
                    return RingTensor(self.ring.scale(value.data, element), None, value.loose, value.dtype)
        a, b = self.pair(self._number(x), self._number(y))
        a, b = self.settle(a), self.settle(b)
        return RingTensor(self.ring.mul(a.data, b.data), None, a.loose or b.loose, self.dtype_of(x, y))

    def _number(self, x: Value) -> Value:
        """A factor is read as the number it is, also where it is as large as a mask value."""
        if isinstance(x, float) and math.isfinite(x) and x < MINUS_INFINITY:
            return RingTensor(self.ring.constant(read(x)))
        return x

    def _scaled(self, x: RingTensor, number: float, element: RingTensor) -> RingTensor:
        """A number times a value with a log part: a small integer keeps it, k (a + log b) = k a + log b^k; -inf stays -inf."""
        factor = cast(torch.Tensor, x.factor)
        masked = factor[:1] == 0
        if float(number).is_integer() and 0 < abs(number) <= 64:
            times = abs(int(number))
            factor = self.ring.power(factor if number > 0 else self._inverse(factor), times)
            return RingTensor(self.ring.reduce(x.data * int(number)), factor, x.loose, x.dtype)
        if number <= 0:
            self.poison += int(masked.sum())
        finite = self.settle(RingTensor(x.data, torch.where(masked, self._one(factor), factor), x.loose, x.dtype))
        result = self.mul(finite, element)
        result.dtype = x.dtype
        if bool(masked.any()):
            result.data = torch.where(masked, 0, result.data)
            result.factor = torch.where(masked, 0, self.ring.ones(result.shape))
        return result

    def _inverse(self, data: torch.Tensor) -> torch.Tensor:
        self.poison += int(self.ring.zero_divisors(data).sum())
        return self.ring.inverse(data)

    def reciprocal(self, x: Value) -> RingTensor:
        """1 / x; poisons where x has no inverse."""
        a = self.settle(self.lift(x))
        return RingTensor(self._inverse(a.data), None, a.loose, a.dtype)

    def div(self, x: Value, y: Value) -> RingTensor:
        """x / y. A number is inverted before it is read, so x / 3 and x * (1/3) agree."""
        if isinstance(y, (int, float)):
            if y in (1, -1):
                return self.mul(x, int(y))
            if y == 0 or not math.isfinite(y):
                self.poison += 1
                return self.lift(x)
            inverse = self.ring.inverse(self.ring.constant(read(y))[:, None])[:, 0]
            if isinstance(x, RingTensor) and x.factor is not None:
                return self._scaled(x, 1 / y, RingTensor(inverse))
            if isinstance(x, RingTensor) and not bool(inverse[2:].any()):
                return RingTensor(self.ring.scale(x.data, inverse), None, x.loose, x.dtype)
            return self.mul(x, RingTensor(inverse))
        return self.mul(x, self.reciprocal(y))

    def power(self, x: Value, exponent: float) -> RingTensor:
        """x ** exponent for integers, halves and quarters of them."""
        a = self.settle(self.lift(x))
        quarters = Fraction(exponent) * 4
        if quarters.denominator != 1:
            return self.hash("pow", a, exponent)
        data, steps = a.data, 0
        while quarters.numerator % 4 and steps < 2:
            data, quarters, steps = self.ring.sqrt(data), quarters * 2, steps + 1
        if steps:
            self.used.add("root")
        whole = int(quarters) // 4
        if whole < 0:
            data = self._inverse(data)
        return RingTensor(self.ring.power(data, abs(whole)), None, a.loose, a.dtype)

    # ---- exponentials ------------------------------------------------------------------------------------------------------

    def exp(self, x: Value) -> RingTensor:
        """E(a) b: well defined also for loose values."""
        a = self.lift(x)
        self.used.add("exp")
        data = self.ring.exp(a.data)
        if a.factor is not None:
            data = self.ring.mul(data, a.factor)
        return RingTensor(data, None, loose=False, dtype=a.dtype)

    def log(self, x: Value) -> RingTensor:
        """0 + log x; log 0 = -inf."""
        a = self.settle(self.lift(x))
        zero, partial = a.data[0] == 0, (a.data != 0).any(0)
        self.poison += int((zero & partial).sum())
        return RingTensor(torch.zeros_like(a.data), a.data, a.loose, a.dtype)

    # ---- uninterpreted functions -------------------------------------------------------------------------------------------

    def hash(self, name: str, *arguments: Value) -> RingTensor:
        """A keyed function of exact arguments (broadcast)."""
        self.used.add(f"hash:{name}")
        values = [self.settle(self.lift(a)) for a in arguments]
        ndim = max(v.ndim for v in values)
        data = torch.broadcast_tensors(*[v.rank(ndim).data for v in values])
        return RingTensor(self.ring.hash(name, self.key, data), None, any(v.loose for v in values), values[0].dtype)

    def odd_hash(self, name: str, x: Value) -> RingTensor:
        """A keyed function with f(-x) = -f(x)."""
        self.used.add(f"hash:{name}")
        a = self.settle(self.lift(x))
        negative = self.ring.reduce(-a.data)
        code, mirrored = self.ring.code(a.data), self.ring.code(negative)
        image = self.ring.hash(name, self.key, [torch.where(code < mirrored, a.data, negative)])
        sign = (code < mirrored).long() - (code > mirrored).long()
        return RingTensor(self.ring.reduce(image * sign), None, a.loose, a.dtype)

    def cos_sin(self, x: Value) -> tuple[RingTensor, RingTensor]:
        """A point of the unit circle with cos even and sin odd: ((1 - t^2)/(1 + t^2), 2 t/(1 + t^2)) for an odd hash t."""
        t = self.odd_hash("angle", x)
        square = self.mul(t, t)
        scale = self.reciprocal(self.add(square, 1))
        return self.mul(self.sub(1, square), scale), self.mul(self.mul(t, 2), scale)

    # ---- reductions and matrix products ------------------------------------------------------------------------------------

    def sum(self, x: RingTensor, dims: Sequence[int], *, keepdim: bool = False) -> RingTensor:
        """Sum over non-negative dims."""
        if not dims:
            return x
        data = self.ring.reduce(x.data.sum([d + 1 for d in dims], keepdim=keepdim))
        if x.factor is None:
            return RingTensor(data, None, x.loose, x.dtype)
        factor = self.ring.product(x.factor.expand(x.data.shape), dims, keepdim=keepdim)
        return RingTensor(torch.where(factor[:1] == 0, 0, data), factor, x.loose, x.dtype)

    def matmul(self, x: Value, y: Value) -> RingTensor:
        """Batched matrix product of values of rank >= 2."""
        a, b = self.settle(self.lift(x)), self.settle(self.lift(y))
        return RingTensor(self.ring.matmul(a.data, b.data), None, a.loose or b.loose, self.dtype_of(x, y))

    def where(self, condition: torch.Tensor, x: Value, y: Value) -> RingTensor:
        """Selection with broadcasting."""
        a, b = self.lift(x), self.lift(y)
        ndim = max(condition.dim(), a.ndim, b.ndim)
        a, b = a.rank(ndim), b.rank(ndim)
        choice = condition.reshape(1, *([1] * (ndim - condition.dim())), *condition.shape)
        data = torch.where(choice, a.data, b.data)
        factor = None
        if a.factor is not None or b.factor is not None:
            factor = torch.where(choice, self.factor_of(a), self.factor_of(b))
        return RingTensor(data, factor, a.loose or b.loose, self.dtype_of(x, y))
