"""What justifies each entry of the op table: torch's own operator samples, a formula, or a reason.

Samples are moved to small integers whose only prime factors are 2 and 3, where the ring's order and sign are the real ones, so that
results and gradients are the same rational numbers on both sides. What is not rational is compared with a formula of rational
functions and the few ops of ``PRIMITIVE``: over the ring exactly, and in float64 by torch, with the gradients of both.

Run as a program, it rewrites the page of the documentation.
"""

from __future__ import annotations

import contextlib
import math
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
from formulas import FORMULAS, REASONS, Formula
from torch.testing._internal.common_methods_invocations import op_db
from torch.utils._pytree import tree_flatten, tree_map

from hocket.compiler.errors import UnsupportedError
from hocket.compiler.verify.ring import evaluate
from hocket.compiler.verify.ring.algebra import Algebra
from hocket.compiler.verify.ring.arithmetic import ring_of
from hocket.compiler.verify.ring.eager import RingArray, unwrap, wrap
from hocket.compiler.verify.ring.equality import same
from hocket.compiler.verify.ring.table import decomposition_map, op_table
from hocket.compiler.verify.ring.value import RingTensor

PAGE = Path(__file__).resolve().parents[4] / "docs" / "proof_ops.md"
P = 1559
SAMPLES = 6
VALUES = torch.tensor([-8.0, -4.0, -3.0, -2.0, -1.0, 0.0, 1.0, 2.0, 3.0, 4.0, 6.0])
"""Integers whose order and sign the ring knows without being told."""

_TEXT = """
add sub rsub mul div true_divide neg positive reciprocal square sum mean cumsum cumprod prod mm bmm addmm addmv addbmm
baddbmm mv dot vdot matmul view reshape permute transpose t unsqueeze squeeze expand narrow select cat stack split
split_with_sizes chunk tensor_split unbind flip roll where masked_fill tril triu index_select gather index_add index_copy
scatter scatter_add scatter_reduce take_along_dim var var_mean nn.functional.conv1d nn.functional.conv2d
nn.functional.conv3d clone contiguous to nn.functional.conv_transpose1d nn.functional.conv_transpose2d
nn.functional.embedding nn.functional.embedding_bag nn.functional.adaptive_avg_pool2d nn.functional.linear
nn.functional.nll_loss nn.functional.pad constant_pad_nd nn.functional.bilinear index_put slice addcmul addcdiv lerp einsum
tensordot outer nn.functional.mse_loss nn.functional.avg_pool2d diagonal movedim swapaxes repeat repeat_interleave tile
ravel flatten hstack vstack select_scatter slice_scatter masked_select masked_scatter diag_embed nn.functional.unfold
nn.functional.fold nn.functional.pixel_shuffle nn.functional.pixel_unshuffle nn.functional.interpolate
nn.functional.upsample_nearest trace kron as_strided unfold fill zero full_like ones_like zeros_like new_full new_ones
new_zeros nn.functional.channel_shuffle abs sign sgn amax amin max min maximum minimum sort argsort
topk argmax argmin eq ne gt ge lt le clamp clamp_min clamp_max count_nonzero nn.functional.relu nn.functional.max_pool2d
nn.functional.max_pool3d nn.functional.prelu nn.functional.leaky_relu nn.functional.hardswish nn.functional.hardsigmoid
nn.functional.smooth_l1_loss nn.functional.huber_loss logical_and logical_or logical_not heaviside isnan isinf
"""
NAMES = frozenset(_TEXT.split())
_DISTINCT = "sort argsort topk argmax argmin max min nn.functional.max_pool2d nn.functional.max_pool3d"
DISTINCT = frozenset(_DISTINCT.split(" "))
"""Ops whose indices, and whose gradients, depend on how ties are broken: their samples have none."""

WITHOUT_GRADIENTS = frozenset(["as_strided"])
"""Torch writes their gradients into views of one memory."""

LARGEST = 2000
"""Elements of a sample."""

VARIANTS = DISTINCT | {"scatter_reduce"}
OPS = [op for op in op_db if op.name in NAMES and (not op.variant_test_name or op.name in VARIANTS)]


