"""Pipelines on the command line: a mesh with an axis ``pp`` makes stages and a schedule, not a plan of placements."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from typing import Any

from rich.console import Console

from ...runtime.mesh import Mesh
from ..doors.parallelize import pipelined_order
from ..doors.pipeline.batch import Batch
from ..doors.pipeline.compile import CompiledPipeline, compile_pipeline
from ..doors.threads import single_threaded
from ..plan.tactics import RewriteTactic, Tactic
from ..report.pipeline import explain_pipeline
from .conclusion import conclude
from .target import Target


def pipelined(arguments: argparse.Namespace) -> bool:
    """Whether the mesh of a command asks for stages."""
    return "pp" in Mesh.parse(arguments.mesh).names


@single_threaded
def compile_stages(
    target: Target, arguments: argparse.Namespace, tactics: Sequence[Tactic | RewriteTactic] | str
) -> CompiledPipeline:
    """The stages of a target and their schedule. level: of the proof of every pass. Raises what ``hocket.parallelize`` does."""
    order = pipelined_order(target.model, arguments.mesh, {"tactics": tactics, "verify": getattr(arguments, "level", None)})
    assert order is not None, "the mesh has an axis of stages"
    return compile_pipeline(order, Batch(target.args, target.kwargs), train=not arguments.inference)


def show_stages(compiled: CompiledPipeline, arguments: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Print stages, messages, schedule and decisions; the same as facts."""
    console.print(explain_pipeline(compiled, getattr(arguments, "topic", ""), width=console.width), soft_wrap=True, markup=False)
    return {
        "mesh": str(Mesh.parse(arguments.mesh)),
        "micro_batches": list(compiled.rows),
        "schedule": compiled.how,
        "seconds": dict(compiled.seconds),
        "passes": [{"pass": record.name, "verdict": str(record.verdict.status)} for record in compiled.records],
    }


def prove_stages(compiled: CompiledPipeline, arguments: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Print the verdict of every pass of every form, and what that shows."""
    facts = show_stages(compiled, arguments, console)
    verdicts = {f"{i}: {record.name}": record.verdict for i, record in enumerate(compiled.records)}
    facts["verdicts"] = [{"pass": name, **json.loads(verdict.to_json())} for name, verdict in verdicts.items()]
    conclusion = conclude(arguments.level, verdicts)
    console.print(str(conclusion))
    return {**facts, **conclusion.to_json()}
