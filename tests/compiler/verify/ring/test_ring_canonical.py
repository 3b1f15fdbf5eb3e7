"""Identities that square a root hold after canonicalisation; programs that differ stay different."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from hocket.compiler.capture import capture
from hocket.compiler.program import Program
from hocket.compiler.verify.ring.compare import compare
from hocket.compiler.verify.ring.verdict import Status

Function = Callable[[torch.Tensor], torch.Tensor]


def program_of(function: Function) -> Program:
    class Model(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return function(x)

    return capture(Model(), (torch.rand(5) + 1,), train=False)


EQUAL: dict[str, tuple[Function, Function]] = {
    "x rsqrt(x) = sqrt(x)": (lambda x: x * torch.rsqrt(x), torch.sqrt),
    "rsqrt(x) x = sqrt(x)": (lambda x: torch.rsqrt(x) * x, torch.sqrt),
    "x / sqrt(x) = sqrt(x)": (lambda x: x / x.sqrt(), torch.sqrt),
    "sqrt(x)^2 = x": (lambda x: x.sqrt() ** 2, lambda x: x.clone()),
    "sqrt(x) sqrt(x) = x": (lambda x: (lambda r: r * r)(x.sqrt()), lambda x: x.clone()),
    "rsqrt(x)^3 = rsqrt(x) / x": (lambda x: torch.rsqrt(x) ** 3, lambda x: torch.rsqrt(x) / x),
    "rsqrt(x)^3 = rsqrt(x) (1/x)": (lambda x: torch.rsqrt(x) ** 3, lambda x: torch.rsqrt(x) * x.reciprocal()),
    "norm^2 = sum of squares": (lambda x: torch.linalg.vector_norm(x) ** 2, lambda x: (x * x).sum()),
    "norm of two halves": (
        lambda x: torch.linalg.vector_norm(x),
        lambda x: (torch.linalg.vector_norm(x[:2]) ** 2 + torch.linalg.vector_norm(x[2:]) ** 2).sqrt(),
    ),
}

DIFFERENT: dict[str, tuple[Function, Function]] = {
    "x rsqrt(x) and rsqrt(x)": (lambda x: x * torch.rsqrt(x), torch.rsqrt),
    "sqrt(x)^2 and sqrt(x)": (lambda x: x.sqrt() ** 2, torch.sqrt),
    "rsqrt(x)^3 and rsqrt(x) / x^2": (lambda x: torch.rsqrt(x) ** 3, lambda x: torch.rsqrt(x) / (x * x)),
    "norm^2 and norm": (lambda x: torch.linalg.vector_norm(x) ** 2, lambda x: torch.linalg.vector_norm(x)),
    "sum of norms": (
        lambda x: torch.linalg.vector_norm(x),
        lambda x: torch.linalg.vector_norm(x[:2]) + torch.linalg.vector_norm(x[2:]),
    ),
    "x rsqrt(y)": (lambda x: x * torch.rsqrt(x + 1), torch.sqrt),
}


@pytest.mark.parametrize("name", EQUAL)
def test_equal_expressions_with_roots_are_equal(name: str) -> None:
    left, right = map(program_of, EQUAL[name])
    verdict = compare(left, right)
    assert verdict.status is Status.EQUAL, str(verdict)


@pytest.mark.parametrize("name", DIFFERENT)
def test_different_expressions_with_roots_differ(name: str) -> None:
    left, right = map(program_of, DIFFERENT[name])
    assert compare(left, right).status is Status.DIFFERENT
