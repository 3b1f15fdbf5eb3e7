"""Identities of real arithmetic that rewrites rely on hold exactly over the ring, and near misses do not."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

from hocket.compiler.verify.ring.algebra import Algebra
from hocket.compiler.verify.ring.arithmetic import ring_of
from hocket.compiler.verify.ring.eager import RingArray
from hocket.compiler.verify.ring.equality import same
from hocket.compiler.verify.ring.value import RingTensor


class Draws:
    """Random arrays of one evaluation."""

    def __init__(self, p: int = 1559, seed: int = 9) -> None:
        self.algebra = Algebra(ring_of(p), key=seed)
        self.generator = torch.Generator().manual_seed(seed)
        self.x, self.y, self.v, self.w = (self.draw(s) for s in ((3, 8), (3, 8), (8, 5), (8,)))

    def draw(self, shape: tuple[int, ...]) -> RingArray:
        return RingArray(RingTensor(self.algebra.ring.random(shape, self.generator)), self.algebra)

    def equal(self, a: object, b: object) -> bool:
        left, right = (t.ring_value if isinstance(t, RingArray) else t for t in (a, b))
        return same(self.algebra, left, right)


def online_softmax(x: torch.Tensor, v: torch.Tensor, block: int = 2) -> torch.Tensor:
    top, total, out = None, None, None
    for start in range(0, x.shape[1], block):
        s = x[:, start : start + block]
        here = s.amax(1, keepdim=True)
        new = here if top is None else torch.maximum(top, here)
        p = (s - new).exp()
        part, value = p.sum(1, keepdim=True), p @ v[start : start + block]
        if top is None:
            total, out = part, value
        else:
            c = (top - new).exp()
            total, out = total * c + part, out * c + value
        top = new
    return out / total


def merge_by_lse(x: torch.Tensor, v: torch.Tensor, how: str) -> torch.Tensor:
    o1, o2 = x[:, :4].softmax(1) @ v[:4], x[:, 4:].softmax(1) @ v[4:]
    l1, l2 = x[:, :4].logsumexp(1, keepdim=True), x[:, 4:].logsumexp(1, keepdim=True)
    if how == "sigmoid":
        return o1 - torch.sigmoid(l2 - l1) * (o1 - o2)
    if how == "max":
        m = torch.maximum(l1, l2)
        a, c = (l1 - m).exp(), (l2 - m).exp()
        return (o1 * a + o2 * c) / (a + c)
    total = torch.logsumexp(torch.cat((l1, l2), 1), 1, keepdim=True)
    return o1 * (l1 - total).exp() + o2 * (l2 - total).exp()


def layer_norm(x: torch.Tensor) -> torch.Tensor:
    return F.layer_norm(x, (8,), None, None, 1e-5)


def welford(x: torch.Tensor) -> torch.Tensor:
    a, c = x[:, :4], x[:, 4:]
    ma, mc = a.mean(1, keepdim=True), c.mean(1, keepdim=True)
    m2 = ((a - ma) ** 2).sum(1, keepdim=True) + ((c - mc) ** 2).sum(1, keepdim=True) + (ma - mc) ** 2 * 4 * 4 / 8
    return (x - (ma + mc) / 2) * torch.rsqrt(m2 / 8 + 1e-5)


def normalised(e: torch.Tensor) -> torch.Tensor:
    return e / e.sum(1, keepdim=True)


CAUSAL = torch.ones(3, 8).tril() == 0

Pair = Callable[[Draws], tuple[object, object]]

EXACT: dict[str, Pair] = {
    "softmax and max-subtracted softmax": lambda d: (d.x.softmax(1), normalised((d.x - d.x.amax(1, keepdim=True)).exp())),
    "softmax @ v and online softmax": lambda d: (d.x.softmax(1) @ d.v, online_softmax(d.x, d.v)),
    "lse merge, sigmoid": lambda d: (d.x.softmax(1) @ d.v, merge_by_lse(d.x, d.v, "sigmoid")),
    "lse merge, max": lambda d: (d.x.softmax(1) @ d.v, merge_by_lse(d.x, d.v, "max")),
    "lse merge, logsumexp": lambda d: (d.x.softmax(1) @ d.v, merge_by_lse(d.x, d.v, "lse")),
    "log_softmax and x - logsumexp": lambda d: (d.x.log_softmax(1), d.x - d.x.logsumexp(1, keepdim=True)),
    "mean of differences": lambda d: ((d.x.logsumexp(1) - d.x[:, 0]).mean(), d.x.logsumexp(1).mean() - d.x[:, 0].mean()),
    "log(softmax)": lambda d: (d.x.softmax(1).log(), d.x.log_softmax(1)),
    "sigmoid by exp(-x)": lambda d: (torch.sigmoid(d.x), 1 / (1 + (-d.x).exp())),
    "sigmoid by exp(x)": lambda d: (torch.sigmoid(d.x), d.x.exp() / (1 + d.x.exp())),
    "tanh by sigmoid": lambda d: (torch.tanh(d.x), 2 * torch.sigmoid(2 * d.x) - 1),
    "sigmoid(x) = 1 - sigmoid(-x)": lambda d: (torch.sigmoid(d.x), 1 - torch.sigmoid(-d.x)),
    "softplus and logsigmoid": lambda d: (F.softplus(d.x), -F.logsigmoid(-d.x)),
    "gelu tanh by sigmoid": lambda d: (
        F.gelu(d.x, approximate="tanh"),
        d.x * torch.sigmoid(2 * math.sqrt(2 / math.pi) * (d.x + 0.044715 * d.x**3)),
    ),
    "gelu by erf": lambda d: (F.gelu(d.x), d.x * 0.5 * (1 + torch.erf(d.x / math.sqrt(2)))),
    "erf of a multiple and of a quotient": lambda d: (torch.erf(d.x * 0.7071067811865476), torch.erf(d.x / 1.4142135623730951)),
    "erf is odd": lambda d: (torch.erf(-d.x), -torch.erf(d.x)),
    "sin is odd": lambda d: (torch.sin(-d.x), -torch.sin(d.x)),
    "cos is even": lambda d: (torch.cos(-d.x), torch.cos(d.x)),
    "cos^2 + sin^2 = 1": lambda d: (torch.cos(d.x) ** 2 + torch.sin(d.x) ** 2, torch.ones_like(d.x)),
    "layer norm by moments": lambda d: (
        layer_norm(d.x),
        (d.x - d.x.mean(1, keepdim=True)) * torch.rsqrt((d.x * d.x).mean(1, keepdim=True) - d.x.mean(1, keepdim=True) ** 2 + 1e-5),
    ),
    "layer norm by Welford merge": lambda d: (layer_norm(d.x), welford(d.x)),
    "x rsqrt(v) = x / sqrt(v)": lambda d: (d.x * torch.rsqrt(d.y), d.x / d.y.sqrt()),
    "sqrt is multiplicative": lambda d: ((d.x * d.y).sqrt(), d.x.sqrt() * d.y.sqrt()),
    "scale split in two roots, 32": lambda d: ((d.x @ d.v) / math.sqrt(32), (d.x * 32**-0.25) @ (d.v * 32**-0.25)),
    "scale split in two roots, 64": lambda d: ((d.x @ d.v) / 8, (d.x * math.sqrt(1 / 8)) @ (d.v * math.sqrt(1 / 8))),
    "scale split in two roots, 96": lambda d: ((d.x @ d.v) / math.sqrt(96), (d.x * 96**-0.25) @ (d.v * 96**-0.25)),
    "exp2(x log2 e) = exp(x)": lambda d: (torch.exp2(d.x * math.log2(math.e)), d.x.exp()),
    "x / 3 = x * 0.333": lambda d: (d.x / 3, d.x * (1 / 3)),
    "0.1 x = x / 10": lambda d: (d.x * 0.1, d.x / 10),
    "relu = max(x, 0)": lambda d: (F.relu(d.x), torch.clamp(d.x, min=0)),
    "relu = maximum(x, zeros)": lambda d: (F.relu(d.x), torch.maximum(d.x, torch.zeros_like(d.x))),
    "relu(2x) = 2 relu(x)": lambda d: (F.relu(2 * d.x), 2 * F.relu(d.x)),
    "relu(3x) = 3 relu(x)": lambda d: (F.relu(3 * d.x), 3 * F.relu(d.x)),
    "relu(x) - relu(-x) = x": lambda d: (F.relu(d.x) - F.relu(-d.x), d.x),
    "-inf mask and zero weight": lambda d: (d.x.masked_fill(CAUSAL, -math.inf).softmax(1), normalised(d.x.exp() * ~CAUSAL)),
    "-inf and -1e9": lambda d: (d.x.masked_fill(CAUSAL, -math.inf).softmax(1), d.x.masked_fill(CAUSAL, -1e9).softmax(1)),
    "-inf and finfo.min": lambda d: (
        d.x.masked_fill(CAUSAL, -math.inf).softmax(1),
        d.x.masked_fill(CAUSAL, torch.finfo(torch.float32).min).softmax(1),
    ),
    "added mask computed as (1 - m) finfo.min": lambda d: (
        d.x.masked_fill(CAUSAL, -math.inf).softmax(1),
        (d.x + RingArray(d.algebra.lift(1.0 - (~CAUSAL).float()), d.algebra) * torch.finfo(torch.float32).min).softmax(1),
    ),
    "scaled after masking": lambda d: (
        (d.x.masked_fill(CAUSAL, -math.inf) * 0.3).softmax(1),
        (d.x * 0.3).masked_fill(CAUSAL, -math.inf).softmax(1),
    ),
    "exp(log x) = x": lambda d: (d.x.log().exp(), d.x),
    "x ** 2.0 = x x": lambda d: (d.x**2.0, d.x * d.x),
    "nested exp": lambda d: ((d.x + d.y).exp().exp(), (d.x.exp() * d.y.exp()).exp()),
    "nested softmax shift": lambda d: ((d.x.softmax(1) + d.w[0]).softmax(1), d.x.softmax(1).softmax(1)),
    "triple exp": lambda d: ((d.x + 1).exp().exp().exp(), (d.x.exp() * torch.ones_like(d.x).exp()).exp().exp()),
}

DIFFERENT: dict[str, Pair] = {
    "softmax scale": lambda d: (d.x.softmax(1), (2 * d.x).softmax(1)),
    "nested exp of a multiple": lambda d: (d.x.exp().exp(), (2 * d.x).exp().exp()),
    "eps 1e-5 and 1e-6": lambda d: (torch.rsqrt(d.x + 1e-5), torch.rsqrt(d.x + 1e-6)),
    "erf of a multiple": lambda d: (torch.erf(2 * d.x), 2 * torch.erf(d.x)),
    "erf is not even": lambda d: (torch.erf(-d.x), torch.erf(d.x)),
    "sin is not even": lambda d: (torch.sin(-d.x), torch.sin(d.x)),
    "cos and sin": lambda d: (torch.cos(d.x), torch.sin(d.x)),
    "cos^2 - sin^2": lambda d: (torch.cos(d.x) ** 2 - torch.sin(d.x) ** 2, torch.ones_like(d.x)),
    "gelu variants": lambda d: (F.gelu(d.x), F.gelu(d.x, approximate="tanh")),
    "relu of a sum": lambda d: (F.relu(d.x + d.y), F.relu(d.x) + F.relu(d.y)),
    "lse averaged": lambda d: (d.x.logsumexp(1), (d.x[:, :4].logsumexp(1) + d.x[:, 4:].logsumexp(1)) / 2),
    "mask off by one": lambda d: (
        d.x.masked_fill(CAUSAL, -math.inf).softmax(1),
        d.x.masked_fill(torch.ones(3, 8).tril(1) == 0, -math.inf).softmax(1),
    ),
    "unbiased variance": lambda d: (d.x.var(1), d.x.var(1, correction=0)),
    "sqrt of a sum": lambda d: ((d.x + d.y).sqrt(), d.x.sqrt() + d.y.sqrt()),
    "rsqrt powers": lambda d: (torch.rsqrt(d.x) ** 3, torch.rsqrt(d.x)),
    "1/3 and 0.333": lambda d: (d.x / 3, d.x * 0.333),
    "scale roots": lambda d: (d.x * 32**-0.25, d.x * 32**-0.5),
    "tanh and sigmoid": lambda d: (torch.tanh(d.x), torch.sigmoid(d.x)),
    "log_softmax and softmax": lambda d: (d.x.log_softmax(1), d.x.softmax(1)),
}


@pytest.mark.parametrize("p", [1559, 1847, 911])
@pytest.mark.parametrize("name", EXACT)
def test_equal_real_expressions_are_equal_in_the_ring(name: str, p: int) -> None:
    draws = Draws(p)
    left, right = EXACT[name](draws)
    assert draws.algebra.poison == 0
    assert draws.equal(left, right)


@pytest.mark.parametrize("p", [1559, 1847, 911])
@pytest.mark.parametrize("name", DIFFERENT)
def test_different_real_expressions_differ_in_the_ring(name: str, p: int) -> None:
    draws = Draws(p)
    left, right = DIFFERENT[name](draws)
    assert not draws.equal(left, right)


def test_a_ring_with_a_fourth_root_of_5_reads_scales_of_80_channels() -> None:
    draws = Draws(1559)
    assert draws.algebra.ring.has_fourth_root(5)
    assert not ring_of(1847).has_fourth_root(5)
    assert draws.equal((draws.x @ draws.v) / math.sqrt(80), (draws.x * 80**-0.25) @ (draws.v * 80**-0.25))
