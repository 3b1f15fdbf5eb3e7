"""The laws of the ring, its tables on disk, and how rarely a difference is missed."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hocket.compiler.verify.ring.algebra import Algebra
from hocket.compiler.verify.ring.arithmetic import Ring, ring_of
from hocket.compiler.verify.ring.literals import Literal, read
from hocket.compiler.verify.ring.tables import check_pair, load_tables
from hocket.compiler.verify.ring.value import RingTensor

P = st.sampled_from([1559, 1847, 911])


def pair(p: int, seed: int) -> tuple[Ring, torch.Tensor, torch.Tensor]:
    ring, generator = ring_of(p), torch.Generator().manual_seed(seed)
    return ring, ring.random((20,), generator), ring.random((20,), generator)


@given(P, st.integers(0, 10_000))
@settings(max_examples=25, deadline=None)
def test_exp_log_inverse_root_and_sign_are_homomorphisms(p: int, seed: int) -> None:
    ring, x, y = pair(p, seed)
    product = ring.mul(x, y)
    units = ~(ring.zero_divisors(x) | ring.zero_divisors(y))
    assert torch.equal(ring.exp(ring.reduce(x + y)), ring.mul(ring.exp(x), ring.exp(y)))
    assert torch.equal(ring.log(ring.exp(x)), ring.project(x))
    assert torch.equal(ring.log(product)[:, units], ring.reduce(ring.log(x) + ring.log(y))[:, units])
    assert torch.equal(ring.mul(x, ring.inverse(x))[:, units], ring.ones((20,))[:, units])
    assert torch.equal(ring.sqrt(product), ring.mul(ring.sqrt(x), ring.sqrt(y)))
    assert torch.equal(ring.sign(product), ring.sign(x) * ring.sign(y))
    assert torch.equal(ring.sign(ring.reduce(-x)), -ring.sign(x))


@given(P, st.integers(0, 1000), st.integers(1, 900))
@settings(max_examples=15, deadline=None)
def test_matrix_products_are_exact_for_long_sums(p: int, seed: int, inner: int) -> None:
    ring, generator = ring_of(p), torch.Generator().manual_seed(seed)
    a, b = ring.random((2, inner), generator), ring.random((inner, 3), generator)
    terms = ring.mul(a[:, :, :, None], b[:, None, :, :])
    assert torch.equal(ring.matmul(a, b), ring.reduce(terms.sum(2)))
    assert torch.equal(ring.bilinear(torch.matmul, a, b, inner), ring.matmul(a, b))


@given(st.fractions(max_denominator=10_000), st.fractions(max_denominator=10_000))
@settings(max_examples=50, deadline=None)
def test_rationals_embed_as_a_field(x: Fraction, y: Fraction) -> None:
    ring = ring_of(1559)
    if any(f.denominator % m == 0 for f in (x, y) for m in (ring.p, ring.r)):
        return
    left, right = ring.rational(x), ring.rational(y)
    assert torch.equal(ring.rational(x * y), ring.mul(left[:, None], right[:, None])[:, 0])
    assert torch.equal(ring.rational(x + y), ring.reduce((left + right)[:, None])[:, 0])


@pytest.mark.parametrize(
    ("value", "literal"),
    [
        (1e-5, Literal(Fraction(1, 100_000))),
        (1e-6, Literal(Fraction(1, 1_000_000))),
        (0.1, Literal(Fraction(1, 10))),
        (1 / 3, Literal(Fraction(1, 3))),
        (-2 / 7, Literal(Fraction(-2, 7))),
        (0.044715, Literal(Fraction(44715, 1_000_000))),
        (32**-0.5, Literal(Fraction(1, 8), ((2, 2),))),
        (32**-0.25, Literal(Fraction(1, 4), ((2, 3),))),
        (1.44269504, Literal(Fraction(1), (), (("ln2", -1),))),
    ],
)
def test_numbers_are_read_as_their_author_meant_them(value: float, literal: Literal) -> None:
    assert read(value) == literal


def test_single_precision_constants_read_as_their_decimals() -> None:
    third, tenth = torch.tensor(1 / 3), torch.tensor(0.1)
    assert read(float(third), single=True) == Literal(Fraction(1, 3))
    assert read(float(tenth), single=True) == Literal(Fraction(1, 10))


@given(st.floats(1e-6, 1e6), st.integers(1, 3))
@settings(max_examples=100, deadline=None)
def test_reading_keeps_different_floats_apart(value: float, steps: int) -> None:
    import math

    other = value
    for _ in range(100 * steps):
        other = math.nextafter(other, math.inf)
    assert read(value) != read(other)


def test_tables_are_cached_checked_and_rebuilt(tmp_path: Path) -> None:
    first = load_tables(743, str(tmp_path))
    stored = next(tmp_path.iterdir())
    content = bytearray(stored.read_bytes())
    expected = first.exponential.clone()
    for damage in (bytes(content[:1000]), bytes(content[:5000]) + b"\xff" + bytes(content[5001:]), b""):
        stored.write_bytes(damage)
        load_tables.cache_clear()
        assert torch.equal(load_tables(743, str(tmp_path)).exponential, expected)
        assert stored.read_bytes() == bytes(content)
    assert [path.name for path in tmp_path.iterdir()] == [stored.name]


def test_a_cache_that_cannot_be_written_is_only_slower(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    load_tables.cache_clear()
    assert load_tables(743, str(blocked)).r == 743**2 + 743 + 1


@pytest.mark.parametrize("p", [4, 101, 1000, 3001])
def test_unfit_pairs_are_refused(p: int) -> None:
    with pytest.raises(ValueError, match="prime"):
        check_pair(p)


@pytest.mark.parametrize(("depth", "limit"), [(1, 3e-4), (2, 5e-3), (3, 5e-3)])
def test_differences_are_missed_as_rarely_as_stated(depth: int, limit: float, tmp_path: Path) -> None:
    """At p = 59 a difference under nested exponentials is missed about once in p^2 = 3,481 comparisons."""
    ring = Ring(load_tables(59, str(tmp_path)))
    x = ring.random((100_000,), torch.Generator().manual_seed(3))
    y = ring.reduce(2 * x)
    for _ in range(depth):
        x, y = ring.exp(x), ring.exp(y)
    missed = float((x == y).all(0).double().mean())
    assert missed < limit


def test_masks_are_minus_infinity_and_zero_times_a_mask_is_zero() -> None:
    algebra = Algebra(ring_of(1559))
    mask = algebra.lift(torch.tensor([0.0, -1e9, float("-inf")]))
    assert algebra.is_minus_infinity(mask).tolist() == [False, True, True]
    assert bool((algebra.exp(mask).data[:, 1:] == 0).all())


def test_division_by_zero_poisons() -> None:
    algebra = Algebra(ring_of(1559))
    algebra.reciprocal(RingTensor(torch.zeros(4, 3, dtype=torch.int64)))
    assert algebra.poison == 3
