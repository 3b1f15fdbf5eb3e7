"""Backward ops, order ops and kernels of the op table: what uses them equals a formula that does not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import hocket
from hocket.compiler.capture import capture
from hocket.compiler.errors import UnsupportedError
from hocket.compiler.verify.report import Status, Verdict
from hocket.compiler.verify.ring.algebra import Algebra
from hocket.compiler.verify.ring.arithmetic import ring_of
from hocket.compiler.verify.ring.evaluate import apply
from hocket.compiler.verify.ring.table import op_table
from hocket.compiler.verify.ring.value import RingTensor

aten = torch.ops.aten
BAG = torch.tensor([0, 2, 1, 2, 4, 4, 3])
STARTS = torch.tensor([0, 3, 3])
ROWS = [[0, 1, 2, 0], [0, 0, 2, 1], [2, 1, 2, 0]]
PLACES = torch.tensor(ROWS)


def _bags(mode: str) -> Callable[[Tensor], Tensor]:
    return lambda w: F.embedding_bag(BAG, w, STARTS, mode=mode, padding_idx=4)


def _bags_by_rows(mode: str) -> Callable[[Tensor], Tensor]:
    def formula(w: Tensor) -> Tensor:
        first, rest = w[0] + w[2] + w[1], w[2] + w[3]
        scale = torch.tensor([[3.0], [1.0], [2.0]]) if mode == "mean" else torch.ones(3, 1)
        return torch.stack([first, torch.zeros_like(first), rest]) / scale

    return formula


def _scattered(reduce: str, *, keep: bool) -> Callable[..., Tensor]:
    return lambda x, s: x.scatter_reduce(1, PLACES, s, reduce, include_self=keep)


def _scattered_by_loops(reduce: str, *, keep: bool) -> Callable[..., Tensor]:
    joins: dict[str, Callable[[Tensor], Tensor]] = {
        "sum": lambda t: t.sum(),
        "prod": lambda t: t.prod(),
        "mean": lambda t: t.mean(),
        "amax": lambda t: t.amax(),
        "amin": lambda t: t.amin(),
    }

    def formula(x: Tensor, s: Tensor) -> Tensor:
        rows = []
        for i in range(3):
            row = []
            for j in range(3):
                hits = [s[i, k] for k in range(4) if ROWS[i][k] == j]
                found = [x[i, j], *hits] if keep or not hits else hits
                row.append(joins[reduce](torch.stack(found)))
            rows.append(torch.stack(row))
        return torch.stack(rows)

    return formula


EQUAL: dict[str, tuple[Callable[..., Any], Callable[..., Any], tuple[Tensor, ...]]] = {
    **{f"embedding bag, {mode}": (_bags(mode), _bags_by_rows(mode), (torch.randn(5, 3),)) for mode in ("sum", "mean")},
    **{
        f"scatter {reduce}, {'with' if keep else 'without'} self": (
            _scattered(reduce, keep=keep),
            _scattered_by_loops(reduce, keep=keep),
            (torch.randn(3, 3), torch.randn(3, 4)),
        )
        for reduce in ("sum", "prod", "mean", "amax", "amin")
        for keep in (True, False)
    },
    "bilinear": (
        F.bilinear,
        lambda x, y, w: torch.einsum("bi,oij,bj->bo", x, w, y),
        (torch.randn(2, 3), torch.randn(2, 4), torch.randn(5, 3, 4)),
    ),
    "distances": (torch.cdist, lambda x, y: (x[:, None] - y[None]).square().sum(-1).sqrt(), (torch.randn(3, 4), torch.randn(2, 4))),
    "glu": (F.glu, lambda x: x[:, :3] * torch.sigmoid(x[:, 3:]), (torch.randn(2, 6),)),
    "layer norm": (
        lambda x: F.layer_norm(x, (6,)),
        lambda x: (x - x.mean(-1, keepdim=True)) * ((x * x).mean(-1, keepdim=True) - x.mean(-1, keepdim=True) ** 2 + 1e-5).rsqrt(),
        (torch.randn(2, 6),),
    ),
    "average pooling": (
        lambda x: F.avg_pool2d(x, 2),
        lambda x: x.unfold(2, 2, 2).unfold(3, 2, 2).mean((-1, -2)),
        (torch.randn(1, 2, 4, 4),),
    ),
    "running product": (
        lambda x: x.cumprod(1),
        lambda x: torch.stack([x[:, 0], x[:, 0] * x[:, 1], x[:, 0] * x[:, 1] * x[:, 2]], 1),
        (torch.randn(2, 3),),
    ),
    "smooth l1": (
        F.smooth_l1_loss,
        lambda x, y: torch.where((x - y).abs() < 1, 0.5 * (x - y) ** 2, (x - y).abs() - 0.5).mean(),
        (torch.randn(4), torch.randn(4)),
    ),
}
"""Name -> (with the op, by a formula, inputs)."""

BACKWARD_BY_SIGN = (
    "scatter sum, without",
    "scatter mean, without",
    "scatter amax",
    "scatter amin",
    "scatter prod",
    "smooth l1",
    "embedding bag",
)
"""Cases whose backwards take different, equally right ways (a tie, a division by the factor, a sign, no gradient for zero)."""


def _compared(name: str, *, wrong: float = 1.0) -> Verdict:
    op, formula, inputs = EQUAL[name]
    train = not name.startswith(BACKWARD_BY_SIGN)
    args = tuple(x.requires_grad_() for x in inputs) if train else inputs
    return hocket.verify(op, lambda *xs: wrong * formula(*xs), example_args=args, level="ring", train=train)


@pytest.mark.parametrize("name", EQUAL)
def test_a_kernel_equals_its_formula_with_its_backward(name: str) -> None:
    verdict = _compared(name)
    assert verdict.status is Status.EQUAL, str(verdict)


@pytest.mark.parametrize("name", ["embedding bag, mean", "bilinear", "distances"])
def test_a_formula_that_is_off_by_a_thousandth_is_different(name: str) -> None:
    assert _compared(name, wrong=1.001).status is Status.DIFFERENT


def _drawn(algebra: Algebra, *shape: int) -> RingTensor:
    return RingTensor(algebra.ring.random(list(shape), torch.Generator().manual_seed(sum(shape))))


CUDA: dict[str, tuple[Any, Any, int]] = {
    "flash": (aten._scaled_dot_product_flash_attention, aten._scaled_dot_product_flash_attention_backward, 0),
    "cudnn": (aten._scaled_dot_product_cudnn_attention, aten._scaled_dot_product_cudnn_attention_backward, 1),
    "efficient": (aten._scaled_dot_product_efficient_attention, aten._scaled_dot_product_efficient_attention_backward, 2),
}


@pytest.mark.parametrize("kernel", CUDA)
def test_an_attention_kernel_for_cuda_means_what_the_one_for_the_cpu_means(kernel: str) -> None:
    """They do not run here, but over the ring they are the same mathematics, forward and backward."""
    algebra = Algebra(ring_of(1559))
    q, k, v, g = (_drawn(algebra, 2, 2, 5, n) for n in (3, 3, 3, 3))
    table = op_table()
    out, lse = table[aten._scaled_dot_product_flash_attention_for_cpu](algebra, q, k, v, 0.0, True)
    expected = table[aten._scaled_dot_product_flash_attention_for_cpu_backward](algebra, g, q, k, v, out, lse, 0.0, True)
    forward, backward, kind = CUDA[kernel]
    if kind == 0:
        made = table[forward](algebra, q, k, v, 0.0, True)
        found = table[backward](algebra, g, q, k, v, made[0], made[1], None, None, 5, 5, 0.0, True, made[6], made[7])
    elif kind == 1:
        made = table[forward](algebra, q, k, v, None, True, 0.0, True)
        found = table[backward](algebra, g, q, k, v, made[0], made[1], made[6], made[7], None, None, None, 5, 5, 0.0, True)
    else:
        made = table[forward](algebra, q, k, v, None, True, 0.0, True)
        assert tuple(made[1].shape) == (2, 2, 32)
        found = table[backward](algebra, g, q, k, v, None, made[0], made[1], made[2], made[3], 0.0, [True] * 3 + [False], True)
    assert torch.equal(made[0].data, out.data)
    for have, want in zip(found, expected, strict=False):
        assert torch.equal(have.data, want.data)


@pytest.mark.parametrize(
    ("op", "arguments"),
    [
        (aten._scaled_dot_product_flash_attention_for_cpu.default, {"dropout_p": 0.5}),
        (aten._scaled_dot_product_efficient_attention.default, {"attn_bias": None, "compute_log_sumexp": True, "dropout_p": 0.1}),
    ],
)
def test_an_attention_kernel_that_draws_is_unsupported(op: Any, arguments: dict[str, Any]) -> None:
    algebra = Algebra(ring_of(1559))
    q = _drawn(algebra, 1, 2, 3, 4)
    with pytest.raises(UnsupportedError, match="draws its own random numbers"):
        apply(algebra, op, (q, q, q), arguments)


@pytest.mark.parametrize(
    ("function", "inputs", "words"),
    [
        (lambda w: F.embedding_bag(BAG, w, STARTS, mode="max"), (torch.randn(5, 3),), "_embedding_bag by max"),
        (torch.special.bessel_j0, (torch.randn(3),), "bessel"),
        (lambda x: x.round() * x, (torch.randn(3),), "rounding of a computed value"),
        (lambda x: x.long(), (torch.randn(3),), "cast to torch.int64"),
        (lambda x: torch.linalg.det(x), (torch.randn(3, 3),), "unsupported("),
        (lambda x: torch.fft.fft(x).real, (torch.randn(4),), "complex"),
    ],
)
def test_what_has_no_exact_meaning_is_unsupported_by_name(function: Any, inputs: tuple[Tensor, ...], words: str) -> None:
    verdict = hocket.verify(function, function, example_args=inputs, level="ring", train=False)
    other = hocket.verify(function, lambda *xs: function(*(1 * x for x in xs)), example_args=inputs, level="ring", train=False)
    assert other.status is Status.UNSUPPORTED, str(other)
    assert words in str(other)
    assert verdict.status in (Status.UNSUPPORTED, Status.EQUAL)


def test_the_public_entry_captures_what_these_tests_mean() -> None:
    program = capture(_bags("sum"), (torch.randn(5, 3),), train=False)
    assert any(n.target is aten._embedding_bag_forward_only.default for n in program.nodes)
