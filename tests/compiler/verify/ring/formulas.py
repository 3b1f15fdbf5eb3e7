"""Ops of the table by formulas of simpler ones, and the reasons for those that have none."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from hocket.compiler.verify.ring import evaluate
from hocket.compiler.verify.ring.eager import RingArray, unwrap, wrap

aten = torch.ops.aten
GRID = (2, 3, 4, 4)


@dataclass(frozen=True)
class Formula:
    """op and formula: functions of tensors of these shapes; signed: random inputs of both signs; train: with gradients."""

    op: Callable[..., Any]
    formula: Callable[..., Any]
    shapes: tuple[tuple[int, ...], ...] = ((2, 4),)
    signed: bool = True
    train: bool = True


def direct(op: Any, *args: Any, **kwargs: Any) -> Any:
    """The table's own entry of an op that torch would take apart before the table is asked."""
    rings = [x for x in args if isinstance(x, RingArray)]
    if not rings:
        return op(*args, **kwargs)
    algebra = rings[0].algebra
    return wrap(algebra, evaluate.apply(algebra, op, tuple(unwrap(x) for x in args), kwargs))


def sigmoid(x: Any) -> Any:
    return 1 / (1 + (-x).exp())


def tanh(x: Any) -> Any:
    return ((2 * x).exp() - 1) / ((2 * x).exp() + 1)


def normalised(x: Any, dims: Any, eps: float = 1e-5) -> Any:
    mean = x.mean(dims, keepdim=True)
    return (x - mean) / ((x * x).mean(dims, keepdim=True) - mean * mean + eps).sqrt()


def softmax(x: Any) -> Any:
    e = x.exp()
    return e / e.sum(-1, keepdim=True)


def attention(q: Any, k: Any, v: Any, mask: Any = None) -> Any:
    scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
    return softmax(scores if mask is None else scores + mask) @ v


def grouped(x: Any, w: Any, b: Any) -> Any:
    y = normalised(x.reshape(2, 2, -1), (-1,)).reshape(x.shape)
    return y * w[:, None, None] + b[:, None, None]


def batch_normalised(x: Any, w: Any, b: Any) -> Any:
    return normalised(x, (0, 2, 3)) * w[:, None, None] + b[:, None, None]


def weight_normalised(v: Any, g: Any) -> Any:
    return v * g / (v * v).sum((1,), keepdim=True).sqrt()


CHANNELS = (GRID, (4,), (4,))
IMAGE = ((2, 4, 3, 3), (4,), (4,))
SPLIT = ((2, 2, 5, 4), (2, 2, 5, 4), (2, 2, 5, 4))
ROWS = torch.tensor([2, 0, 3])
BAG, STARTS, SIZES = torch.tensor([0, 2, 1, 2, 4]), torch.tensor([0, 3]), torch.tensor([[3.0], [2.0]])
PIXELS = torch.tensor([[[0, 1], [2, 2]], [[1, 0], [0, 2]]])

