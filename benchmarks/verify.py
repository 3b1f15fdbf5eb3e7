"""What the proof catches and what it costs: mutation score, false alarms, and CPU time beside that of compilation.

python benchmarks/verify.py [--quick] [--json FILE] [--check] [--only TEXT]
"""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Mapping

import torch
from common import Row, arguments, at_most, cpu_seconds, machine, progress, report
from torch import nn

from hocket.compiler.capture import capture
from hocket.compiler.contract import Context
from hocket.compiler.cost.cluster import Cluster
from hocket.compiler.errors import HocketError
from hocket.compiler.plan.planner import plan
from hocket.compiler.plan.tactics import DataParallel
from hocket.compiler.program import Program, Role, copy_program
from hocket.compiler.verify.levels import Question, ask, ring_level, types_level
from hocket.compiler.verify.lockstep import run_ranks
from hocket.compiler.verify.report import Status
from hocket.compiler.verify.samples import sample_inputs
from hocket.compiler.verify.types import check_types
from hocket.passes.shard import Shard
from hocket.runtime.mesh import Mesh
from hocket.testing.models import CASES, TABLE, WIDTH, Attention, lowered
from hocket.testing.mutation import Trial, judge, mutants

INTRO = """
Mutants are random small changes of programs that hocket itself has lowered (a lost or doubled collective, a scalar off by a
thousandth, a rewired input, a wrong layout, one rank's term counted twice, ...). A mutant is live if it computes something else in
float64. The other checkers compare outputs, gradients and updates of the same mutants, run in float32 or bfloat16, with the usual
tolerances. Times are CPU seconds of one core.
"""

Values = Mapping[Role, torch.Tensor | None]
TOLERANCES = {
    "float32, default tolerance": (torch.float32, 1.3e-6, 1e-5),
    "float32, 1e-3": (torch.float32, 1e-3, 1e-3),
    "float32, 1e-2": (torch.float32, 1e-2, 1e-2),
    "bfloat16, default tolerance": (torch.bfloat16, 1.6e-2, 1e-2),
}


def mutation_rows(count: int) -> list[Row]:
    """The score over all cases, and what tolerances would have caught of the same mutants."""
    total: Counter[str] = Counter()
    for case in CASES:
        progress(f"mutants of {case}")
        program, parallel = lowered(case)
        total["alarm"] += ask(Question(program, parallel), (types_level, ring_level)).status is not Status.EQUAL
        for mutant in mutants(parallel, random.Random(77), count):
            trial = judge(program, mutant)
            total["equivalent"] += trial.live is False
            total["called different"] += trial.is_false_alarm
            if trial.live:
                total["live"] += 1
                total["killed"] += trial.killed
                total.update(_caught(program, trial))
    live, table = total["live"], "Mutants caught"
    rows = [_share(table, "types and ring", total["killed"], live, "all")]
    rows += [_share(table, name, total[name], live) for name in (*TOLERANCES, "first output only, float32, 1e-3")]
    rows.append(_count("False alarms", f"{total['equivalent']} equivalent mutants called different", total["called different"]))
    rows.append(_count("False alarms", f"{len(CASES)} programs of hocket's own not proven", total["alarm"]))
    return rows


def _share(claim: str, case: str, caught: int, live: int, goal: str = "") -> Row:
    met = caught == live if goal else None
    return Row(claim, case, caught, "mutants", {"live": live}, goal=goal, met=met, text=f"{caught} of {live}")


def _count(claim: str, case: str, found: int) -> Row:
    return Row(claim, case, found, "programs", goal="0", met=found == 0, text=str(found))


def _caught(program: Program, trial: Trial) -> list[str]:
    """The names of the tolerance checks that see the mutant; crashes count as seen."""
    inputs = sample_inputs(program)
    found = []
    runs: dict[torch.dtype, tuple[Values, Values] | None] = {}
    for name, (dtype, rtol, atol) in TOLERANCES.items():
        if dtype not in runs:
            runs[dtype] = _both(program, trial.mutant.program, inputs, dtype)
        pair = runs[dtype]
        if pair is None or not all(_close(a, pair[1][role], rtol, atol) for role, a in pair[0].items()):
            found.append(name)
    pair = runs[torch.float32]
    first = program.signature.outputs[0]
    if pair is None or not _close(pair[0][first], pair[1][first], 1e-3, 1e-3):
        found.append("first output only, float32, 1e-3")
    return found


def _both(
    program: Program, mutant: Program, inputs: Mapping[Role, torch.Tensor], dtype: torch.dtype
) -> tuple[Values, Values] | None:
    expected = run_ranks(program, inputs, dtype=dtype, check_replicas=False).outputs
    try:
        return expected, run_ranks(mutant, inputs, dtype=dtype, check_replicas=False).outputs
    except (HocketError, RuntimeError):
        return None


def _close(a: torch.Tensor | None, b: torch.Tensor | None, rtol: float, atol: float) -> bool:
    if a is None or b is None:
        return a is b
    return a.shape == b.shape and torch.allclose(a, b, rtol=rtol, atol=atol, equal_nan=True)


class Deep(nn.Module):
    """Residual blocks of attention and a perceptron."""

    def __init__(self, layers: int) -> None:
        super().__init__()

        def make() -> nn.Module:
            return nn.Sequential(Attention(), nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH), nn.SiLU())

        self.layers = nn.ModuleList(make() for _ in range(layers))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = x + layer(x)
        return x.square().mean()


def cost_rows(layers: int, repeats: int) -> list[Row]:
    """Time of types at 1,024 ranks and of the ring, beside capture, planning and lowering of the same model."""
    progress(f"{layers} layers on 1,024 ranks")
    mesh, cluster = Mesh((("dp", 1024),)), Cluster.default()
    start = time.process_time()
    program = capture(Deep(layers), (torch.randn(2048, 4, WIDTH),))
    chosen = plan(program, mesh, TABLE, cluster, [DataParallel("dp")])
    wide = Shard()(program, Context(mesh, TABLE, cluster, chosen))
    compiling = time.process_time() - start
    small = capture(Deep(layers), (torch.randn(4, 4, WIDTH),))
    again, _ = copy_program(small)
    typed = check_types(wide)
    types = cpu_seconds(lambda: check_types(wide), repeats)
    ring = cpu_seconds(lambda: ask(Question(small, again), (ring_level,)), 1)
    claim = "CPU time"
    share = ring.median / compiling
    return [
        at_most(claim, f"types of {typed.ops} ops on 1,024 ranks ({typed.status})", types, 0.2 * typed.ops / 2659),
        at_most(claim, f"ring, both programs of {layers} layers ({len(small.nodes)} nodes, 2 rings)", ring, 10.0),
        Row(claim, "ring check beside compilation", share, goal="<= 10%", met=share <= 0.1, text=f"{share:.1%}"),
    ]


def main() -> None:
    """Measure, and report."""
    options = arguments(__doc__)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    where, rows = machine(), []
    if options.only in "mutants":
        rows += mutation_rows(3 if options.quick else 112)
    if options.only in "cost":
        rows += cost_rows(8 if options.quick else 80, 3)
    report("verify", "Verification", INTRO, rows, options, where)


if __name__ == "__main__":
    main()
