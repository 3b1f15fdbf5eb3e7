"""Exact arithmetic in the finite exponential ring  R = F_r x GF(p^3),  r = p^2 + p + 1.

    E(u, v) = (omega^<t,v>, zeta^u)        E(x + y) = E(x) E(y)

Both components of E are non-trivial, so exponentials may be nested to any depth. An array of ring elements is an int64 tensor
``[4, *shape]``: row 0 is u mod r, rows 1..3 are the coefficients of v mod p. p < 2^11 and r < 2^22, so products of entries are
below 2^44 and sums of 512 of them are exact in float64: matrix products go through BLAS.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from fractions import Fraction

import numpy as np
import sympy
import torch

from .literals import Literal
from .tables import Tables, load_tables

_EXACT_TERMS = 512  # 2^9 products of two numbers below 2^22 stay below 2^53
_LIMB = 1 << 11


class Ring:
    """The operations of one ring. Stateless but for look-up tables: share it freely through ``ring_of``."""

    def __init__(self, tables: Tables) -> None:
        self.tables = tables
        self.p, self.r = tables.field.p, tables.r
        self._a, self._b = tables.field.a, tables.field.b
        modulus = torch.tensor([self.r, self.p, self.p, self.p], dtype=torch.int64)
        self._moduli = [modulus.view(4, *([1] * rank)) for rank in range(12)]
        frobenius = [tables.field.power((0, 1, 0), self.p * k) if k else (1, 0, 0) for k in range(3)]
        self._frobenius = torch.tensor(frobenius, dtype=torch.int64).T.contiguous()
        self._frobenius_twice = (self._frobenius @ self._frobenius) % self.p
        residues = np.arange(self.p, dtype=np.int64)
        self._inverse_p = torch.tensor([pow(int(i), -1, self.p) if i else 0 for i in residues])
        squares = torch.zeros(self.p, dtype=torch.int64)
        squares[torch.tensor(residues * residues % self.p)] = 1
        self._legendre = squares * 2 - 1
        self._legendre[0] = 0
        self._constants: dict[Literal, torch.Tensor] = {}

    # ---- sums and products -------------------------------------------------------------------------------------------------

    def modulus(self, x: torch.Tensor) -> torch.Tensor:
        """The moduli of the four rows, shaped to broadcast against ``x``."""
        return self._moduli[x.dim() - 1]

    def reduce(self, x: torch.Tensor) -> torch.Tensor:
        """Canonical representatives."""
        return torch.remainder(x, self._moduli[x.dim() - 1])

    def mul(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """Elementwise product with broadcasting (equal ranks)."""
        x0, x1, x2, x3 = x.unbind(0)
        y0, y1, y2, y3 = y.unbind(0)
        c3 = x2 * y3 + x3 * y2
        c4 = x3 * y3
        product = torch.stack(
            (
                x0 * y0,
                x1 * y1 + self._b * c3,
                x1 * y2 + x2 * y1 + self._a * c3 + self._b * c4,
                x1 * y3 + x2 * y2 + x3 * y1 + self._a * c4,
            )
        )
        return product.remainder_(self._moduli[product.dim() - 1])

    def scale(self, x: torch.Tensor, rational: torch.Tensor) -> torch.Tensor:
        """x times the image of a rational number, ``[4]`` with zeros in the last two places."""
        u, v = rational[0], rational[1]
        factors = torch.stack((u, v, v, v)).view(4, *([1] * (x.dim() - 1)))
        return (x * factors).remainder_(self._moduli[x.dim() - 1])

    def _mul_v(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        c3 = x[1] * y[2] + x[2] * y[1]
        c4 = x[2] * y[2]
        return torch.stack(
            (
                x[0] * y[0] + self._b * c3,
                x[0] * y[1] + x[1] * y[0] + self._a * c3 + self._b * c4,
                x[0] * y[2] + x[1] * y[1] + x[2] * y[0] + self._a * c4,
            )
        ).remainder_(self.p)

    def matmul(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """``[4, ..., M, K] @ [4, ..., K, N]``, batch dimensions broadcast."""
        rows, inner, columns = x.shape[-2], x.shape[-1], y.shape[-1]
        u = self._u_product(torch.matmul, x[0], y[0], inner)
        stacked = torch.matmul(torch.cat((x[1], x[2], x[3]), -2).double(), torch.cat((y[1], y[2], y[3]), -1).double())
        parts = stacked.long().remainder_(self.p).unflatten(-2, (3, rows)).unflatten(-1, (3, columns))
        return torch.cat((u[None], self._combine(lambda i, j: parts[..., i, :, j, :])))

    def bilinear(
        self, function: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], x: torch.Tensor, y: torch.Tensor, terms: int
    ) -> torch.Tensor:
        """Lift a real bilinear map (such as a convolution), given on float64 tensors; an entry sums at most ``terms`` products."""
        u = self._u_product(function, x[0], y[0], terms)
        xs, ys = [c.double() for c in x[1:]], [c.double() for c in y[1:]]
        parts = [[function(a, b).long().remainder_(self.p) for b in ys] for a in xs]
        return torch.cat((u[None], self._combine(lambda i, j: parts[i][j])))

    def _u_product(
        self, function: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], x: torch.Tensor, y: torch.Tensor, terms: int
    ) -> torch.Tensor:
        if terms <= _EXACT_TERMS:
            return function(x.double(), y.double()).long().remainder_(self.r)
        high = function((x // _LIMB).double(), y.double()).long().remainder_(self.r)
        low = function((x % _LIMB).double(), y.double()).long()
        return (high * _LIMB + low).remainder_(self.r)

    def _combine(self, part: Callable[[int, int], torch.Tensor]) -> torch.Tensor:
        c3 = part(1, 2) + part(2, 1)
        c4 = part(2, 2)
        return torch.stack(
            (
                part(0, 0) + self._b * c3,
                part(0, 1) + part(1, 0) + self._a * c3 + self._b * c4,
                part(0, 2) + part(1, 1) + part(2, 0) + self._a * c4,
            )
        ).remainder_(self.p)

    def product(self, x: torch.Tensor, dims: Sequence[int], *, keepdim: bool) -> torch.Tensor:
        """Product over (non-negative) dims of the shape, by pairwise folding; 1 over an empty dimension."""
        for dim in sorted(dims, reverse=True):
            axis = dim + 1
            if x.shape[axis] == 0:
                shape = [1 if d == axis else n for d, n in enumerate(x.shape)]
                x = self.ones(shape[1:])
            while (length := x.shape[axis]) > 1:
                half = length // 2
                folded = self.mul(x.narrow(axis, 0, half), x.narrow(axis, half, half))
                x = torch.cat((folded, x.narrow(axis, 2 * half, 1)), axis) if length % 2 else folded
            if not keepdim:
                x = x.squeeze(axis)
        return x

    def power(self, x: torch.Tensor, exponent: int) -> torch.Tensor:
        """Integer power; the caller has checked that x is invertible where the exponent is negative."""
        if exponent < 0:
            return self.power(self.inverse(x), -exponent)
        if exponent == 0:
            return self.ones(x.shape[1:])
        result: torch.Tensor | None = None
        while True:
            if exponent & 1:
                result = x if result is None else self.mul(result, x)
            exponent >>= 1
            if not exponent:
                return result if result is not None else x
            x = self.mul(x, x)

    # ---- inverses, roots, signs --------------------------------------------------------------------------------------------

    def _linear(self, matrix: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        product: torch.Tensor = torch.tensordot(matrix, v, dims=([1], [0]))
        return product.remainder_(self.p)

    def _adjoint(self, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The product of the two conjugates of v, and the norm of v in F_p."""
        adjoint = self._mul_v(self._linear(self._frobenius, v), self._linear(self._frobenius_twice, v))
        norm = v[0] * adjoint[0] + self._b * (v[1] * adjoint[2] + v[2] * adjoint[1])
        return adjoint, norm.remainder_(self.p)

    def inverse(self, x: torch.Tensor) -> torch.Tensor:
        """Elementwise inverse; a component without one becomes 0 (the caller counts those: ``zero_divisors``)."""
        adjoint, norm = self._adjoint(x[1:])
        v = (adjoint * self._inverse_p[norm]).remainder_(self.p)
        return torch.cat((self.tables.inverse[x[0]].long()[None], v))

    def zero_divisors(self, x: torch.Tensor) -> torch.Tensor:
        """Where x has no inverse."""
        return (x[0] == 0) | ((x[1] | x[2] | x[3]) == 0)

    def sign(self, x: torch.Tensor) -> torch.Tensor:
        """-1, 0 or 1: the quadratic character of the norm of v. sign(xy) = sign(x) sign(y), sign(-x) = -sign(x) as p = 3 mod 4."""
        signs: torch.Tensor = self._legendre[self._adjoint(x[1:])[1]]
        return signs

    def sqrt(self, x: torch.Tensor) -> torch.Tensor:
        """A multiplicative map s with s(x)^2 = x on the elements of odd order: s(xy) = s(x) s(y), s(1/x) = 1/s(x)."""
        # (p^3 + 1) / 4 = (p^2 - p + 1) (p + 1) / 4 as p = 3 mod 4, and v^(p^2) v / v^p costs two Frobenius maps and the norm
        v = x[1:]
        once, twice = self._linear(self._frobenius, v), self._linear(self._frobenius_twice, v)
        adjoint = self._mul_v(once, twice)
        norm = (v[0] * adjoint[0] + self._b * (v[1] * adjoint[2] + v[2] * adjoint[1])).remainder_(self.p)
        inverse_once = (self._mul_v(twice, v) * self._inverse_p[norm]).remainder_(self.p)  # 1 / v^p
        ratio = self._mul_v(self._mul_v(twice, v), inverse_once)
        root = self._power_v(ratio, (self.p + 1) // 4)
        return torch.cat((self.tables.root[x[0]].long()[None], root))

    def _power_v(self, v: torch.Tensor, exponent: int) -> torch.Tensor:
        """Positive powers in GF(p^3)."""
        result: torch.Tensor | None = None
        while True:
            if exponent & 1:
                result = v if result is None else self._mul_v(result, v)
            exponent >>= 1
            if not exponent:
                return v if result is None else result
            v = self._mul_v(v, v)

    # ---- exponential and logarithm -----------------------------------------------------------------------------------------

    def _pairing(self, x: torch.Tensor) -> torch.Tensor:
        t0, t1, t2 = self.tables.functional
        return (t0 * x[1] + t1 * x[2] + t2 * x[3]).remainder_(self.p)

    def exp(self, x: torch.Tensor) -> torch.Tensor:
        """E."""
        u = self.tables.omega_powers[self._pairing(x)].long()
        return torch.cat((u[None], self.tables.exponential[:, x[0]].long()))

    def project(self, x: torch.Tensor) -> torch.Tensor:
        """``log(exp(x))``: x modulo the kernel of E, as a canonical representative. Linear over the rationals."""
        return self._embed(x[0], self._pairing(x))

    def _embed(self, u: torch.Tensor, paired: torch.Tensor) -> torch.Tensor:
        scale = pow(self.tables.functional[0], -1, self.p)
        zero = torch.zeros_like(u)
        return torch.stack((u, paired * scale % self.p, zero, zero))

    def log(self, x: torch.Tensor) -> torch.Tensor:
        """The homomorphism (R*, x) -> (R, +) with ``log(exp(x)) = project(x)``."""
        p, r = self.p, self.r
        codes, order, omega_codes, omega_order = self._log_tables()
        y = self._mul_v(self._linear(self._frobenius, x[1:]), self.inverse(x)[1:])  # v^(p-1), of order r
        position = torch.searchsorted(codes, (y[0] + p * y[1] + p * p * y[2]).contiguous()).clamp_(max=r - 1)
        u = order[position].long() * pow(p - 1, -1, r) % r
        w = self._power_u(x[0], (r - 1) // p)  # u^(p+1), of order p, and 1/(p+1) = 1 mod p
        paired = omega_order[torch.searchsorted(omega_codes, w.contiguous()).clamp_(max=p - 1)]
        return self._embed(u, paired)

    @functools.cache  # noqa: B019 - a Ring lives as long as the process
    def _log_tables(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        order = self.tables.log_order
        z = self.tables.exponential[:, order.long()].long()
        codes = z[0] + self.p * z[1] + self.p * self.p * z[2]
        omega_codes, omega_order = torch.sort(self.tables.omega_powers.long())
        return codes, order, omega_codes, omega_order

    def _power_u(self, u: torch.Tensor, exponent: int) -> torch.Tensor:
        result = torch.ones_like(u)
        while exponent:
            if exponent & 1:
                result = result * u % self.r
            u = u * u % self.r
            exponent >>= 1
        return result

    # ---- constants, randomness, codes --------------------------------------------------------------------------------------

    def ones(self, shape: Sequence[int]) -> torch.Tensor:
        """The element 1 everywhere."""
        result = torch.zeros((4, *shape), dtype=torch.int64)
        result[:2] = 1
        return result

    def rational(self, value: Fraction) -> torch.Tensor:
        """``[4]``; ZeroDivisionError where the denominator vanishes mod p or r (choose another ring)."""
        n, d = value.numerator, value.denominator
        if d % self.r == 0 or d % self.p == 0:
            raise ZeroDivisionError(f"{value} has no image in the ring with p = {self.p}")
        return torch.tensor([n * pow(d, -1, self.r) % self.r, n * pow(d, -1, self.p) % self.p, 0, 0])

    def constant(self, literal: Literal) -> torch.Tensor:
        """``[4]``: rational x product of prime^(k/4) x product of symbols."""
        if literal not in self._constants:
            value = self.rational(literal.rational)[:, None]
            for prime, quarters in literal.quarter_powers:
                value = self.mul(value, self._root_of_prime(prime, quarters)[:, None])
            for name, exponent in literal.symbols:
                value = self.mul(value, self.power(self._symbol(name)[:, None], exponent))
            self._constants[literal] = value[:, 0]
        return self._constants[literal]

    def has_fourth_root(self, prime: int) -> bool:
        """Whether both fields hold a true fourth root, so that products of such roots are exact."""
        quarters = ((self.r, math.gcd(4, self.r - 1)), (self.p, 2))
        return all(pow(prime, (modulus - 1) // degree, modulus) == 1 for modulus, degree in quarters)

    @functools.cache  # noqa: B019
    def _root_of_prime(self, prime: int, quarters: int) -> torch.Tensor:
        """prime^(quarters/4), ``[4]``: from true roots where both fields have them, else from the multiplicative root map."""
        fourth = [sympy.nthroot_mod(prime, 4, modulus) for modulus in (self.r, self.p)]
        square = [sympy.sqrt_mod(prime, modulus) for modulus in (self.r, self.p)]
        if all(root is not None for root in fourth):
            root = torch.tensor([int(fourth[0]), int(fourth[1]), 0, 0])[:, None]
            return self.power(root, quarters)[:, 0]
        if all(root is not None for root in square):
            half = torch.tensor([int(square[0]), int(square[1]), 0, 0])[:, None]
        else:
            half = self.sqrt(self.rational(Fraction(prime))[:, None])
        root = self.power(half, quarters // 2)
        return (self.mul(root, self.sqrt(half)) if quarters % 2 else root)[:, 0]

    @functools.cache  # noqa: B019
    def _symbol(self, name: str) -> torch.Tensor:
        generator = torch.Generator().manual_seed(sum(ord(c) << 8 * i for i, c in enumerate(name[:6])))
        return torch.cat([torch.randint(1, m, (1,), generator=generator) for m in (self.r, self.p, self.p, self.p)])

    def random(self, shape: Sequence[int], generator: torch.Generator) -> torch.Tensor:
        """Uniform elements."""
        u = torch.randint(0, self.r, (1, *shape), generator=generator)
        return torch.cat((u, torch.randint(0, self.p, (3, *shape), generator=generator)))

    def code(self, x: torch.Tensor) -> torch.Tensor:
        """An injective map to [0, 2^62)."""
        return ((x[3] * self.p + x[2]) * self.p + x[1]) * self.r + x[0]

    def order_key(self, x: torch.Tensor) -> torch.Tensor:
        """A total order: small integers (also negative ones) keep their natural order."""
        signed = torch.where(x[0] > self.r // 2, x[0] - self.r, x[0])
        return signed * self.p**3 + (x[3] * self.p + x[2]) * self.p + x[1]

    def hash(self, name: str, key: int, arguments: Sequence[torch.Tensor]) -> torch.Tensor:
        """An uninterpreted function: a keyed hash of exact elements (equal shapes)."""
        state = torch.tensor(_signed(hash_text(name) ^ (key * 0x9E3779B97F4A7C15)), dtype=torch.int64)
        for argument in arguments:
            state = _mix(state ^ self.code(argument))
        rows = [_mix(state + 0x1234567 * i).remainder(m) for i, m in enumerate((self.r, self.p, self.p, self.p))]
        return torch.stack(rows)


@functools.cache
def ring_of(p: int) -> Ring:
    """The shared ring with this p."""
    return Ring(load_tables(p))


def hash_text(text: str) -> int:
    """A 64-bit hash that is the same in every process."""
    state = 0xCBF29CE484222325
    for byte in text.encode():
        state = ((state ^ byte) * 0x100000001B3) % (1 << 64)
    return state


def _signed(value: int) -> int:
    value %= 1 << 64
    return value - (1 << 64) if value >= 1 << 63 else value


def _mix(z: torch.Tensor) -> torch.Tensor:
    """The finaliser of splitmix64, on wrapping int64."""
    z = (z ^ (z >> 33)) * -49064778989728563
    z = (z ^ (z >> 29)) * -4265267296055464877
    return z ^ (z >> 32)