FORMULAS: dict[str, Formula] = {
    "1 / (1 + exp(-x))": Formula(torch.sigmoid, sigmoid),
    "(exp 2x - 1) / (exp 2x + 1)": Formula(torch.tanh, tanh),
    "x sigmoid(x)": Formula(F.silu, lambda x: x * sigmoid(x)),
    "log(1 + exp x)": Formula(F.softplus, lambda x: (1 + x.exp()).log()),
    "-log(1 + exp(-x))": Formula(F.logsigmoid, lambda x: -(1 + (-x).exp()).log()),
    "-log(1 + exp(-x)), direct": Formula(
        lambda x: direct(aten.log_sigmoid.default, x), lambda x: -(1 + (-x).exp()).log(), train=False
    ),
    "x Phi(x)": Formula(F.gelu, lambda x: 0.5 * x * (1 + torch.erf(x * math.sqrt(0.5))), train=False),
    "x Phi(x), by tanh": Formula(
        lambda x: F.gelu(x, approximate="tanh"),
        lambda x: 0.5 * x * (1 + tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x * x * x))),
    ),
    "Phi(x) + x phi(x)": Formula(
        lambda x: direct(aten.gelu_backward.default, torch.ones_like(x), x),
        lambda x: 0.5 * (1 + torch.erf(x * math.sqrt(0.5))) + x * (-0.5 * x * x).exp() * (1 / math.sqrt(2 * math.pi)),
        train=False,
    ),
    "exp x - 1 below 0": Formula(F.elu, lambda x: torch.where(x > 0, x, x.exp() - 1)),
    "celu": Formula(lambda x: F.celu(x, 2.0), lambda x: torch.where(x > 0, x, 2 * ((x / 2).exp() - 1))),
    "selu": Formula(
        F.selu,
        lambda x: 1.0507009873554805 * torch.where(x > 0, x, 1.6732632423543772 * (x.exp() - 1)),
    ),
    "slope below 0": Formula(lambda x: F.leaky_relu(x, 0.1), lambda x: torch.where(x > 0, x, x * 0.1)),
    "x tanh(log(1 + exp x))": Formula(F.mish, lambda x: x * tanh((1 + x.exp()).log())),
    "x clamp(x + 3, 0, 6) / 6": Formula(F.hardswish, lambda x: x * (x + 3).clamp(0, 6) / 6, train=False),
    "exp(x ln 2)": Formula(torch.exp2, lambda x: (x * math.log(2)).exp(), train=False),
    "exp(x) - 1": Formula(torch.expm1, lambda x: x.exp() - 1),
    "log(1 + x)": Formula(torch.log1p, lambda x: (1 + x).log(), signed=False),
    "log(x) / ln 2": Formula(torch.log2, lambda x: x.log() * (1 / math.log(2)), signed=False, train=False),
    "log(x / (1 - x)), x in [1/4, 3/4]": Formula(
        lambda x: torch.logit(x, 0.25),
        lambda x: (x.clamp(0.25, 0.75) / (1 - x.clamp(0.25, 0.75))).log(),
        signed=False,
        train=False,
    ),
    "x with columns set": Formula(
        lambda x, y: torch.slice_scatter(x, y, 1, 1, 3), lambda x, y: torch.cat((x[:, :1], y, x[:, 3:]), 1), ((2, 4), (2, 2))
    ),
    "log(x / (1 - x))": Formula(torch.logit, lambda x: (x / (1 - x)).log(), signed=False),
    "x log y": Formula(torch.xlogy, lambda x, y: x * y.log(), ((2, 3), (2, 3)), signed=False, train=False),
    "log(exp x + exp y)": Formula(torch.logaddexp, lambda x, y: (x.exp() + y.exp()).log(), ((2, 3), (2, 3))),
    "1 / sqrt(x)": Formula(torch.rsqrt, lambda x: 1 / x.sqrt(), signed=False, train=False),
    "sqrt(sum x^2)": Formula(lambda x: torch.linalg.vector_norm(x, 2, -1), lambda x: (x * x).sum(-1).sqrt(), train=False),
    "sqrt(sum x^2), norm": Formula(lambda x: aten.norm.ScalarOpt_dim(x, 2, [1]), lambda x: (x * x).sum(-1).sqrt(), train=False),
    "sqrt(sum of all x^2)": Formula(lambda x: aten.norm.Scalar(x, 2), lambda x: (x * x).sum().sqrt(), train=False),
    "sqrt(var x)": Formula(lambda x: x.std(-1), lambda x: x.var(-1).sqrt(), train=False),
    "exp x / sum exp x": Formula(lambda x: x.softmax(-1), softmax),
    "exp x / sum exp x, direct": Formula(lambda x: direct(aten.softmax.int, x, -1), softmax, train=False),
    "exp x / sum exp x, safe": Formula(lambda x: direct(aten._safe_softmax.default, x, -1), softmax, train=False),
    "x - log sum exp x": Formula(lambda x: x.log_softmax(-1), lambda x: x - x.exp().sum(-1, keepdim=True).log()),
    "x - log sum exp x, direct": Formula(
        lambda x: direct(aten.log_softmax.int, x, -1), lambda x: x - x.exp().sum(-1, keepdim=True).log(), train=False
    ),
    "log sum exp x": Formula(lambda x: x.logsumexp(-1), lambda x: x.exp().sum(-1).log()),
    "layer norm": Formula(
        lambda x, w, b: F.layer_norm(x, (4,), w, b), lambda x, w, b: normalised(x, (-1,)) * w + b, ((2, 4), (4,), (4,))
    ),
    "x / sqrt(mean x^2 + eps)": Formula(
        lambda x, w: direct(aten.rms_norm.default, x, [4], w, 1e-5),
        lambda x, w: x / ((x * x).mean(-1, keepdim=True) + 1e-5).sqrt() * w,
        ((2, 4), (4,)),
        train=False,
    ),
    "x / sqrt(mean x^2 + eps), fused": Formula(
        lambda x, w: aten._fused_rms_norm.default(x, [4], w, 1e-5)[0],
        lambda x, w: x / ((x * x).mean(-1, keepdim=True) + 1e-5).sqrt() * w,
        ((2, 4), (4,)),
    ),
    "group norm": Formula(lambda x, w, b: F.group_norm(x, 2, w, b), grouped, IMAGE),
    "batch norm": Formula(lambda x, w, b: F.batch_norm(x, None, None, w, b, training=True), batch_normalised, IMAGE),
    **{
        f"batch norm, {name}": Formula(
            lambda x, w, b, op=op, rest=rest: direct(op, x, w, b, *rest)[0], batch_normalised, IMAGE, train=False
        )
        for name, op, rest in (
            ("native", aten.native_batch_norm.default, (None, None, True, 0.1, 1e-5)),
            ("without buffers", aten._native_batch_norm_legit.no_stats, (True, 0.1, 1e-5)),
        )
    },
    **{
        f"batch norm, {name}": Formula(
            lambda x, w, b, m, v, op=op, rest=rest: direct(op, x, w, b, m, v, *rest)[0],
            lambda x, w, b, m, v: batch_normalised(x, w, b),
            (*IMAGE, (4,), (4,)),
            signed=False,
            train=False,
        )
        for name, op, rest in (
            ("functional", aten._native_batch_norm_legit_functional.default, (True, 0.1, 1e-5)),
            ("with update", aten._batch_norm_with_update_functional.default, (0.1, 1e-5)),
        )
    },
    "batch norm, evaluation": Formula(
        lambda x, w, b, m, v: direct(aten._native_batch_norm_legit_no_training.default, x, w, b, m, v, 0.1, 1e-5)[0],
        lambda x, w, b, m, v: (x - m[:, None, None]) / (v[:, None, None] + 1e-5).sqrt() * w[:, None, None] + b[:, None, None],
        (*IMAGE, (4,), (4,)),
        signed=False,
        train=False,
    ),
    "v g / |v|": Formula(lambda v, g: aten._weight_norm_interface.default(v, g, 0)[0], weight_normalised, ((3, 4), (3, 1))),
    "softmax(q k^T / sqrt d) v": Formula(
        lambda q, k, v: direct(aten.scaled_dot_product_attention.default, q, k, v), attention, SPLIT, train=False
    ),
    "softmax(q k^T / sqrt d) v, kernel": Formula(
        lambda q, k, v: aten._scaled_dot_product_flash_attention_for_cpu.default(q, k, v)[0], attention, SPLIT
    ),
    "-(y log x + (1 - y) log(1 - x))": Formula(
        F.binary_cross_entropy,
        lambda x, y: -(y * x.log().clamp(min=-100) + (1 - y) * (1 - x).log().clamp(min=-100)).mean(),
        ((2, 3), (2, 3)),
        signed=False,
        train=False,
    ),
    "(x - y) / (x (1 - x))": Formula(
        lambda x, y: direct(aten.binary_cross_entropy_backward.default, torch.ones_like(x), x, y, None, 0),
        lambda x, y: (x - y) / (x * (1 - x)).clamp(min=1e-12),
        ((2, 3), (2, 3)),
        signed=False,
        train=False,
    ),
    "(1 - y) x + log(1 + exp(-x))": Formula(
        F.binary_cross_entropy_with_logits,
        lambda x, y: ((1 - y) * x + (1 + (-x).exp()).log()).mean(),
        ((2, 3), (2, 3)),
        signed=False,
        train=False,
    ),
    "a sigmoid(b) of halves": Formula(F.glu, lambda x: x[:, :2] * sigmoid(x[:, 2:])),
    "distances": Formula(torch.cdist, lambda x, y: (x[:, None] - y[None]).square().sum(-1).sqrt(), ((3, 4), (2, 4))),
    "bilinear": Formula(
        lambda x, y: aten._trilinear.default(x, y, x, [], [], [], [1]),
        lambda x, y: (x * y * x).sum(1),
        ((3, 4), (3, 4)),
        train=False,
    ),
    "clamp(x, -1, 1)": Formula(F.hardtanh, lambda x: torch.where(x <= -1, -1.0, torch.where(x >= 1, 1.0, x))),
    "selu, direct": Formula(
        lambda x: direct(aten.selu.default, x),
        lambda x: 1.0507009873554805 * torch.where(x > 0, x, 1.6732632423543772 * (x.exp() - 1)),
        train=False,
    ),
    "x x x": Formula(lambda x: x**3, lambda x: x * x * x),
    "1 / (x x)": Formula(lambda x: x**-2, lambda x: 1 / (x * x)),
    "(amin x, amax x)": Formula(lambda x: tuple(torch.aminmax(x, dim=1)), lambda x: (x.amin(1), x.amax(1)), train=False),
    **{
        f"sums of rows, {mode}": Formula(
            lambda w, mode=mode: F.embedding_bag(BAG, w, STARTS, mode=mode),
            lambda w, mode=mode: torch.stack([w[0] + w[2] + w[1], w[2] + w[4]]) / (1 if mode == "sum" else SIZES),
            ((5, 3),),
        )
        for mode in ("sum", "mean")
    },
    "-x[target], 2d": Formula(
        lambda x: F.nll_loss(x, PIXELS),
        lambda x: -(x * F.one_hot(PIXELS, 3).permute(0, 3, 1, 2).to(x.dtype)).sum() / 8,
        ((2, 3, 2, 2),),
    ),
    "sums of patches": Formula(
        lambda x: direct(aten.col2im.default, x, [3, 3], [2, 2], [1, 1], [0, 0], [1, 1])[:, 0],
        lambda x: sum(F.pad(x[:, 2 * i + j].reshape(1, 2, 2), (j, 1 - j, i, 1 - i)) for i in (0, 1) for j in (0, 1)),
        ((1, 4, 4),),
        train=False,
    ),
    "reflected row": Formula(
        lambda x: F.pad(x, (1, 2), "reflect"),
        lambda x: torch.cat((x[..., 1:2], x, x[..., 2:3], x[..., 1:2]), -1),
        ((1, 2, 4),),
        train=False,
    ),
    "reflected rows": Formula(
        lambda x: F.pad(x, (1, 0, 0, 1), "reflect"),
        lambda x: torch.cat((torch.cat((x[..., 1:2], x), -1), torch.cat((x[..., 1:2], x), -1)[..., 1:2, :]), -2),
        ((1, 2, 3, 3),),
        train=False,
    ),
    "repeated ends": Formula(
        lambda x: F.pad(x, (1, 1), "replicate"), lambda x: torch.cat((x[..., :1], x, x[..., -1:]), -1), ((1, 2, 4),), train=False
    ),
    "repeated ends, 2d": Formula(
        lambda x: F.pad(x, (1, 0, 0, 0), "replicate"), lambda x: torch.cat((x[..., :1], x), -1), ((1, 2, 3, 3),), train=False
    ),
    **{
        f"x, {name}": Formula(lambda x, op=op: direct(op, x), lambda x: 1 * x, train=False)
        for name, op in (
            ("alias", aten.alias.default),
            ("lift_fresh", aten.lift_fresh.default),
            ("lift_fresh_copy", aten.lift_fresh_copy.default),
            ("real", aten.real.default),
        )
    },
    "x, converted": Formula(
        lambda x: direct(torch.ops.prims.convert_element_type.default, x, torch.float64), lambda x: 1 * x, train=False
    ),
    "y": Formula(lambda x, y: direct(aten.copy.default, x, y), lambda x, y: 1 * y, ((2, 3), (2, 3)), train=False),
    "0 x": Formula(lambda x: direct(aten.zero.default, x), lambda x: 0 * x, train=False),
    "halves": Formula(lambda x: direct(aten.unsafe_split.Tensor, x, 2, 1), lambda x: (x[:, :2], x[:, 2:]), train=False),
    "x[rows], unchecked": Formula(
        lambda x: direct(aten._unsafe_index.Tensor, x, [ROWS]), lambda x: x[ROWS], ((4, 2),), train=False
    ),
    "x with rows set, unchecked": Formula(
        lambda x, y: direct(aten._unsafe_index_put.default, x, [ROWS], y),
        lambda x, y: torch.cat((y[1:2], x[1:2], y[0:1], y[2:3])),
        ((4, 2), (3, 2)),
        train=False,
    ),
}

