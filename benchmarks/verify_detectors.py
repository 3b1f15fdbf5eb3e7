"""What finds the bugs that people make: the ring, float comparisons with the usual tolerances, and looking at the loss."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence

import torch
from common import Row, progress

from hocket.compiler.program import Program, Role, RoleKind
from hocket.compiler.verify.apart import run_apart
from hocket.compiler.verify.lockstep import run_ranks
from hocket.compiler.verify.ranks import RankGraphs
from hocket.compiler.verify.report import Status
from hocket.compiler.verify.samples import sample_inputs
from hocket.compiler.verify.standalone import verify
from hocket.testing.handwritten.catalogue import PROGRAMS, lowered_program, reference_program
from hocket.testing.handwritten.experts import experts
from hocket.testing.handwritten.llama import Sizes
from hocket.testing.handwritten.pipeline import pipeline
from hocket.testing.handwritten.ranks import Handwritten
from hocket.testing.handwritten.ring_attention import ring_attention
from hocket.testing.handwritten.synced_norm import synced_norm
from hocket.testing.handwritten.tensor_parallel import tensor_parallel

LARGE: dict[str, Callable[[], Handwritten]] = {
    "tensor parallel": lambda: tensor_parallel(Sizes(4, 64, 128, 4, 256, 256)),
    "ring attention": lambda: ring_attention(Sizes(4, 64, 128, 4, 256, 256)),
    "pipeline": lambda: pipeline(Sizes(6, 64, 128, 4, 256, 256, layers=2)),
    "experts": lambda: experts(256, 128, 256, 4, 256),
    "synchronised batch norm": lambda: synced_norm(8, 16, 16, 10),
}

Values = Mapping[Role, torch.Tensor | None]
TOLERANCES: dict[str, tuple[torch.dtype, float, float]] = {
    "float32, default tolerance 1.3e-6": (torch.float32, 1.3e-6, 1e-5),
    "float32, 1e-3": (torch.float32, 1e-3, 1e-3),
    "float32, 1e-2": (torch.float32, 1e-2, 1e-2),
    "bfloat16, default tolerance 1.6e-2": (torch.bfloat16, 1.6e-2, 1e-2),
}
LOSS = "the loss alone, 1e-3"
RING = "ring"
DETECTORS = (RING, *TOLERANCES, LOSS)


SLOW = ("pipeline", "ring attention", "tensor parallel", "experts")
"""Programs that a quick run leaves out."""


def judge_program(name: str) -> Counter[str]:
    """One program, right and with each of its bugs: how many bugs a detector catches, and whether it calls the right one wrong."""
    small, large = PROGRAMS[name](), LARGE[name]()
    reference, whole = reference_program(small), reference_program(large)
    inputs = trained_inputs(whole, large)
    score: Counter[str] = Counter(bugs=len(small.bugs))
    for bug in ("", *small.bugs):
        progress(f"{name}: {bug or 'correct'}")
        found = _seen(whole, lowered_program(large, bug), inputs)
        if verify(reference, lowered_program(small, bug), level="ring").status is not Status.EQUAL:
            found.append(RING)
        score.update(f"{'caught' if bug else 'alarm'}: {detector}" for detector in found)
    return score


def detector_rows(scores: Sequence[Mapping[str, int]]) -> list[Row]:
    """One row a detector: bugs caught, and correct programs called wrong."""
    total: Counter[str] = Counter()
    for score in scores:
        total.update(score)
    bugs, rows = total["bugs"], []
    for detector in DETECTORS:
        found, ring = total[f"caught: {detector}"], detector == RING
        goal, met = ("all", found == bugs) if ring else ("", None)
        text = f"{found} of {bugs}"
        rows.append(Row("Planted bugs caught", detector, found, "bugs", {"planted": bugs}, goal=goal, met=met, text=text))
    for detector in DETECTORS:
        wrong, ring = total[f"alarm: {detector}"], detector == RING
        goal, met = ("0", wrong == 0) if ring else ("", None)
        text = f"{wrong} of {len(scores)}"
        rows.append(Row("Correct programs called wrong", detector, wrong, "programs", goal=goal, met=met, text=text))
    return rows


def trained_inputs(program: Program, written: Handwritten) -> dict[Role, torch.Tensor]:
    """Weights N(0, 0.02), gains 1 + N(0, 0.05), biases N(0, 0.01); integers in their range."""
    generator = torch.Generator().manual_seed(11)
    found = sample_inputs(program, 3)
    for role, value in found.items():
        if role.kind is RoleKind.PARAM:
            drawn = torch.randn(value.shape, generator=generator, dtype=value.dtype)
            is_gain = value.dim() == 1 and role.name.endswith("weight")
            found[role] = 1 + 0.05 * drawn if is_gain else (0.02 if value.dim() > 1 and "bias" not in role.name else 0.01) * drawn
        elif str(role) in written.integers and value.dtype != torch.bool:
            found[role] = torch.randint(0, written.integers[str(role)], value.shape, generator=generator)
    return found


def _seen(whole: Program, lowered: Program, inputs: Mapping[Role, torch.Tensor]) -> list[str]:
    """The float detectors that see a difference."""
    runs = {dtype: (_run(whole, inputs, dtype), _run(lowered, inputs, dtype)) for dtype in (torch.float32, torch.bfloat16)}
    found = []
    for name, (dtype, rtol, atol) in TOLERANCES.items():
        expected, have = runs[dtype]
        if not all(_close(value, have[role], rtol, atol) for role, value in expected.items()):
            found.append(name)
    expected, have = runs[torch.float32]
    loss = Role(RoleKind.OUTPUT, "loss")
    if not _close(expected[loss], have[loss], 1e-3, 0.0):
        found.append(LOSS)
    return found


def _run(program: Program, inputs: Mapping[Role, torch.Tensor], dtype: torch.dtype) -> Values:
    if isinstance(program, RankGraphs):
        return run_apart(program, inputs, dtype=dtype).outputs
    return run_ranks(program, inputs, dtype=dtype, check_replicas=False).outputs


def _close(a: torch.Tensor | None, b: torch.Tensor | None, rtol: float, atol: float) -> bool:
    if a is None or b is None:
        return a is b
    return a.shape == b.shape and torch.allclose(b.double(), a.double(), rtol=rtol, atol=atol, equal_nan=True)