@dataclass
class Evidence:
    """by: op -> how -> names of the samples or formulas that agreed; treatments: op -> what the ring does in it beside arithmetic;
    failures: what did not agree."""

    by: dict[str, dict[str, Counter[str]]] = field(default_factory=lambda: defaultdict(lambda: defaultdict(Counter)))
    treatments: dict[str, set[str]] = field(default_factory=lambda: defaultdict(set))
    failures: list[str] = field(default_factory=list)

    def add(self, ops: set[str], how: str, name: str) -> None:
        """These ops were used in a comparison that held."""
        for op in ops:
            self.by[op][how][name] += 1


@contextlib.contextmanager
def recording(evidence: Evidence) -> Iterator[set[str]]:
    """The ops of the table that are applied to ring values inside."""
    found: set[str] = set()
    plain = evaluate.apply

    def apply(alg: Algebra, op: Any, args: Any, kwargs: Any) -> Any:
        before, alg.used = alg.used, set()
        result = plain(alg, op, args, kwargs)
        if isinstance(op, torch._ops.OpOverload):
            name = str(op) if op in decomposition_map() else str(op.overloadpacket)
            found.add(name)
            evidence.treatments[name] |= alg.used
        alg.used |= before
        return result

    evaluate.apply = apply
    try:
        yield found
    finally:
        evaluate.apply = plain


# ---- torch's samples ------------------------------------------------------------------------------------------------------------


def small(x: Any, *, distinct: bool = False) -> Any:
    """Small integers in place of floats: the nearest of VALUES, or the ranks of the entries; short decimals stay."""
    if isinstance(x, float) and math.isfinite(x) and x != round(x, 3):
        return float(round(x))
    if not isinstance(x, torch.Tensor) or not x.is_floating_point():
        return x
    if distinct:
        return x.detach().double().flatten().argsort().argsort().reshape(x.shape).double() + 1
    near = (x.detach().double()[..., None] * 1.5 - VALUES).abs().argmin(-1)
    return VALUES.double()[near]


def as_ring(algebra: Algebra, *, requires_grad: bool = False) -> Any:
    """Lift, and forget the known value: the table must not lean on it."""

    def convert(x: Any) -> Any:
        if not isinstance(x, torch.Tensor) or not x.is_floating_point():
            return x
        value = algebra.lift(x.detach())
        return RingArray(RingTensor(value.data, value.factor, dtype=x.dtype), algebra, requires_grad=requires_grad)

    return convert


def agrees(algebra: Algebra, expected: torch.Tensor, found: Any) -> bool:
    """Whether a ring value is these rational numbers; integers are to be equal."""
    if not isinstance(found, RingArray):
        return (
            bool(torch.allclose(expected.double(), found.double()))
            if expected.is_floating_point()
            else torch.equal(expected, found)
        )
    value = found.ring_value
    if tuple(value.shape) != tuple(expected.shape):
        return False
    if value.factor is not None and not bool((value.factor == algebra.ring.ones(value.factor.shape[1:])).all()):
        return False
    if value.loose:
        return False
    wanted = [algebra.ring.rational(Fraction(x).limit_denominator(200_000)) for x in expected.detach().reshape(-1).tolist()]
    return not wanted or bool((value.data.reshape(4, -1) == torch.stack(wanted, 1)).all())


def _tensors(tree: Any) -> list[torch.Tensor]:
    return [x for x in tree_flatten(tree)[0] if isinstance(x, torch.Tensor)]


def _is_finite(tree: Any) -> bool:
    return all(bool(t.isfinite().all()) for t in _tensors(tree) if t.is_floating_point())


