"""What the proof costs: CPU time of types and ring, alone and beside everything else that compilation does."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import torch
import torch.fx as fx
from common import Row, Sample, at_most, cpu_seconds, progress
from torch import nn

from hocket.compiler.capture import capture
from hocket.compiler.contract import Context
from hocket.compiler.cost.cluster import Cluster
from hocket.compiler.demo.llama import Llama, LlamaConfig
from hocket.compiler.doors.hall import Options, compile_program
from hocket.compiler.plan.planner import plan
from hocket.compiler.plan.tactics import DataParallel, Tactic, TensorParallel
from hocket.compiler.program import Program, annotate, copy_program, note
from hocket.compiler.retrace import Retrace
from hocket.compiler.verify.levels import Question, ask, ring_level, types_level
from hocket.compiler.verify.report import Status, Verdict
from hocket.compiler.verify.ring.algebra import Algebra
from hocket.compiler.verify.ring.arithmetic import ring_of
from hocket.compiler.verify.ring.compare import evaluate
from hocket.compiler.verify.ring.inputs import draw_inputs
from hocket.compiler.verify.ring.tables import PRIMES
from hocket.compiler.verify.types import check_types
from hocket.passes.shard import Shard
from hocket.runtime.collector import without_collector
from hocket.runtime.mesh import Mesh
from hocket.testing.models import TABLE

aten = torch.ops.aten

COST, SHARE = "CPU time", "Share of compilation"
OPS = 2659
"""Ops that are to be typed in LIMIT seconds."""
LIMIT = 0.2

Figures = dict[str, Any]
"""Plain data: what a part of the benchmark remembers."""


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


def wide(repeats: int) -> Figures:
    """Types of a program on 1,024 ranks with more ops than the goal speaks of."""
    progress("types on 1,024 ranks")
    model, inputs = llama(11, 2048, 4)
    program = compiled(model, inputs, Mesh((("dp", 1024),)), DataParallel("dp"))[1]
    report = check_types(program)
    return {"ops": report.ops, "status": report.status, "seconds": cpu_seconds(lambda: check_types(program), repeats).values}


def compiled(model: nn.Module, inputs: tuple[torch.Tensor, ...], mesh: Mesh, tactic: Tactic) -> tuple[Program, Program, float]:
    """(captured, sharded, CPU seconds of both with planning)."""
    cluster = Cluster.default()
    start = time.process_time()
    program = capture(model, inputs)
    chosen = plan(program, mesh, TABLE, cluster, [tactic])
    with without_collector():
        lowered_program = Shard()(program, Context(mesh, TABLE, cluster, chosen))
    return program, lowered_program, time.process_time() - start


def deep(layers: int, repeats: int) -> Figures:
    """The proof of a sharded program, of a rewrite of every block, and of two programs that share nothing."""
    progress(f"{layers} layers on 2 ranks")
    model, inputs = llama(layers, 4, 6)
    program, sharded, compiling = compiled(model, inputs, Mesh((("dp", 2),)), DataParallel("dp"))
    again, halves = copy_program(program)[0], InTwoHalves()(program)
    verdicts: list[Verdict] = []
    ours = cpu_seconds(lambda: verdicts.append(ask(Question(program, sharded), (types_level, ring_level))), repeats)
    rewritten = cpu_seconds(lambda: verdicts.append(ask(Question(program, halves), (ring_level,))), repeats)
    whole = cpu_seconds(lambda: every_node(program, again), 1)
    return {
        "nodes": len(program.nodes),
        "compiling": compiling,
        "sharded": ours.values,
        "rewritten": rewritten.values,
        "whole": whole.values,
        "equal": all(verdict.status is Status.EQUAL for verdict in verdicts),
        "detail": verdicts[-1].levels[-1].detail,
    }


TACTICS: Mapping[str, Tactic] = {"dp": DataParallel("dp"), "tp": TensorParallel("tp")}


def door(axis: str, layers: int) -> Figures:
    """What ``hocket.parallelize`` does to a model before it runs, with the seconds of it that were proof."""
    progress(f"parallelize of {layers} layers over {axis}")
    torch.manual_seed(0)
    model, inputs = llama(layers, 4, 6)
    options = Options(Mesh(((axis, 2),)), tactics=[TACTICS[axis]], cluster=Cluster.default(), rules=TABLE, level="ring")
    start = time.process_time()
    program = capture(model, inputs)
    made = compile_program(program, options, retrace=Retrace(model, inputs, {}))
    seconds = time.process_time() - start
    verdicts = [record.verdict for record in made.records]
    return {
        "seconds": seconds,
        "proof": sum(level.seconds for verdict in verdicts for level in verdict.levels),
        "equal": all(verdict.status is Status.EQUAL for verdict in verdicts),
        "passes": len(verdicts),
    }


def cost_rows(layers: int, types: Figures, proof: Figures, doors: Mapping[str, Figures]) -> list[Row]:
    """All figures of cost as rows."""
    limit = LIMIT * max(types["ops"] / OPS, 1.0)
    proven = "equal" if proof["equal"] else "NOT EQUAL"
    sharded, rewritten, whole = (Sample(tuple(proof[name])) for name in ("sharded", "rewritten", "whole"))
    rows = [
        at_most(COST, f"types of {types['ops']} ops on 1,024 ranks ({types['status']})", Sample(tuple(types["seconds"])), limit),
        at_most(COST, f"types and ring of the sharded program, {layers} layers ({proven})", sharded, 10.0),
        at_most(COST, f"ring of a rewrite of every block, {layers} layers ({proof['detail']})", rewritten, 10.0),
        _unshared(f"if nothing were shared: both programs of {proof['nodes']} nodes executed in full, on both rings", whole.median),
        _part(f"types and ring of the sharded program, {layers} layers", sharded.median, proof["compiling"]),
        _part(f"ring of a rewrite of every block, {layers} layers", rewritten.median, proof["compiling"]),
    ]
    for axis, found in doors.items():
        proven = "equal" if found["equal"] else "NOT EQUAL"
        case = f"all proofs of hocket.parallelize, {axis}=2, {layers} layers ({found['passes']} passes, {proven})"
        rows.append(_part(case, found["proof"], found["seconds"]))
    return rows


def _unshared(case: str, seconds: float) -> Row:
    """For comparison only: a check never does this."""
    return Row(COST, case, seconds, text=f"{seconds:.3g} s")


def _part(case: str, seconds: float, of: float) -> Row:
    share = seconds / of
    return Row(SHARE, case, share, "", goal="<= 10%", met=share <= 0.1, text=f"{share:.1%} ({seconds:.2f} of {of:.1f} s)")
