"""Numbers in program text, read exactly.

A float stands for the number its author meant: 1e-5 is 1/100000, 0.3333333333333333 is 1/3, 0.17677669529663687 is 32^(-1/2), and
0.6931471805599453 is ln 2. Readings are injective: different floats of one type never get the same reading unless they lie within a
few units in the last place of the same simple number.

    literal  =  rational  x  product of prime^(k/4), k in {1, 2, 3}  x  product of symbol^n        (symbols: ln2, sqrtpi)
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import sympy

_DECIMAL_DIGITS = 12  # a literal of at most so many digits is read as the decimal it is written as
_SIMPLE = 1 << 16  # largest denominator of a "simple fraction"
_RADICAND = 1 << 14  # and of the number under a root
_ULPS = Fraction(4, 1 << 52)

_SYMBOL_FORMS: tuple[tuple[float, tuple[tuple[str, int], ...]], ...] = (
    (math.log(2), (("ln2", 1),)),
    (1 / math.log(2), (("ln2", -1),)),
    (math.sqrt(math.pi), (("sqrtpi", 1),)),
    (1 / math.sqrt(math.pi), (("sqrtpi", -1),)),
    (math.pi, (("sqrtpi", 2),)),
    (1 / math.pi, (("sqrtpi", -2),)),
    (math.log(2) ** 2, (("ln2", 2),)),
)


@dataclass(frozen=True)
class Literal:
    """A number in exact form. quarter_powers: sorted (prime, k) standing for prime^(k/4)."""

    rational: Fraction
    quarter_powers: tuple[tuple[int, int], ...] = ()
    symbols: tuple[tuple[str, int], ...] = ()


@functools.lru_cache(maxsize=65536)
def read(value: float, *, single: bool = False) -> Literal:
    """The exact reading of a finite number. single: stored in 32 bits or less, so it has the decimals of a float32."""
    if isinstance(value, (bool, int)):
        return Literal(Fraction(int(value)))
    if value < 0:
        positive = read(-value, single=single)
        return Literal(-positive.rational, positive.quarter_powers, positive.symbols)
    exact = Fraction(value)
    if exact.denominator <= _SIMPLE:
        return Literal(exact)
    return _read_single(value) if single else _read_double(value)


def square_root(value: Fraction) -> Literal:
    """The exact square root of a positive rational."""
    return _rooted(value, 2)


def _read_single(value: float) -> Literal:
    text = str(np.float32(value))
    if float(np.float32(value)) != value:  # not a float32 after all
        return _read_double(value)
    if _digits(text) <= 6:
        return Literal(Fraction(text))
    simple = Fraction(value).limit_denominator(1000)
    if simple and np.float32(float(simple)) == np.float32(value):
        return Literal(simple)
    return Literal(Fraction(value))


def _read_double(value: float) -> Literal:
    text = repr(value)
    digits = _digits(text)
    if digits in (9, 10):  # 1.44269504 as kernels write it; never for short literals
        for number, symbols in _SYMBOL_FORMS[:2]:
            if abs(value / number - 1) < 10.0 ** (1 - digits):
                return Literal(Fraction(1), (), symbols)
    if digits <= _DECIMAL_DIGITS:
        return Literal(Fraction(text))
    exact = Fraction(value)
    simple = _near(exact, _SIMPLE, _ULPS)
    if simple is not None:
        return Literal(simple)
    return next(_irrational_readings(value), Literal(exact))


def _irrational_readings(value: float) -> Iterator[Literal]:
    root = _near(Fraction(value) ** 2, _RADICAND, 2 * _ULPS)
    if root is not None:
        yield _rooted(root, 2)
    root = _near(Fraction(value) ** 4, _RADICAND, 4 * _ULPS)
    if root is not None:
        yield _rooted(root, 4)
    for number, symbols in _SYMBOL_FORMS:
        factor = _near(Fraction(value / number), _RADICAND, 2 * _ULPS)
        if factor is not None:
            yield Literal(factor, (), symbols)
    factor = _near(Fraction(value) ** 2 * Fraction(math.pi), 1 << 10, 4 * _ULPS)  # sqrt(2/pi), 1/sqrt(2 pi)
    if factor is not None:
        rooted = _rooted(factor, 2)
        yield Literal(rooted.rational, rooted.quarter_powers, (("sqrtpi", -1),))


def _near(value: Fraction, denominator: int, tolerance: Fraction) -> Fraction | None:
    simple = value.limit_denominator(denominator)
    return simple if simple and abs(simple - value) <= value * tolerance else None


def _rooted(value: Fraction, degree: int) -> Literal:
    """value^(1/degree) for degree 2 or 4, in normal form."""
    rational, powers = Fraction(1), []
    factors: dict[int, int] = {int(q): int(n) for q, n in sympy.factorint(value.numerator).items()}
    for prime, exponent in sympy.factorint(value.denominator).items():
        factors[int(prime)] = factors.get(int(prime), 0) - int(exponent)
    for prime, exponent in sorted(factors.items()):
        whole, quarters = divmod(exponent * (4 // degree), 4)
        rational *= Fraction(prime) ** whole
        if quarters:
            powers.append((prime, quarters))
    return Literal(rational, tuple(powers))


def _digits(text: str) -> int:
    return len(text.lower().split("e")[0].replace(".", "").replace("-", "").strip("0"))
