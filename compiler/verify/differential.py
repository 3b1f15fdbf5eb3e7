"""Differential verification: the original and the rewritten program, all ranks in lockstep, in double precision.

Two questions are asked of every output:

    equality   || T_f64 - O_f64 ||_max <= rtol max |O_f64|                     the same function, but for rounding
    growth     || T_f32 - O_f64 || / max(|| O_f32 - O_f64 ||, typical || O ||)      the same accuracy in single precision

Where equality fails, the first node that differs is named, with the layout in which its pieces would be right, if there is one.
"""

from __future__ import annotations

import itertools
import math
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from ...runtime.mesh import Mesh
from ..errors import CollectiveMismatch, HocketError
from ..layout import Layout, Partial, Placement, Replicate, Shard, assemble, format_layout
from ..program import Program, Role, note
from .blame import Divergence, blame
from .lockstep import run_ranks
from .report import Growth, LevelResult, Outcome, Status
from .samples import sample_inputs

RTOL = 1e-9
FLOOR = 1e-5
"""Outputs smaller than this (of inputs of order 1) are compared absolutely: they are what is left of a cancellation."""


@dataclass(frozen=True)
class Difference:
    """One output that is not the original's. error: largest difference relative to its largest element (inf: shapes, NaN)."""

    role: Role
    error: float
    reason: str

    def __str__(self) -> str:
        return f"{self.role} {self.reason}"


@dataclass(frozen=True)
class Comparison:
    """differences: empty when equal; unjudged: outputs whose true value is not finite somewhere; growth: per float output."""

    differences: tuple[Difference, ...]
    divergence: str
    growth: tuple[Growth, ...]
    unjudged: tuple[str, ...]
    seconds: float


def compare_programs(
    original: Program,
    transformed: Program,
    *,
    rtol: float = RTOL,
    seed: int = 0,
    inputs: Mapping[Role, torch.Tensor] | None = None,
    growth: bool = True,
) -> Comparison:
    """Compare every output of two programs, logical or lowered, on the same inputs.

    Raises HocketError where the original itself cannot be run; an error of the transformed one is a difference.
    """
    start = time.process_time()
    inputs = sample_inputs(original, seed) if inputs is None else inputs
    true = run_ranks(original, inputs, dtype=torch.float64).outputs
    try:
        found = run_ranks(transformed, inputs, dtype=torch.float64).outputs
    except (HocketError, CollectiveMismatch) as error:
        roles = transformed.signature.outputs[:1]
        failed = tuple(Difference(role, float("inf"), f"could not be computed: {error}") for role in roles)
        return Comparison(failed, _explain(original, transformed, inputs, rtol), (), (), time.process_time() - start)
    differences = _differences(true, found, rtol)
    divergence = _explain(original, transformed, inputs, rtol) if differences else ""
    grown = _growth(original, transformed, inputs, true) if growth and not differences else ()
    unjudged = tuple(str(role) for role, value in true.items() if value is not None and not _is_finite(value))
    return Comparison(differences, divergence, grown, unjudged, time.process_time() - start)


def float_level(original: Program, transformed: Program, *, rtol: float = RTOL, seeds: Sequence[int] = (0,)) -> LevelResult:
    """The comparison as one level of a verdict. Growth of the rounding is judged where the programs are to be equal (rtol RTOL)."""
    results = [
        compare_programs(original, transformed, rtol=rtol, seed=seed, growth=i == 0 and rtol <= RTOL)
        for i, seed in enumerate(seeds)
    ]
    seconds = sum(result.seconds for result in results)
    wrong = next((result for result in results if result.differences), None)
    if wrong is not None:
        detail = "; ".join(map(str, wrong.differences[:3])) + (
            f" and {len(wrong.differences) - 3} more" if len(wrong.differences) > 3 else ""
        )
        return LevelResult("float", Outcome.FAILED, detail, seconds, Status.DIFFERENT, divergence=wrong.divergence)
    growth, unjudged = results[0].growth, results[0].unjudged
    worst = max(growth, key=lambda g: g.factor, default=None)
    warnings = [f"{text} is not finite for the sample inputs, in both programs alike" for text in unjudged]
    if worst is not None and not worst.factor <= Growth.FAIL:
        detail = f"equal in float64, but the float32 error of {worst.role} is {worst.factor:.3g} times that of the original"
        return LevelResult("float", Outcome.FAILED, detail, seconds, Status.DIFFERENT, growth=growth)
    if worst is not None and worst.factor > Growth.WARN:
        warnings.append(f"the float32 error of {worst.role} is {worst.factor:.3g} times that of the original")
    count = len(transformed.signature.outputs)
    detail = f"{count} outputs agree to {rtol:g} in float64" + (
        f", float32 error x{worst.factor:.2g} at most" if worst is not None else ""
    )
    bound = f"sampled: {len(results)} random input(s), tolerance {rtol:g}; no proof"
    return LevelResult("float", Outcome.PROVED, detail, seconds, bound=bound, growth=growth, warnings=tuple(warnings))


def _differences(
    true: Mapping[Role, torch.Tensor | None], found: Mapping[Role, torch.Tensor | None], rtol: float
) -> tuple[Difference, ...]:
    result = [Difference(role, float("inf"), "is not an output of the original") for role in found if role not in true]
    for role, expected in true.items():
        if role not in found:
            result.append(Difference(role, float("inf"), "is missing"))
            continue
        value = found[role]
        if (expected is None) != (value is None):
            result.append(Difference(role, float("inf"), "exists in one program only"))
        elif expected is not None and value is not None:
            error, reason = output_error(expected, value)
            if not error <= rtol:
                result.append(Difference(role, error, reason))
    return tuple(result)