def compare_samples(op: Any, evidence: Evidence) -> None:
    """Results and gradients of one operator of torch on its own samples."""
    distinct = op.name in DISTINCT
    seen = 0
    for sample in op.sample_inputs("cpu", torch.float64, requires_grad=False):
        if seen == SAMPLES:
            break
        given = tree_map(lambda x: small(x, distinct=distinct), ((sample.input, *sample.args), sample.kwargs))
        if sum(t.numel() for t in _tensors(given)) > LARGEST:
            continue
        try:
            expected = op.op(*given[0], **given[1])
        except (RuntimeError, IndexError, ValueError):
            continue  # the moved sample is not valid input
        if not _is_finite(expected):
            continue
        algebra = Algebra(ring_of(P))
        with recording(evidence) as used:
            try:
                found = op.op(*tree_map(as_ring(algebra), given[0]), **tree_map(as_ring(algebra), given[1]))
            except UnsupportedError:
                continue
        pairs = list(zip(_tensors(expected), _tensors(found), strict=True))
        if not pairs:
            continue
        if not all(agrees(algebra, a, b) for a, b in pairs):
            evidence.failures.append(f"{op.name} of {given}")
            continue
        seen += 1
        evidence.add(used, "samples", op.name)
        _compare_entry(op, given, _tensors(expected), evidence)
        _compare_gradients(op, given, evidence)


def _compare_entry(op: Any, given: Any, expected: list[torch.Tensor], evidence: Evidence) -> None:
    """The table's own entry of an op that torch takes apart before the table is asked."""
    packet = getattr(torch.ops.aten, op.name.split(".")[-1], None)
    if str(packet) in evidence.by or packet not in op_table():
        return
    for overload in (getattr(packet, name) for name in packet.overloads()):
        try:
            overload(*given[0], **given[1])
        except (RuntimeError, IndexError, ValueError, NotImplementedError):
            continue
        algebra = Algebra(ring_of(P))
        args, kwargs = tree_map(unwrap, tree_map(as_ring(algebra), given))
        with recording(evidence) as used:
            found = wrap(algebra, evaluate.apply(algebra, overload, args, kwargs))
        pairs = list(zip(expected, _tensors(found), strict=True))
        if all(agrees(algebra, a, b) for a, b in pairs):
            evidence.add(used, "samples", op.name)
        else:
            evidence.failures.append(f"{overload} of {given}")
        return


def _compare_gradients(op: Any, given: Any, evidence: Evidence) -> None:
    if op.name in WITHOUT_GRADIENTS or not op.supports_autograd or not any(t.is_floating_point() for t in _tensors(given)):
        return
    try:
        leaves = tree_map(
            lambda x: x.clone().requires_grad_() if isinstance(x, torch.Tensor) and x.is_floating_point() else x, given
        )
        expected = _gradients(op, leaves, lambda t: torch.ones_like(t) * 2)
    except (RuntimeError, IndexError, ValueError):
        return
    if not _is_finite(expected) or not any(bool(t.any()) for t in expected):
        return
    algebra = Algebra(ring_of(P))
    with recording(evidence) as used:
        try:
            ring = tree_map(as_ring(algebra, requires_grad=True), given)
            two = as_ring(algebra)
            found = _gradients(op, ring, lambda t: two(torch.full(t.shape, 2.0, dtype=torch.float64)))
        except (UnsupportedError, RuntimeError, NotImplementedError):
            return  # this backward reads values, or is complex: not checked here
    if all(agrees(algebra, a, b) for a, b in zip(expected, found, strict=True)):
        evidence.add(used, "gradients of samples", op.name)
    else:
        evidence.failures.append(f"gradient of {op.name} of {given}")


def _gradients(op: Any, given: Any, seed: Callable[[torch.Tensor], torch.Tensor]) -> list[torch.Tensor]:
    result = op.op(*given[0], **given[1])
    outputs = [t for t in _tensors(result) if t.requires_grad]
    inputs = [t for t in _tensors(given) if t.requires_grad]
    if not outputs:
        return []
    found = torch.autograd.grad(outputs, inputs, [seed(t) for t in outputs], allow_unused=True)
    return [t for t in found if t is not None]


# ---- formulas -------------------------------------------------------------------------------------------------------------------


