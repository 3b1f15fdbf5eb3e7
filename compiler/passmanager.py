"""Run passes in order and return only what is proven.

The passes are a visible tuple. After each one the program must keep the invariants of ``compiler.program`` and must be what the
pass's contract promises of the program before it; a result that is not shown to be is not returned.

    Equal, EqualAfter(k)   transformed = before       Spec(f)   transformed = f(before)       Approx(e)   to e, in floating point
"""

from __future__ import annotations

import dataclasses
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.fx as fx

from ..runtime.collector import without_collector
from .contract import Context, Pass
from .errors import HocketError, VerificationError
from .layout import format_layout
from .program import Program, check_program, note
from .verify.levels import Level, Question, ask, policy
from .verify.reductions import Reductions, Retrace
from .verify.report import Status, Verdict


@dataclass(frozen=True)
class PassRecord:
    """What one pass did. options: its fields; decisions, applied: counts; nodes: calls before and after; seconds: CPU."""

    name: str
    options: dict[str, Any]
    decisions: int
    applied: int
    nodes: tuple[int, int]
    verdict: Verdict
    seconds: float

    def __str__(self) -> str:
        before, after = self.nodes
        return (
            f"{self.name}: {before} -> {after} nodes, {self.applied} of {self.decisions} decisions applied, {self.seconds:.3f} s; "
            f"{self.verdict}"
        )


def run_passes(
    program: Program,
    passes: tuple[Pass, ...],
    context: Context,
    *,
    level: str | tuple[Level, ...] | None = None,
    retrace: Retrace | Sequence[Retrace] | None = None,
    reproduce_in: Path | None = None,
) -> tuple[Program, tuple[PassRecord, ...]]:
    """Apply passes one after the other and verify each.

    level: ``off | types | float | ring | full``, or the levels themselves; default the environment variable HOCKET_VERIFY, then
    ``ring``. retrace: captures the same program at small sizes, for the levels that execute, when one needs it; it must have the
    same skeleton (same nodes and targets). Of several, the first is executed; with the others it must show that every integer
    is one expression of the named sizes. reproduce_in: directory for a reproducer of a failure. Raises VerificationError naming the
    pass, the node and both source lines; HocketError for a pass that breaks an invariant.
    """
    name, levels = policy(level) if level is None or isinstance(level, str) else ("chosen levels", level)
    retraces = () if retrace is None else (retrace,) if callable(retrace) else tuple(retrace)
    reductions = Reductions(program, retraces, lambda one, before: _applied(one, before, context))
    records = []
    for one in passes:
        start = time.process_time()
        after = _applied(one, program, context)
        seconds = time.process_time() - start
        question = Question(program, after, one.contract, reductions.through(one, after))
        verdict = ask(question, levels)
        record = _record(one, program, after, verdict, seconds)
        if levels and not _is_accepted(verdict, name):
            raise VerificationError(_refusal(one, record, name, _reproducer(reproduce_in, one, program, after, verdict)))
        records.append(record)
        program = after
    return program, tuple(records)


@without_collector()
def _applied(one: Pass, program: Program, context: Context) -> Program:
    after = one(program, context)
    try:
        check_program(after)
    except HocketError as error:
        raise HocketError(f"pass {one.name} returned a program that breaks an invariant: {error}") from error
    return after


def _is_accepted(verdict: Verdict, level: str) -> bool:
    """Equality shown; or, where only types were asked for, a distribution that holds."""
    if verdict.status is Status.EQUAL:
        return True
    return level == "types" and verdict.status is Status.NOT_CHECKED


def _record(one: Pass, before: Program, after: Program, verdict: Verdict, seconds: float) -> PassRecord:
    added = after.decisions[len(before.decisions) :]
    nodes = (_calls(before), _calls(after))
    return PassRecord(one.name, _options(one), len(added), sum(d.applied for d in added), nodes, verdict, seconds)


def _calls(program: Program) -> int:
    return sum(node.op == "call_function" for node in program.nodes)


def _options(one: Pass) -> dict[str, Any]:
    if not dataclasses.is_dataclass(one):
        return {}
    return {field.name: getattr(one, field.name) for field in dataclasses.fields(one)}


def _refusal(one: Pass, record: PassRecord, level: str, reproducer: str) -> str:
    reason = {
        Status.DIFFERENT: "does not compute the same function",
        Status.ILL_TYPED: "distributes values wrongly",
        Status.UNSUPPORTED: "could not be verified",
        Status.NOT_CHECKED: "was not checked",
    }[record.verdict.status]
    text = (
        f"the result of pass {one.name} {reason} (contract {one.contract}, level {level}), so it is not returned: {record.verdict}"
    )
    if record.verdict.status in (Status.UNSUPPORTED, Status.NOT_CHECKED):
        text += ". Pass retrace=, a function that captures the model at small sizes, or choose a weaker level if that will do"
    return text + reproducer


def _reproducer(directory: Path | None, one: Pass, before: Program, after: Program, verdict: Verdict) -> str:
    """Write both programs, the pass and the verdict as text; the sentence that says where."""
    if directory is None:
        return ""
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / f"{re.sub(r'[^a-z0-9]+', '-', one.name.lower())}-{len(list(directory.iterdir()))}.txt"
    parts = [
        f"pass {one.name} {_options(one)} contract {one.contract}",
        f"verdict {verdict.to_json()}",
        f"before\n{program_text(before)}",
        f"after\n{program_text(after)}",
    ]
    path.write_text("\n\n".join(parts) + "\n")
    return f". A reproducer is in {path}"


def program_text(program: Program) -> str:
    """A program as text, one node a line, with shapes, layouts and source lines."""
    mesh = "logical program" if program.mesh is None else f"lowered to mesh {program.mesh}"
    roles = dict(zip(program.placeholders, map(str, program.signature.inputs), strict=True))
    return "\n".join([mesh, *(_line(node, roles) for node in program.nodes)])


def _line(node: fx.Node, roles: dict[fx.Node, str]) -> str:
    value = node.meta.get("val")
    shape = list(value.shape) if isinstance(value, torch.Tensor) else ""
    layouts = ", ".join(map(format_layout, note(node).layouts or ()))
    call = roles[node] if node in roles else f"{node.target}{node.args}{dict(node.kwargs) or ''}"
    return f"{node.name}{shape} = {call}  # {layouts} {note(node).source}".rstrip()