def output_error(expected: torch.Tensor, found: torch.Tensor) -> tuple[float, str]:
    """(largest difference relative to the largest finite element, in words). Equal NaNs and infinities are equal."""
    if expected.shape != found.shape:
        return float("inf"), f"has shape {list(found.shape)}, expected {list(expected.shape)}"
    if expected.dtype != found.dtype:
        return float("inf"), f"is {found.dtype}, expected {expected.dtype}"
    same = (expected == found) | (expected.isnan() & found.isnan())
    if bool(same.all()):
        return 0.0, "agrees"
    count, total = int((~same).sum()), same.numel()
    if not (expected.is_floating_point() or expected.is_complex()):
        return float("inf"), f"differs in {count} of {total} entries"
    difference = torch.where(same, 0.0, (expected - found).abs())
    finite = expected.abs()[expected.isfinite()]
    scale = max(float(finite.max()) if finite.numel() else 0.0, FLOOR)
    if not bool(difference.isfinite().all()):
        return float(
            "inf"
        ), f"is not finite where the original is, or the reverse, in {int((~difference.isfinite()).sum())} entries"
    error = float(difference.max()) / scale
    return error, f"differs by {error:.3g} of its largest element"


def _is_finite(value: torch.Tensor) -> bool:
    return not (value.is_floating_point() or value.is_complex()) or bool(value.isfinite().all())


def _growth(
    original: Program, transformed: Program, inputs: Mapping[Role, torch.Tensor], true: Mapping[Role, torch.Tensor | None]
) -> tuple[Growth, ...]:
    reference = run_ranks(original, inputs, dtype=torch.float32, check_replicas=False).outputs
    lowered = run_ranks(transformed, inputs, dtype=torch.float32, check_replicas=False).outputs
    errors: list[tuple[str, float, float, float]] = []
    for role, exact in true.items():
        a, b = reference[role], lowered[role]
        if exact is None or a is None or b is None or not exact.is_floating_point() or not _is_finite(exact):
            continue
        norm = max(float(exact.norm()), FLOOR)
        errors.append((str(role), float((a.double() - exact).norm()), float((b.double() - exact).norm()), norm))
    if not errors:
        return ()
    # one output can be right by luck, so that any error of the other program looks large: what is usual in this program counts too
    typical = statistics.median(usual / norm for _, usual, _, norm in errors)
    eps = torch.finfo(torch.float32).eps
    return tuple(Growth(role, _factor(error, max(usual, norm * max(typical, eps)))) for role, usual, error, norm in errors)


def _factor(error: float, usual: float) -> float:
    return error / usual if math.isfinite(error) else math.inf


def _explain(original: Program, transformed: Program, inputs: Mapping[Role, torch.Tensor], rtol: float) -> str:
    """The first node that differs, in words, with the relation to the original that its pieces do have."""
    try:
        found = blame(original, transformed, inputs, tolerance=rtol)
    except (HocketError, CollectiveMismatch) as error:
        return f"the rewritten program fails before any value differs: {error}"
    if found is None:
        return ""
    return f"{found}; {_relation_in_words(original, transformed, inputs, found)}"


def _relation_in_words(original: Program, transformed: Program, inputs: Mapping[Role, torch.Tensor], found: Divergence) -> str:
    source = next((note(n).source for n in original.nodes if n.name == found.original), "") or "unknown source"
    where = f"the original is {found.original} (from {source})"
    mesh = transformed.mesh
    if mesh is None:
        return where
    expected = run_ranks(original, inputs, dtype=torch.float64, record=True, check_replicas=False).values[found.original]
    pieces = run_ranks(transformed, inputs, dtype=torch.float64, record=True, check_replicas=False).values[found.node]
    if not isinstance(pieces[0], torch.Tensor) or not isinstance(expected[0], torch.Tensor) or original.mesh is not None:
        return where
    actual = relation(pieces, expected[0], mesh)
    declared = found.layouts[-1]
    if actual is None:
        return f"declared {declared}; its pieces are no shards, replicas or partial sums of it; {where}"
    return f"declared {declared}, but its pieces are {format_layout(actual)} of it; {where}"


def relation(pieces: Sequence[torch.Tensor], whole: torch.Tensor, mesh: Mesh, rtol: float = RTOL) -> Layout | None:
    """The first layout in which pieces make the whole value; None if there is none."""
    choices: list[Placement] = [
        Replicate(),
        Partial("sum"),
        *(Shard(d) for d in range(whole.dim())),
        Partial("avg"),
        Partial("max"),
    ]
    if len(choices) ** len(mesh.axes) > 4096:
        return None
    for layout in itertools.product(choices, repeat=len(mesh.axes)):
        try:
            value = assemble(pieces, layout, mesh)
        except (RuntimeError, IndexError):
            continue
        if value.shape == whole.shape and output_error(whole, value)[0] <= rtol and _replicas_agree(pieces, layout, mesh):
            return layout
    return None


def _replicas_agree(pieces: Sequence[torch.Tensor], layout: Layout, mesh: Mesh) -> bool:
    for placement, axis in zip(layout, mesh.names, strict=True):
        if isinstance(placement, Replicate):
            for group in mesh.groups(axis):
                if any(not torch.equal(pieces[group[0]], pieces[rank]) for rank in group[1:]):
                    return False
    return True
