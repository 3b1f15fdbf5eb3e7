"""Bugs that people make, planted in programs written by hand: each is called different, and the verdict points to it."""

from __future__ import annotations

import functools
import re

import pytest

from hocket.compiler.program import Program
from hocket.compiler.verify.report import Status
from hocket.compiler.verify.standalone import verify
from hocket.testing.handwritten import catalogue
from hocket.testing.handwritten.catalogue import PROGRAMS, bugs, lowered_program

REDUCTION = "is a partial sum over d: its reduction is missing"
POINTS = {
    "missing forward reduction": r"merged\(mixed\) @ p",
    "missing backward reduction": rf"gradient:layers.0.norm1.weight {REDUCTION}",
    "doubled reduction": r"merged\(mixed\) @ p",
    "double bias": r"merged\(mixed\) @ p",
    "one-rank scale": r"on rank 1.* llama.py:\d+ scores = q @ k.*scale",
    "rsqrt epsilon": r"add_\d+ = aten.add.Tensor, made of mean .*rsqrt",
    "loss boundary off by one": r"tensor_parallel.py:\d+ ",
    "loss maximum not reduced": r"amax = aten.amax.default.* top = logits.amax",
    "head interleave": r"mul_\d+ = aten.mul.Tensor, made of slice",
    "causal mask off by one": r"on rank 1.*ring_attention.py:\d+ scores",
    "lse merge averaged": r"on rank 1.*ring_attention.py:\d+ block_out",
    "lse not updated": r"on rank 1.*ring_attention.py:\d+ ",
    "attention scale on one rank": r"on rank 1.*scores = q @ k.transpose\(-1, -2\) / math.sqrt\(width\)",
    "rotary offset": r"on rank 1.*first \* at.cos\(\)",
    "gather order": r"rows.gather\(1, targets",
    "ring backward drops last": r"on rank 1.*dq, dk = dq \+ ds @ keys",
    "local mean": r"is 2 times the original's",
    "norm gradient not reduced": rf"gradient:layers.0.norm1.weight {REDUCTION}",
    "query bias gradient not reduced": rf"gradient:layers.0.q.bias {REDUCTION}",
    "gradient averaged twice": r"results\[name\] = whole / here.size.*is 1/2 times the original's",
    "stale weights": r"on rank 1.*pipeline.py:\d+ ",
    "mean of means": r"on rank 1.*pipeline.py:\d+ ",
    "micro-batch scale missing": r"on rank 1.*pipeline.py:\d+ ",
    "tied gradient not reduced": r"add_\d+ = aten.add.Tensor on rank 0, made of index_add.*return value - RATE",
    "stale activation": r"on rank 0.*pipeline.py:\d+ return lambda g:",
    "weight decay on biases": r"mul_\d+ = aten.mul.Tensor on rank 0.*return value - RATE",
    "weight decay twice": r"mul_\d+ = aten.mul.Tensor on rank 0.*return value - RATE",
    "auxiliary loss from local means": r"_balance\(here, logits, chosen\)",
    "z-loss divided twice": r"div_\d+ = aten.div.Tensor.* z = z / here.size",
    "top-k not renormalised": r"experts.py:\d+ ",
    "expert offset": r"experts.py:\d+ .*weights.t\(\)",
    "router gradient not reduced": rf"gradient:router.weight {REDUCTION}",
    "expert gradient divided": r"gradient:down, gradient:up, gradient:up_bias is 1/2 times the original's",
    "statistics of a rank's own rows": r"mean = aten.mean.dim, made of convolution .* mean = x.mean",
    "running variance biased": r"update:norm.running_var differs",
}
"""Bug -> what the verdict says of its place: the line, the node or the relation."""

QUICK = {
    "double bias",
    "query bias gradient not reduced",
    "z-loss divided twice",
    "running variance biased",
}


@functools.cache
def _reference(program: str) -> Program:
    return catalogue.reference_program(PROGRAMS[program]())


def test_there_are_thirty_five_bugs_and_every_one_has_a_place() -> None:
    assert len(bugs()) == 35
    assert {bug for _, bug in bugs()} == POINTS.keys()
    with pytest.raises(ValueError, match="expected a bug of experts among"):
        lowered_program(PROGRAMS["experts"](), "double bias")


@pytest.mark.parametrize(
    "program", [p if p in ("experts", "synchronised batch norm") else pytest.param(p, marks=pytest.mark.slow) for p in PROGRAMS]
)
def test_a_correct_program_is_equal(program: str) -> None:
    verdict = verify(_reference(program), lowered_program(PROGRAMS[program]()), level="ring")
    assert verdict.status is Status.EQUAL, str(verdict)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("program", "ranks"), [("ring attention", 3), ("experts", 4), ("tensor parallel", 4), ("synchronised batch norm", 4)]
)
def test_a_correct_program_is_equal_on_more_ranks(program: str, ranks: int) -> None:
    verdict = verify(_reference(program), lowered_program(PROGRAMS[program](), ranks=ranks), level="ring")
    assert verdict.status is Status.EQUAL, str(verdict)


@pytest.mark.parametrize(
    ("program", "bug"), [pytest.param(*pair, marks=() if pair[1] in QUICK else pytest.mark.slow, id=pair[1]) for pair in bugs()]
)
def test_a_planted_bug_is_different_and_the_verdict_points_to_it(program: str, bug: str) -> None:
    verdict = verify(_reference(program), lowered_program(PROGRAMS[program](), bug), level="ring")
    assert verdict.status is Status.DIFFERENT, str(verdict)
    assert re.search(POINTS[bug], verdict.divergence), verdict.divergence
