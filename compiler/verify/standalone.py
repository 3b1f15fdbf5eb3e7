"""``verify(original, transformed)``: the proof by itself, for programs that somebody else has rewritten.

    a module or a function                   captured, with its backward
    a Program                                as it is
    a GraphModule of ATen ops                as it is, inputs and outputs in the order of the other side's
    a list of them, one a rank               with functional collectives, on a mesh, with layouts of what enters and leaves
    a module whose parameters are DTensors   traced for every rank by torch's own dispatcher
    a module in DistributedDataParallel      traced for every rank, with torch's own averaging of gradients

Only what the levels have shown is called equal: an op without exact meaning, or sizes at which nothing can be executed, end in
``unsupported`` or ``not-checked``, and say why.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch.fx as fx
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ...runtime.mesh import Mesh
from ..contract import Approx, Contract, Equal
from ..errors import HocketError, InputError
from ..program import Program, Role, RoleKind, annotate, check_program, copy_program
from .dtensor import dtensor_program, is_dtensor_module
from .foreign import Layouts, has_collectives, is_aten_graph, own_ports, ports_of, program_of
from .levels import RING_COST, Level, Question, ask, is_affordable, policy, types_level
from .ranks import RankGraphs
from .replicas import is_replicated_module, replicas_program
from .report import LevelResult, Outcome, Status, Verdict, combine
from .ring.compare import compare
from .ring.relations import explain
from .ring.verdict import Status as RingStatus
from .shrink import skeleton_difference

Side = nn.Module | Callable[..., Any] | Program | fx.GraphModule | Sequence[fx.GraphModule]


def verify(
    original: Side,
    transformed: Side,
    *,
    example_args: tuple[Any, ...] = (),
    example_kwargs: Mapping[str, Any] | None = None,
    mesh: str | int | Mesh | None = None,
    level: str = "full",
    contract: Contract | None = None,
    layouts: Layouts | None = None,
    train: bool = True,
) -> Verdict:
    """Whether ``transformed`` computes the same function as ``original``: outputs, gradients and updated buffers.

    example_args, example_kwargs: global inputs of one call; only shapes and dtypes matter. mesh: the axes of ranks that graphs
    with collectives run on. level: ``types | float | ring | full``. contract: ``Equal()`` where none is given. layouts: how inputs
    and outputs of per-rank graphs, or plain inputs of a DTensor module, lie over the mesh: ``{"args[0]": "S(0)"}``; replicated
    where nothing is said. train: compare gradients too.

    ``verdict.status`` is EQUAL only where the levels asked for have shown it; DIFFERENT and ILL_TYPED name the place. Raises
    InputError for sides that cannot be compared: other numbers of inputs or outputs, graphs that change tensors in place, arguments
    that do not fit; CaptureError for a module that has no single graph.
    """
    name, levels = policy(level)
    sides = _Sides(example_args, dict(example_kwargs or {}), None if mesh is None else Mesh.parse(mesh), layouts, train)
    before, after = sides.programs(original, transformed)
    for program in (before, after):
        check_program(program)
    question = Question(before, _with_own_constants(before, after), contract or Equal())
    mismatch = _input_mismatch(question)
    if mismatch:
        return combine((LevelResult("signature", Outcome.FAILED, mismatch, failure=Status.DIFFERENT),))
    if isinstance(after, RankGraphs):
        return _explained(_strict(ask(question, (_apart,)), name, question), question)
    if not is_affordable(before, after, RING_COST):
        question = dataclasses.replace(question, small=sides.smaller(original, transformed, question))
    verdict = ask(question, levels)
    if verdict.status is Status.ILL_TYPED:
        verdict = _untyped(verdict, question, levels)
    return _explained(_strict(verdict, name, question), question)


def _explained(verdict: Verdict, question: Question) -> Verdict:
    """A difference without a place gets one from the values themselves: programs of others say nothing of where they come from."""
    if verdict.status is not Status.DIFFERENT or verdict.divergence or isinstance(question.contract, Approx):
        return verdict
    return dataclasses.replace(verdict, divergence=explain(*question.executed))


def _untyped(verdict: Verdict, question: Question, levels: tuple[Level, ...]) -> Verdict:
    """The types judge op by op. What others write may be wrong in one op and put right by the next: all ranks are executed too."""
    again = ask(question, tuple(level for level in levels if level is not types_level))
    if again.status is not Status.EQUAL:
        place = _explained(again, question).divergence
        levels_asked = (*verdict.levels, *again.levels)
        text = "; ".join(part for part in (place, verdict.divergence) if part)
        status = again.status if again.status is Status.DIFFERENT else verdict.status
        return dataclasses.replace(
            verdict, status=status, levels=levels_asked, divergence=text, seconds=verdict.seconds + again.seconds
        )
    warning = f"the types of the values cannot be followed, so this holds for these ranks only: {verdict.divergence}"
    return dataclasses.replace(again, warnings=(*again.warnings, warning))


@dataclass(frozen=True)
class _Sides:
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    mesh: Mesh | None
    layouts: Layouts | None
    train: bool

    def programs(self, original: Side, transformed: Side) -> tuple[Program, Program]:
        """Both sides as programs. A graph takes its roles from the other side."""
        if _is_graph(original) and not isinstance(transformed, Program) and not _is_graph(transformed):
            after = self._whole(transformed)
            return program_of(_graphs(original), ports_of(after)), after
        before = self._whole(original)
        return before, self._against(transformed, before)

    def _whole(self, side: Side) -> Program:
        """A side that needs no other: everything but graphs without known inputs."""
        if isinstance(side, Program):
            return side
        if _is_graph(side):
            graphs = _graphs(side)
            if len(graphs) > 1 or has_collectives(graphs[0]):
                raise InputError("the original must be a program of one rank; found a graph with collectives, or several graphs")
            return program_of(graphs, own_ports(graphs[0], self.args))
        if is_dtensor_module(side) or is_replicated_module(side):
            kind = "whose parameters are DTensors" if is_dtensor_module(side) else "wrapped in DistributedDataParallel"
            raise InputError(f"the original must be an ordinary module; found one {kind}: swap the two sides")
        from ..capture import capture

        if not callable(side):
            raise InputError(f"expected a module, function, Program or graph; found {type(side).__name__}")
        return capture(side, self.args, self.kwargs, train=self.train)

    def _against(self, side: Side, before: Program) -> Program:
        if isinstance(side, DistributedDataParallel):
            if self.mesh is not None:
                raise InputError("a module wrapped in DistributedDataParallel brings its own ranks; leave mesh= out")
            return replicas_program(side, before, (self.args, self.kwargs), self.layouts)
        if isinstance(side, Program) or not (_is_graph(side) or is_dtensor_module(side)):
            return self._whole(side)
        if is_dtensor_module(side):
            assert isinstance(side, nn.Module)
            if self.mesh is not None:
                raise InputError("a DTensor module brings its own mesh; leave mesh= out")
            return dtensor_program(side, before, (self.args, self.kwargs), self.layouts)
        graphs = _graphs(side)
        if self.mesh is None and len(graphs) > 1:
            raise InputError(f"found {len(graphs)} graphs, one a rank; pass mesh= to say how the ranks are arranged")
        return program_of(graphs, ports_of(before), self.mesh, self.layouts)

    def smaller(self, original: Side, transformed: Side, question: Question) -> tuple[Program, Program] | None:
        """Both sides captured at small sizes with the same skeletons; None where that is impossible."""
        if any(
            isinstance(s, Program) or _is_graph(s) or is_dtensor_module(s) or is_replicated_module(s)
            for s in (original, transformed)
        ):
            return None
        from ..retrace import Retrace, smaller_program

        first, second = (Retrace(s, self.args, self.kwargs, train=self.train) for s in (original, transformed))  # type: ignore[arg-type]
        before = smaller_program(question.original, first, Mesh((("one", 1),)))
        if before is None:
            return None
        try:
            after = _with_own_constants(before, second(before.sizes))
        except HocketError:
            return None
        return None if skeleton_difference(question.transformed, after) else (before, after)


def _is_graph(side: object) -> bool:
    if isinstance(side, (list, tuple)):
        if not side or not all(isinstance(one, fx.GraphModule) and is_aten_graph(one) for one in side):
            raise InputError(
                "expected a list of GraphModules of ATen ops, one a rank; found "
                + (", ".join(type(one).__name__ for one in side) or "an empty list")
            )
        return True
    return is_aten_graph(side)


def _graphs(side: Any) -> Sequence[fx.GraphModule]:
    return tuple(side) if isinstance(side, (list, tuple)) else (side,)


def _with_own_constants(before: Program, after: Program) -> Program:
    """The transformed program with names of its own for its constants: equal names need not be equal values."""
    names = {role.name for role in before.signature.inputs if role.kind is RoleKind.CONSTANT}
    clash = {role: f"transformed:{role.name}" for role in after.signature.inputs if role.kind is RoleKind.CONSTANT}
    if isinstance(after, RankGraphs) or not names & {role.name for role in clash}:
        return after
    renamed, _ = copy_program(after)
    inputs = tuple(Role(RoleKind.CONSTANT, clash[role]) if role in clash else role for role in after.signature.inputs)
    for node, role in zip(renamed.placeholders, inputs, strict=True):
        annotate(node, role=role)
    signature = dataclasses.replace(after.signature, inputs=inputs)
    return renamed.replace(
        signature=signature, constants={clash[Role(RoleKind.CONSTANT, n)]: v for n, v in after.constants.items()}
    )


def _input_mismatch(question: Question) -> str:
    """In what the inputs and outputs of the two sides differ, in words."""
    left, right = question.original.signature, question.transformed.signature
    texts = []
    for what, a, b in (("inputs", left.inputs, right.inputs), ("outputs", left.outputs, right.outputs)):
        first = {role for role in a if role.kind is not RoleKind.CONSTANT}
        second = {role for role in b if role.kind is not RoleKind.CONSTANT}
        for roles, side in ((first - second, "original"), (second - first, "transformed")):
            if roles:
                texts.append(f"{what} of the {side} program only: {', '.join(sorted(map(str, roles)))}")
    return "; ".join(texts) or _form_mismatch(question)


def _form_mismatch(question: Question) -> str:
    if question.transformed.mesh is not None:
        return ""
    sides = (question.original, question.transformed)
    values = [dict(zip(p.signature.inputs, (n.meta["val"] for n in p.placeholders), strict=True)) for p in sides]
    for role, value in values[0].items():
        other = values[1].get(role)
        if other is not None and (value.shape != other.shape or value.dtype != other.dtype):
            forms = [f"{list(v.shape)} {v.dtype}" for v in (value, other)]
            return f"{role} is {forms[0]} in the original program and {forms[1]} in the transformed one"
    return ""


def _apart(question: Question, _: tuple[LevelResult, ...]) -> LevelResult:
    """The ring level for ranks that run different programs."""
    if isinstance(question.contract, Approx):
        return LevelResult("ring", Outcome.UNSUPPORTED, "ranks that run different programs are compared exactly only")
    verdict = compare(*question.executed)
    size = question.transformed.mesh.size if question.transformed.mesh else 1
    if verdict.status is RingStatus.EQUAL:
        bound = "" if verdict.bound is None else f"missed with probability <= {verdict.bound.probability:.2g} an entry (heuristic)"
        detail = f"equal over the ring, {verdict.draws} draws, on all {size} ranks, each with a program of its own"
        return LevelResult("ring", Outcome.PROVED, detail, bound=bound)
    outcome = Outcome.FAILED if verdict.status is RingStatus.DIFFERENT else Outcome.UNSUPPORTED
    return LevelResult("ring", outcome, str(verdict))


def _strict(verdict: Verdict, level: str, question: Question) -> Verdict:
    """Samples alone prove nothing where an exact answer was asked for."""
    exact = level in ("ring", "full") and not isinstance(question.contract, Approx)
    shown = any(found.level == "ring" and found.outcome is Outcome.PROVED for found in verdict.levels)
    if verdict.status is not Status.EQUAL or shown or not exact:
        return verdict
    refused = any(found.level == "ring" and found.outcome is Outcome.UNSUPPORTED for found in verdict.levels)
    status = Status.UNSUPPORTED if refused else Status.NOT_CHECKED
    warning = "samples in floating point agree, but the exact check has shown nothing, so this is not called equal"
    return dataclasses.replace(verdict, status=status, bound="", warnings=(*verdict.warnings, warning))