def compare_formula(name: str, formula: Formula, evidence: Evidence) -> None:
    """An op against its formula: in float64 on random numbers, over the ring on random elements, with gradients."""
    generator = torch.Generator().manual_seed(5)
    plain = [torch.rand(shape, generator=generator, dtype=torch.float64) * 0.8 + 0.1 for shape in formula.shapes]
    if formula.signed:
        plain = [(x - 0.5) * 4 for x in plain]
    sides = [_with_gradients(function, plain, torch.ones_like, formula.train) for function in (formula.op, formula.formula)]
    for left, right in zip(*sides, strict=True):
        if not torch.allclose(left, right, rtol=1e-7, atol=1e-9):
            evidence.failures.append(f"{name} in float64")
            return
    algebra = Algebra(ring_of(P))
    drawn = [RingTensor(algebra.ring.random(list(shape), generator), dtype=torch.float64) for shape in formula.shapes]

    def one(t: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = as_ring(algebra)(torch.ones(t.shape, dtype=torch.float64))
        return result

    def run(function: Callable[..., Any]) -> list[torch.Tensor]:
        given = [RingArray(RingTensor(x.data, dtype=x.dtype), algebra, requires_grad=formula.train) for x in drawn]
        return _with_gradients(function, given, one, formula.train)

    with recording(evidence) as used:
        left = run(formula.op)
    right = run(formula.formula)
    for a, b in zip(left, right, strict=True):
        values = [t.ring_value if isinstance(t, RingArray) else t for t in (a, b)]
        if not same(algebra, *values):
            evidence.failures.append(f"{name} over the ring")
            return
    evidence.add(used, "formulas", name)


def _with_gradients(function: Callable[..., Any], given: list[torch.Tensor], seed: Any, train: bool) -> list[torch.Tensor]:
    leaves = [x if isinstance(x, RingArray) or not train else x.clone().requires_grad_() for x in given]
    outputs = _tensors(function(*leaves))
    if not train:
        return outputs
    outputs = [t for t in outputs if t.requires_grad]
    found = torch.autograd.grad(outputs, leaves, [seed(t) for t in outputs], allow_unused=True)
    return [*(t.detach() for t in outputs), *(t for t in found if t is not None)]


# ---- all of it ------------------------------------------------------------------------------------------------------------------


def gather_evidence() -> Evidence:
    """Every comparison."""
    evidence = Evidence()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        for op in OPS:
            compare_samples(op, evidence)
        for name, formula in FORMULAS.items():
            compare_formula(name, formula, evidence)
    return evidence


def entries() -> list[str]:
    """Every entry of the table, and every op whose meaning is torch's decomposition."""
    return sorted([*map(str, op_table()), *map(str, decomposition_map())])


def unjustified(evidence: Evidence) -> list[str]:
    """Entries without a comparison that held and without a reason."""
    return [op for op in entries() if op not in evidence.by and op not in REASONS]


def page(evidence: Evidence) -> str:
    """The table as a page of the documentation."""
    lines = [
        "# The op table",
        "",
        "What an ATen op means over the ring is the trusted base of the proof. Every entry is compared with torch: on torch's",
        "own operator samples, moved to small integers, where results and gradients are the same rational numbers on both sides;",
        "or with a formula, over the ring exactly and in float64. What can be compared in neither way has a reason. The",
        "comparisons are part of the tests, which also write this page. An op that is not here is `unsupported`.",
        "",
        "| op | beside arithmetic | justified by |",
        "|---|---|---|",
    ]
    for op in entries():
        treatments = ", ".join(sorted(evidence.treatments.get(op, set()) - {"exp"}))
        found = [f"{how}: {_some(names)}" for how, names in sorted(evidence.by.get(op, {}).items())]
        lines.append(f"| `{op}` | {treatments} | {'; '.join([*found, *([REASONS[op]] if op in REASONS else [])])} |")
    return "\n".join(lines) + "\n"


def _some(names: Counter[str]) -> str:
    shown = sorted(names, key=lambda name: (-names[name], name))[:3]
    more = len(names) - len(shown)
    return ", ".join(shown) + (f" and {more} more" if more > 0 else "")


if __name__ == "__main__":
    everything = gather_evidence()
    print(*everything.failures, sep="\n")
    print("unjustified:", *unjustified(everything))
    PAGE.write_text(page(everything))
