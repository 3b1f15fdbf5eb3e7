"""What the proof catches and what it costs: mutation score, false alarms, and CPU time beside that of compilation.

python benchmarks/verify.py [--quick] [--json FILE] [--check] [--only TEXT]
"""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Mapping

import torch
import torch.fx as fx
from common import Row, arguments, at_most, cpu_seconds, machine, progress, report
from torch import nn

from hocket.compiler.capture import capture
from hocket.compiler.contract import Context
from hocket.compiler.cost.cluster import Cluster
from hocket.compiler.demo.llama import Llama, LlamaConfig
from hocket.compiler.errors import HocketError
from hocket.compiler.plan.planner import plan
from hocket.compiler.plan.tactics import DataParallel
from hocket.compiler.program import Program, Role, annotate, copy_program, note
from hocket.compiler.verify.levels import Question, ask, ring_level, types_level
from hocket.compiler.verify.lockstep import run_ranks
from hocket.compiler.verify.report import Status, Verdict
from hocket.compiler.verify.ring.algebra import Algebra
from hocket.compiler.verify.ring.arithmetic import ring_of
from hocket.compiler.verify.ring.compare import evaluate
from hocket.compiler.verify.ring.inputs import draw_inputs
from hocket.compiler.verify.ring.tables import PRIMES
from hocket.compiler.verify.samples import sample_inputs
from hocket.compiler.verify.types import check_types
from hocket.passes.shard import Shard
from hocket.runtime.mesh import Mesh
from hocket.testing.models import CASES, TABLE, lowered
from hocket.testing.mutation import Trial, judge, mutants

INTRO = """
Mutants are random small changes of programs that hocket itself has lowered (a lost or doubled collective, a scalar off by a
thousandth, a rewired input, a wrong layout, one rank's term counted twice, ...). A mutant is live if it computes something else in
float64. The other checkers compare outputs, gradients and updates of the same mutants, run in float32 or bfloat16, with the usual
tolerances. Times are CPU seconds of one core.
"""

aten = torch.ops.aten

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


def llama(layers: int, batch: int, sequence: int) -> tuple[nn.Module, tuple[torch.Tensor, torch.Tensor]]:
    """A tiny Llama with its training inputs."""
    config = LlamaConfig(vocabulary=48, width=16, layers=layers, heads=2, kv_heads=2, hidden=32, context=8)
    tokens = torch.randint(0, config.vocabulary, (batch, sequence + 1))
    return Llama(config), (tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous())


class InTwoHalves:
    """Every product x w with the inner dimension in two halves: a rewrite of every block that no structure shows to be right."""

    def __call__(self, program: Program) -> Program:
        new, mapping = copy_program(program)
        for old, node in mapping.items():
            if node.op == "call_function":
                annotate(node, origin=old.name)
        graph = new.graph.graph
        for node in [n for n in graph.nodes if n.target is aten.mm.default]:
            with graph.inserting_before(node):
                total = self._halves(graph, node)
            node.replace_all_uses_with(total)
            graph.erase_node(node)
        return new

    def _halves(self, graph: fx.Graph, node: fx.Node) -> fx.Node:
        x, weight = node.args
        size = x.meta["val"].shape[1]

        def call(target: object, *args: object) -> fx.Node:
            made = graph.call_function(target, args)
            made.meta.update(node.meta)
            annotate(made, origin="")
            return made

        parts = [
            call(aten.mm.default, call(aten.slice.Tensor, x, 1, a, b), call(aten.slice.Tensor, weight, 0, a, b))
            for a, b in ((0, size // 2), (size // 2, size))
        ]
        total = call(aten.add.Tensor, *parts)
        annotate(total, origin=note(node).origin)
        return total


def every_node(first: Program, second: Program) -> None:
    """Evaluate both programs in full on both rings, sharing nothing."""
    for p in PRIMES:
        algebras = Algebra(ring_of(p)), Algebra(ring_of(p))
        inputs = draw_inputs(first, second, algebras[0], 0)
        for program, algebra in zip((first, second), algebras, strict=True):
            evaluate(program, inputs, algebra)


def compiled(model: nn.Module, inputs: tuple[torch.Tensor, ...], mesh: Mesh) -> tuple[Program, Program, float]:
    """(captured, sharded over the batch, CPU seconds of both with planning)."""
    cluster = Cluster.default()
    start = time.process_time()
    program = capture(model, inputs)
    chosen = plan(program, mesh, TABLE, cluster, [DataParallel(mesh.names[0])])
    lowered_program = Shard()(program, Context(mesh, TABLE, cluster, chosen))
    return program, lowered_program, time.process_time() - start


def cost_rows(layers: int, repeats: int) -> list[Row]:
    """CPU time of types at 1,024 ranks, and of the ring beside capture, planning and lowering of the same Llama."""
    claim = "CPU time"
    progress("types of 6 layers on 1,024 ranks")
    model, inputs = llama(6, 2048, 4)
    wide = compiled(model, inputs, Mesh((("dp", 1024),)))[1]
    typed = check_types(wide)
    types = cpu_seconds(lambda: check_types(wide), repeats)
    limit = 0.2 * max(typed.ops / 2659, 1.0)
    rows = [at_most(claim, f"types of {typed.ops} ops on 1,024 ranks ({typed.status})", types, limit)]

    progress(f"{layers} layers on 2 ranks")
    model, inputs = llama(layers, 4, 6)
    program, sharded, compiling = compiled(model, inputs, Mesh((("dp", 2),)))
    again, halves = copy_program(program)[0], InTwoHalves()(program)
    progress("ring")
    verdicts: list[Verdict] = []
    ours = cpu_seconds(lambda: verdicts.append(ask(Question(program, sharded), (types_level, ring_level))), repeats)
    rewritten = cpu_seconds(lambda: verdicts.append(ask(Question(program, halves), (ring_level,))), repeats)
    whole = cpu_seconds(lambda: every_node(program, again), 1)
    proven = "equal" if all(verdict.status is Status.EQUAL for verdict in verdicts) else "NOT EQUAL"
    return [
        *rows,
        at_most(claim, f"types and ring of the sharded program, {layers} layers ({proven})", ours, 10.0),
        at_most(claim, f"ring of a rewrite of every block, {layers} layers ({verdicts[-1].levels[-1].detail})", rewritten, 10.0),
        at_most(claim, f"ring, both programs in full on both rings, {layers} layers, {len(program.nodes)} nodes", whole, 10.0),
        _part("types and ring of the sharded program, of its compilation", ours.median, compiling),
        _part("ring of the rewrite of every block, of its compilation", rewritten.median, compiling),
    ]


def _part(case: str, seconds: float, of: float) -> Row:
    share = seconds / of
    return Row("CPU time", case, share, goal="<= 10%", met=share <= 0.1, text=f"{share:.1%}")


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
