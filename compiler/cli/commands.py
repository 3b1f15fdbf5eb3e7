"""What each command does. All of them return JSON-ready facts and print on the console they are given."""

from __future__ import annotations

import argparse
import copy
import dataclasses
import itertools
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import sympy
import torch
from rich.console import Console
from rich.table import Table

from ...runtime.mesh import Mesh
from ..capture import capture
from ..capture.step import scalar_loss
from ..demo.race import race
from ..doors.hall import Compiled, Options, compile_program, run_exactly
from ..doors.module import session_of
from ..doors.parallelize import parallelize
from ..doors.pipeline.compile import CompiledPipeline
from ..doors.threads import single_threaded
from ..errors import InputError, VerificationError
from ..plan.formulas import cost_formulas
from ..report.rows import activation_groups, decision_row, parameter_groups
from ..report.text import captured, decisions_table, every_decision, passes_table, plan_table
from ..retrace import Retrace
from ..verify.report import LevelResult, Outcome, Verdict
from ..verify.standalone import verify as prove
from ..verify.tracing import trace_ranks
from .conclusion import conclude
from .doctor import examine
from .stages import compile_stages, pipelined, prove_stages, show_stages
from .tactics import parse_tactics
from .target import Target, load_target


def demo(arguments: argparse.Namespace, console: Console) -> dict[str, Any]:
    """The whole way of a small Llama on real text."""
    from ..demo.show import show

    return show(console, mesh=arguments.mesh, steps=arguments.steps, out=Path(arguments.out))


