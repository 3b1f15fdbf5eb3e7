"""The op table against torch itself: operator samples rounded to integers have exact rational results on both sides."""

from __future__ import annotations

import warnings
from fractions import Fraction
from typing import Any

import pytest
import torch
from torch.testing._internal.common_methods_invocations import op_db
from torch.utils._pytree import tree_flatten, tree_map

from hocket.compiler.errors import UnsupportedError
from hocket.compiler.verify.ring.algebra import Algebra
from hocket.compiler.verify.ring.arithmetic import ring_of
from hocket.compiler.verify.ring.eager import RingArray
from hocket.compiler.verify.ring.value import RingTensor

_TEXT = """
add sub rsub mul div neg reciprocal square sum mean cumsum cumprod prod mm bmm addmm addmv addbmm baddbmm mv dot
matmul view reshape permute transpose t unsqueeze squeeze expand narrow select cat stack split split_with_sizes chunk
unbind flip roll where masked_fill tril triu index_select gather index_add index_copy scatter scatter_add
take_along_dim var var_mean  nn.functional.conv1d nn.functional.conv2d nn.functional.conv3d
nn.functional.conv_transpose1d nn.functional.conv_transpose2d nn.functional.embedding
nn.functional.adaptive_avg_pool2d nn.functional.linear nn.functional.nll_loss nn.functional.pad constant_pad_nd
index_put slice addcmul addcdiv lerp einsum tensordot outer nn.functional.mse_loss nn.functional.avg_pool2d diagonal
movedim swapaxes repeat tile ravel flatten hstack vstack select_scatter slice_scatter masked_select diag_embed
nn.functional.unfold nn.functional.fold nn.functional.pixel_shuffle nn.functional.interpolate trace kron
"""
NAMES = _TEXT.split()

RATIONAL = [op for op in op_db if op.name in NAMES and not op.variant_test_name]


def rounded(x: Any) -> Any:
    return torch.round(x.double() * 3).clamp(-9, 9) if isinstance(x, torch.Tensor) and x.is_floating_point() else x


def as_ring(algebra: Algebra) -> Any:
    """Lift, and forget the known value: the table must not lean on it."""

    def convert(x: Any) -> Any:
        if not isinstance(x, torch.Tensor) or not x.is_floating_point():
            return x
        value = algebra.lift(x)
        return RingArray(RingTensor(value.data, value.factor, dtype=x.dtype), algebra)

    return convert


def agrees(algebra: Algebra, expected: torch.Tensor, found: Any) -> bool:
    if not isinstance(found, RingArray):
        return bool(torch.equal(expected, found)) if not expected.is_floating_point() else True
    value = found.ring_value
    if tuple(value.shape) != tuple(expected.shape):
        return False
    if value.factor is not None and not bool((value.factor == algebra.ring.ones(value.factor.shape[1:])).all()):
        return True  # a logarithm: compared by the identities instead
    wanted = [algebra.ring.rational(Fraction(x).limit_denominator(200_000)) for x in expected.reshape(-1).tolist()]
    return not wanted or bool((value.data.reshape(4, -1) == torch.stack(wanted, 1)).all())


@pytest.mark.parametrize("op", RATIONAL, ids=lambda op: op.name)
def test_the_table_agrees_with_torch_on_rationals(op: Any) -> None:
    algebra = Algebra(ring_of(1559))
    checked = 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        samples = list(op.sample_inputs("cpu", torch.float64, requires_grad=False))[:10]
        for sample in samples:
            args, kwargs = tree_map(rounded, (sample.input, *sample.args)), tree_map(rounded, sample.kwargs)
            try:
                expected = tree_flatten(op.op(*args, **kwargs))[0]
            except (RuntimeError, IndexError, ValueError):
                continue  # the rounded sample is not valid input
            if any(isinstance(t, torch.Tensor) and t.is_floating_point() and not t.isfinite().all() for t in expected):
                continue
            try:
                found = tree_flatten(op.op(*tree_map(as_ring(algebra), args), **tree_map(as_ring(algebra), kwargs)))[0]
            except UnsupportedError:
                continue
            for left, right in zip(expected, found, strict=True):
                if isinstance(left, torch.Tensor):
                    assert agrees(algebra, left, right), (sample.args, sample.kwargs)
                    checked += 1
    assert checked, "no sample of this op was checked"