UNIVERSAL = "a keyed function of its exact argument: only congruence is assumed of it, which every function has"
CUDA = "runs on CUDA only; over the ring it is compared with the kernel for the CPU, forward and backward (`test_ring_kernels`)"
CONSTANT = "a constant of the program: torch's own op in float64, read exactly"
ROUNDED = "of constants only, by torch's own op; of computed values it is `unsupported`"
STRUCTURE = "a homomorphism of the ring, shown by its laws (`test_ring_arithmetic`, `test_ring_identities`)"

_CONSTANTS = "arange empty empty_like empty_strided eye full linspace new_empty new_empty_strided ones scalar_tensor zeros"
CONSTANTS = _CONSTANTS.split(" ")

REASONS: dict[str, str] = {
    "aten.exp": STRUCTURE,
    "aten.log": STRUCTURE,
    "aten.sqrt": "multiplicative: sqrt(xy) = sqrt(x) sqrt(y) (`test_ring_identities`)",
    "aten.erf": UNIVERSAL,
    "aten.sin": UNIVERSAL,
    "aten.cos": UNIVERSAL,
    **{f"aten.{name}": CONSTANT for name in CONSTANTS},
    "prims.iota": CONSTANT,
    **{f"aten.{name}": ROUNDED for name in ("ceil", "floor", "floor_divide", "round", "trunc")},
    "aten._fused_rms_norm": "the function behind `rms_norm`, with its statistics",
    "aten._fused_rms_norm_backward": "the derivative of `rms_norm`, written out; torch has a kernel for it on other devices only",
    "hocket.chain": "its body, unrolled (`tests/passes/chain`)",
    "hocket.resume": "the chain that it resumes",
    "aten.batch_norm_backward": "`native_batch_norm_backward`, with one argument more",
    **{f"aten.{name}": CUDA for name in ("_scaled_dot_product_cudnn_attention", "_scaled_dot_product_cudnn_attention_backward")},
    **{f"aten.{name}": CUDA for name in ("_scaled_dot_product_flash_attention", "_scaled_dot_product_flash_attention_backward")},
    **{
        f"aten.{name}": CUDA
        for name in ("_scaled_dot_product_efficient_attention", "_scaled_dot_product_efficient_attention_backward")
    },
}
"""Entries that no comparison of this kind can reach."""