def plan(arguments: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Capture and plan; run nothing."""
    if pipelined(arguments):
        return show_stages(_stages(arguments), arguments, console)
    target = _target(arguments)
    compiled = _compile(target, arguments, level="off")
    console.print(captured(compiled), plan_table(compiled))
    return {**_facts(compiled), **(_formulas(compiled, target, arguments, console) if arguments.formulas else {})}


def _formulas(compiled: Compiled, target: Target, arguments: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Print what the plan costs as formulas of the named sizes."""
    retrace = Retrace(target.model, target.args, target.kwargs, train=not arguments.inference)
    cost = cost_formulas(compiled.program, compiled.plan, _options(arguments, level=None).cluster, retrace)
    if cost is None:
        console.print("no formulas: at other sizes the model is another program")
        return {"formulas": None}
    formulas = {field.name: str(sympy.expand(getattr(cost, field.name))) for field in dataclasses.fields(cost)}
    console.print("per rank and step, with the placements above:")
    for name, formula in formulas.items():
        console.print(f"  {name} = {formula}", soft_wrap=True, markup=False)
    return {"formulas": formulas}


def explain(arguments: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Every decision, and the program on request."""
    if pipelined(arguments):
        return show_stages(_stages(arguments), arguments, console)
    compiled = _compile(_target(arguments), arguments, level=None)
    console.print(captured(compiled), passes_table(compiled), decisions_table(every_decision(compiled), arguments.topic))
    if arguments.code:
        console.print(compiled.lowered.graph.code)
    facts = _facts(compiled)
    facts["decisions"] = [decision_row(d) for d in every_decision(compiled)]
    return facts


def verify(arguments: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Prove the sharded program, or that another module is equal; exit status 1 where the level does not show what it can."""
    if arguments.against:
        return _verify_against(arguments, console)
    if pipelined(arguments):
        return prove_stages(_stages(arguments), arguments, console)
    compiled = _compile(_target(arguments), arguments, level=arguments.level)
    console.print(captured(compiled), passes_table(compiled))
    for record in compiled.records:
        console.print(record.verdict)
    verdicts = {record.name: record.verdict for record in compiled.records}
    if arguments.canary:
        from ...runtime.engines.local import LocalEngine

        with LocalEngine(compiled.lowered.mesh or Mesh.parse(arguments.mesh)) as engine:
            _canary(verdicts, run_exactly(compiled, _options(arguments, level=arguments.level), engine), console)
    facts = _facts(compiled)
    facts["verdicts"] = [{"pass": name, **json.loads(verdict.to_json())} for name, verdict in verdicts.items()]
    return {**facts, **_concluded(console, arguments.level, verdicts)}


def _canary(verdicts: dict[str, Verdict], found: LevelResult, console: Console) -> None:
    """Print what the canary says, and let its failure be the last pass's."""
    console.print(f"canary: {found.outcome}, {found.detail}")
    last = next(reversed(verdicts))
    verdicts[last] = verdicts[last].also(found)


def _concluded(console: Console, level: str, verdicts: Mapping[str, Verdict]) -> dict[str, Any]:
    conclusion = conclude(level, verdicts)
    console.print(str(conclusion))
    return conclusion.to_json()


def _verify_against(arguments: argparse.Namespace, console: Console) -> dict[str, Any]:
    target = _target(arguments)
    other = load_target(arguments.against, arguments.input, examples=False)
    layouts = dict(_layout(text) for text in arguments.layout)
    transformed: Any = other.model
    if arguments.ranks:
        transformed = trace_ranks(other.model, target.args, arguments.ranks, layouts=layouts)
    verdict = prove(
        target.model,
        transformed,
        example_args=target.args,
        example_kwargs=target.kwargs,
        level=arguments.level,
        mesh=arguments.ranks or None,
        layouts=layouts or None,
        train=not arguments.inference,
    )
    console.print(f"{target.label} against {other.label}", verdict)
    return {**json.loads(verdict.to_json()), **_concluded(console, arguments.level, {other.label: verdict})}


def _layout(text: str) -> tuple[str, str]:
    name, sign, placement = text.partition("=")
    if not name or not sign or not placement:
        raise InputError(f"--layout {text!r}: expected NAME=PLACEMENT, such as args[0]=S(1), or out=P(avg)")
    return name, placement


def run(arguments: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Train on real local ranks beside plain torch, on one fixed batch."""
    target, mesh = _trainable(arguments), Mesh.parse(arguments.mesh)
    plain = copy.deepcopy(target.model)
    options: dict[str, Any] = {"tactics": parse_tactics(arguments.tactic), "inductor": arguments.inductor}
    with parallelize(target.model, mesh, target.args, target.kwargs, **options) as parallel:
        session = session_of(parallel)
        console.print(captured(session.compiled), passes_table(session.compiled))
        if arguments.canary:
            found = run_exactly(session.compiled, session.options, session.engine)
            console.print(f"canary: {found.outcome}, {found.detail}")
            if found.outcome is Outcome.FAILED:
                raise VerificationError(f"the engine does not run the proven program, so it does not train: {found.detail}")
        fusion = session.latest.fusion
        if fusion is not None:
            console.print(str(fusion))
        batches = itertools.repeat((target.args, target.kwargs))
        result = race(plain, parallel, batches, steps=arguments.steps, workers=mesh.size, loss_of=_any_loss, rate=arguments.lr)
        if arguments.trace:
            engine: Any = session.engine
            engine.start_trace()
            _any_loss(parallel(*target.args, **target.kwargs)).backward()
            engine.trace(arguments.trace)
            console.print(f"trace of one step: {arguments.trace}")
    table = Table(title="training on one batch", title_justify="left")
    for heading in ("how", "ms per step", "first loss", "last loss"):
        table.add_column(heading, justify="right")
    for lane in (result.plain, result.ranks):
        for how in lane.seconds:
            table.add_row(how, f"{lane.median(how) * 1e3:.1f}", f"{lane.losses[0]:.6f}", f"{lane.losses[-1]:.6f}")
    console.print(table, f"largest relative difference of the losses: {result.worst_loss_difference:.1e}")
    return {
        "losses_plain": result.plain.losses,
        "losses_ranks": result.ranks.losses,
        "worst_loss_difference": result.worst_loss_difference,
        "seconds": {how: lane.median(how) for lane in (result.plain, result.ranks) for how in lane.seconds},
        "inductor": fusion.to_json() if fusion is not None else None,
        "ok": result.worst_loss_difference < 1e-3,
    }


def doctor(_: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Examine this machine; the exit status is 1 where something needed is broken."""
    findings = examine()
    table = Table(title="hocket doctor", title_justify="left")
    for heading in ("what", "state", "detail"):
        table.add_column(heading, overflow="fold")
    colours = {"ok": "green", "absent": "yellow", "broken": "red"}
    for finding in findings:
        table.add_row(finding.topic, f"[{colours[finding.state]}]{finding.state}[/]", finding.detail)
    console.print(table)
    rows = [{"topic": f.topic, "state": f.state, "detail": f.detail} for f in findings]
    return {"findings": rows, "ok": all(f.state != "broken" for f in findings)}


def _trainable(arguments: argparse.Namespace) -> Target:
    """The target of ``run``, which trains: refused before anything starts where that cannot be."""
    if pipelined(arguments):
        raise InputError(
            "hocket run trains without stages; for a mesh with an axis pp see hocket plan and hocket verify, and train with "
            "hocket.train_step"
        )
    if arguments.trace and not Path(arguments.trace).absolute().parent.is_dir():
        raise InputError(f"--trace {arguments.trace}: there is no folder {Path(arguments.trace).absolute().parent}")
    target = _target(arguments)
    if not any(parameter.requires_grad for parameter in target.model.parameters()):
        raise InputError(f"{target.label} has no parameters to train; hocket plan and hocket verify take it with --inference")
    return target


def _stages(arguments: argparse.Namespace) -> CompiledPipeline:
    return compile_stages(_target(arguments), arguments, parse_tactics(arguments.tactic))


def _target(arguments: argparse.Namespace) -> Target:
    return load_target(arguments.target, arguments.input)


@single_threaded
def _compile(target: Target, arguments: argparse.Namespace, *, level: str | None) -> Compiled:
    train = not arguments.inference
    start = time.perf_counter()
    program = capture(target.model, target.args, target.kwargs, train=train)
    traced = time.perf_counter() - start
    options = _options(arguments, level=level)
    compiled = compile_program(program, options, retrace=Retrace(target.model, target.args, target.kwargs, train=train))
    return compiled.timed(capture=traced)


def _options(arguments: argparse.Namespace, *, level: str | None) -> Options:
    return Options(mesh=Mesh.parse(arguments.mesh), tactics=parse_tactics(arguments.tactic), level=level)


def _any_loss(result: Any) -> torch.Tensor:
    """The model's own loss, or the mean square of its floating outputs where it has none."""
    try:
        return scalar_loss(result, None)
    except InputError:
        leaves = [leaf for leaf in torch.utils._pytree.tree_leaves(result) if isinstance(leaf, torch.Tensor) and leaf.requires_grad]
        if not leaves:
            raise InputError("nothing the model returns needs a gradient, so there is nothing to train") from None
        return torch.stack([leaf.float().square().mean() for leaf in leaves]).sum()


def _facts(compiled: Compiled) -> dict[str, Any]:
    cost = compiled.plan.cost
    return {
        "nodes": len(compiled.program.nodes),
        "sizes": dict(compiled.program.sizes),
        "mesh": str(compiled.plan.mesh),
        "seconds": dict(compiled.seconds),
        "parameters": [group.row() for group in parameter_groups(compiled.program, compiled.plan)],
        "activations": [group.row() for group in activation_groups(compiled.program, compiled.plan)],
        "predicted": {
            "seconds": float(cost.seconds),
            "flops": float(cost.flops),
            "bytes_moved": float(cost.bytes_moved),
            "bytes_on_wire": float(cost.bytes_on_wire),
            "peak_bytes": float(cost.peak_bytes),
        },
        "gap": compiled.plan.certificate.gap,
    }


def calibrate(arguments: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Measure this machine and keep the figures where the planner finds them."""
    from ...runtime.engines.local import LocalEngine
    from ..cost.calibrate import calibrate as measure
    from ..cost.tile_timing import LoopTimer
    from ..cost.timing import CollectiveTimer

    with (
        console.status("measuring matrix products, memory, collectives and tile loops"),
        LocalEngine(Mesh((("d", arguments.ranks),))) as engine,
    ):
        cluster = measure(CollectiveTimer(engine), LoopTimer(engine), ranks=arguments.ranks)
    path = cluster.save()
    facts = cluster.to_json()
    console.print_json(data=facts)
    console.print(f"saved to {path}; plans use it from now on")
    if cluster.tiles.is_unsteady:
        console.print(
            f"[yellow]the machine was busy: times were {cluster.tiles.spread:.0%} longer than undisturbed ones. Until it is "
            "calibrated in a quiet moment, rewrites must gain as much before they are made"
        )
    return {**facts, "path": str(path)}
