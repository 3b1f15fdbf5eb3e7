"""Random mutation of programs: small changes that a faulty pass could have made, to measure what a checker catches.

A mutant is *live* if it computes something else than the original. A checker is only worth what it kills: every live mutant, and
no other.
"""

from __future__ import annotations

import operator
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.fx as fx

from ..compiler.errors import HocketError
from ..compiler.layout import Partial, Replicate, coordinate, local_offset
from ..compiler.program import NOTE, Note, Program, Role, RoleKind, annotate, copy_program, note
from ..compiler.verify.differential import output_error
from ..compiler.verify.levels import Question, ask, ring_level, types_level
from ..compiler.verify.lockstep import run_ranks
from ..compiler.verify.report import Status, Verdict
from ..compiler.verify.samples import sample_inputs

aten = torch.ops.aten
c10d = torch.ops._c10d_functional


@dataclass(frozen=True)
class Mutant:
    """A changed program, and what was changed."""

    program: Program
    kind: str
    description: str


@dataclass(frozen=True)
class Trial:
    """live: whether it computes something else (None: it cannot be run at all); verdict: what types and ring say."""

    mutant: Mutant
    live: bool | None
    verdict: Verdict

    @property
    def killed(self) -> bool:
        """Whether types and ring do not let it pass; a program that divides by zero on every draw is not called equal either."""
        return self.verdict.status is not Status.EQUAL

    @property
    def is_false_alarm(self) -> bool:
        """Called different, though it computes the same."""
        return self.live is False and self.verdict.status is Status.DIFFERENT


def mutants(program: Program, choose: random.Random, count: int) -> list[Mutant]:
    """``count`` random mutants of a lowered program, each with one change; kinds are drawn evenly among those that apply."""
    found: list[Mutant] = []
    attempts = 0
    while len(found) < count:
        attempts += 1
        if attempts > 200 * count:
            raise HocketError(f"expected a program with something to mutate; found none in {attempts} attempts")
        kind = choose.choice(list(MUTATIONS))
        copied, _ = copy_program(program)
        description = MUTATIONS[kind](copied, choose)
        if description:
            copied.graph.graph.lint()
            found.append(Mutant(copied, kind, description))
    return found


def judge(original: Program, mutant: Mutant, *, seeds: int = 2, tolerance: float = 1e-9) -> Trial:
    """Run a mutant in float64 on all ranks to learn whether it is live, and ask the types and the ring about it."""
    live = is_live(original, mutant.program, seeds=seeds, tolerance=tolerance)
    verdict = ask(Question(original, mutant.program), (types_level, ring_level))
    if live is False and verdict.refused:
        live = is_live(original, mutant.program, seeds=seeds, tolerance=tolerance, scale=30.0)
    return Trial(mutant, live, verdict)


def is_live(original: Program, changed: Program, *, seeds: int, tolerance: float, scale: float = 1.0) -> bool | None:
    """Whether some output differs on random inputs (replicas that differ count too); None where the program cannot run."""
    for seed in range(seeds):
        inputs = sample_inputs(original, seed)
        if scale != 1.0:
            inputs = {role: scale * v if v.is_floating_point() else v for role, v in inputs.items()}
        expected = run_ranks(original, inputs, dtype=torch.float64).outputs
        try:
            found = run_ranks(changed, inputs, dtype=torch.float64, check_replicas=False).outputs
        except (HocketError, RuntimeError):
            return None
        if _differs(expected, found, tolerance) or _replicas_differ(changed, inputs, tolerance):
            return True
    return False


def _replicas_differ(program: Program, inputs: Mapping[Role, torch.Tensor], tolerance: float) -> bool:
    """Whether ranks that are to hold the same result do not, by more than rounding: what is zero but for rounding may be scaled."""
    mesh = program.mesh
    if mesh is None:
        return False
    values = run_ranks(program, inputs, dtype=torch.float64, record=True, check_replicas=False).values
    for node in program.results:
        layout = (note(node).layouts or (None,))[0] if node is not None else None
        if node is None or layout is None:
            continue
        held = values[node.name]
        for axis, placement in zip(mesh.names, layout, strict=True):
            for group in mesh.groups(axis) if isinstance(placement, Replicate) else ():
                if any(not output_error(held[group[0]], held[rank])[0] <= tolerance for rank in group[1:]):
                    return True
    return False


def _differs(expected: Mapping[Role, torch.Tensor | None], found: Mapping[Role, torch.Tensor | None], tolerance: float) -> bool:
    for role, value in expected.items():
        other = found[role]
        if (value is None) != (other is None):
            return True
        if value is not None and other is not None and not output_error(value, other)[0] <= tolerance:
            return True
    return False


# ---- the mutations: each changes the program in place and says what it did, or returns "" where it found nothing ---------------

Mutation = Callable[[Program, random.Random], str]


def _pick(program: Program, choose: random.Random, wanted: Callable[[fx.Node], bool]) -> fx.Node | None:
    nodes = [node for node in program.nodes if node.op == "call_function" and wanted(node)]
    return choose.choice(nodes) if nodes else None


def _is_reduction(node: fx.Node) -> bool:
    return node.target is c10d.all_reduce.default


def _form(node: object) -> tuple[tuple[int, ...], torch.dtype] | None:
    value = node.meta.get("val") if isinstance(node, fx.Node) else None
    return (tuple(value.shape), value.dtype) if isinstance(value, torch.Tensor) else None


def drop_collective(program: Program, choose: random.Random) -> str:
    """A reduction, or any other collective that keeps the shape, is left out."""
    node = _pick(program, choose, lambda n: n.target is not c10d.wait_tensor.default and _joins(n) and _form(n) == _form(n.args[0]))
    if node is None:
        return ""
    node.replace_all_uses_with(node.args[0])  # type: ignore[arg-type]
    return f"{node.name} dropped"


def _joins(node: fx.Node) -> bool:
    return getattr(node.target, "namespace", "") == "_c10d_functional"


def duplicate_collective(program: Program, choose: random.Random) -> str:
    """A reduction is made twice."""
    node = _pick(program, choose, _is_reduction)
    if node is None:
        return ""
    wait = next(iter(node.users))
    with program.graph.graph.inserting_after(wait):
        again = program.graph.graph.call_function(c10d.all_reduce.default, (wait, *node.args[1:]))
    with program.graph.graph.inserting_after(again):
        ready = program.graph.graph.call_function(c10d.wait_tensor.default, (again,))
    again.meta.update(node.meta)
    ready.meta.update(wait.meta)
    wait.replace_all_uses_with(ready, delete_user_cb=lambda user: user is not again)
    return f"{node.name} twice"


def other_reduction(program: Program, choose: random.Random) -> str:
    """A sum becomes an average or a maximum, or runs over another axis."""
    node = _pick(program, choose, _is_reduction)
    if node is None or program.mesh is None:
        return ""
    options = [(1, "avg"), (1, "max"), *((2, axis) for axis in program.mesh.names)]
    place, value = choose.choice([(i, v) for i, v in options if node.args[i] != v])
    node.update_arg(place, value)
    return f"{node.name} argument {place} becomes {value}"


def change_scalar(program: Program, choose: random.Random) -> str:
    """A number in the arithmetic is off: x1.01, x1.001, doubled, or one more."""
    node = _pick(program, choose, lambda n: isinstance(n.target, torch._ops.OpOverload) and bool(_numbers(n)))
    if node is None:
        return ""
    place = choose.choice(_numbers(node))
    old: float = node.args[place]  # type: ignore[assignment]
    new = choose.choice([old * 1.01, old * 1.001, old * 2, old + 1])
    node.update_arg(place, new)
    return f"{node.name} argument {place} from {old} to {new}" if new != old else ""


def _numbers(node: fx.Node) -> list[int]:
    arithmetic = str(node.target).split(".")[1] in ("mul", "div", "add", "sub", "pow", "rsub")
    return [
        i
        for i, a in enumerate(node.args)
        if isinstance(a, float) or (arithmetic and isinstance(a, int) and not isinstance(a, bool) and i > 0)
    ]


def swap_operands(program: Program, choose: random.Random) -> str:
    """a - b becomes b - a, a / b becomes b / a, a b becomes b a for square matrices."""
    targets = (aten.sub.Tensor, aten.div.Tensor, aten.mm.default, aten.bmm.default)
    node = _pick(
        program, choose, lambda n: n.target in targets and len(n.args) > 1 and _form(n.args[0]) == _form(n.args[1]) is not None
    )
    if node is None:
        return ""
    node.args = (node.args[1], node.args[0], *node.args[2:])
    return f"{node.name} operands swapped"


INSTEAD = {
    aten.add.Tensor: aten.sub.Tensor,
    aten.sub.Tensor: aten.add.Tensor,
    aten.mul.Tensor: aten.add.Tensor,
    aten.div.Tensor: aten.mul.Tensor,
    aten.exp.default: aten.sin.default,
    aten.tanh.default: aten.sigmoid.default,
    aten.rsqrt.default: aten.sqrt.default,
}


def change_op(program: Program, choose: random.Random) -> str:
    """An op becomes a similar one."""
    node = _pick(program, choose, lambda n: n.target in INSTEAD)
    if node is None:
        return ""
    old, node.target = node.target, INSTEAD[node.target]  # type: ignore[index]
    return f"{node.name} from {old} to {node.target}"


def rewire(program: Program, choose: random.Random) -> str:
    """An argument is taken from another value of the same shape and type."""
    node = _pick(program, choose, lambda n: any(_form(a) for a in n.args))
    if node is None:
        return ""
    place = choose.choice([i for i, a in enumerate(node.args) if _form(a)])
    old = node.args[place]
    before = program.nodes[: program.nodes.index(node)]
    others = [m for m in before if m is not old and _form(m) == _form(old) and not (_joins(m) and "wait" not in str(m.target))]
    if not others:
        return ""
    new = choose.choice(others)
    node.update_arg(place, new)
    return f"{node.name} reads {new.name} instead of {old}"


def drop_add(program: Program, choose: random.Random) -> str:
    """One term of a sum is lost."""
    node = _pick(program, choose, lambda n: n.target is aten.add.Tensor and any(_form(a) == _form(n) for a in n.args))
    if node is None:
        return ""
    kept = choose.choice([a for a in node.args if _form(a) == _form(node)])
    node.replace_all_uses_with(kept)  # type: ignore[arg-type]
    return f"{node.name} keeps {kept} only"


def change_integer(program: Program, choose: random.Random) -> str:
    """An offset, an index or a length is off by one."""
    node = _pick(program, choose, lambda n: n.target in SLICES or n.target is local_offset)
    if node is None:
        return ""
    places = [
        i for i, a in enumerate(node.args) if isinstance(a, int) and not isinstance(a, bool) and (i > 1 or _counts_lengths(node))
    ]
    if not places:
        return ""
    place, step = choose.choice(places), choose.choice([-1, 1])
    old: int = node.args[place]  # type: ignore[assignment]
    node.update_arg(place, old + step)
    return f"{node.name} argument {place} from {old} to {old + step}"


SLICES = (aten.slice.Tensor, aten.narrow.default, aten.select.int, aten.roll.default, aten.constant_pad_nd.default)


def _counts_lengths(node: fx.Node) -> bool:
    """Whether a call is one of hocket's integer functions, all of whose arguments are lengths."""
    return node.target is local_offset


def change_layout(program: Program, choose: random.Random) -> str:
    """A result or a parameter is declared to lie otherwise than it does."""
    results = [n for n in program.results if n is not None and note(n).layouts]
    node = choose.choice([*results, *program.placeholders])
    layout = (note(node).layouts or (None,))[0]
    if layout is None:
        return ""
    axis = choose.randrange(len(layout))
    others = [Replicate(), Partial("sum"), *([Partial("avg")] if _is_float(node) else [])]  # integers have no exact average
    placement = choose.choice([p for p in others if p != layout[axis]])
    if isinstance(placement, Partial) and node.op == "placeholder":
        return ""
    annotate(node, layouts=((*layout[:axis], placement, *layout[axis + 1 :]),))
    return f"{node.name} declared {placement} on axis {axis}"


def one_rank(program: Program, choose: random.Random) -> str:
    """A value is scaled on every rank but the first."""
    if program.mesh is None:
        return ""
    node = _pick(program, choose, lambda n: _is_float(n) and not _joins(n))
    if node is None:
        return ""
    graph, axis = program.graph.graph, choose.choice(program.mesh.names)
    with graph.inserting_after(node):
        index = graph.call_function(coordinate, (axis,))
    with graph.inserting_after(index):
        factor = graph.call_function(operator.add, (index, 1))
    with graph.inserting_after(factor):
        scaled = graph.call_function(aten.mul.Scalar, (node, factor))
    index.meta.update({"val": 0, NOTE: Note()})
    factor.meta.update({"val": 1, NOTE: Note()})
    scaled.meta.update(node.meta)
    node.replace_all_uses_with(scaled, delete_user_cb=lambda user: user is not scaled)
    return f"{node.name} scaled on the later ranks of {axis}"


def one_rank_term(program: Program, choose: random.Random) -> str:
    """A term of a sum is counted once more on every rank but the first."""
    if program.mesh is None:
        return ""
    node = _pick(program, choose, lambda n: n.target is aten.add.Tensor and len(n.args) == 2 and not n.kwargs and _is_float(n))
    if node is None:
        return ""
    graph, axis = program.graph.graph, choose.choice(program.mesh.names)
    with graph.inserting_before(node):
        index = graph.call_function(coordinate, (axis,))
        factor = graph.call_function(operator.add, (index, 1))
    index.meta.update({"val": 0, NOTE: Note()})
    factor.meta.update({"val": 1, NOTE: Note()})
    node.kwargs = {"alpha": factor}
    return f"{node.name} counts a term again on the later ranks of {axis}"


def _is_float(node: fx.Node) -> bool:
    form = _form(node)
    return form is not None and form[1].is_floating_point


def lose_gradient_reduction(program: Program, choose: random.Random) -> str:
    """One gradient leaves without its last reduction."""
    places = [
        n
        for n, role in zip(program.results, program.signature.outputs, strict=True)
        if n is not None and role.kind is RoleKind.GRADIENT and n.target is c10d.wait_tensor.default
    ]
    reduced = [n for n in places if _is_reduction(n.args[0])]  # type: ignore[arg-type]
    if not reduced:
        return ""
    node = choose.choice(reduced)
    source = node.args[0].args[0]  # type: ignore[union-attr]
    annotate(source, layouts=note(node).layouts)  # type: ignore[arg-type]
    node.replace_all_uses_with(source)  # type: ignore[arg-type]
    return f"gradient {node.name} not reduced"


MUTATIONS: dict[str, Mutation] = {
    "drop collective": drop_collective,
    "duplicate collective": duplicate_collective,
    "other reduction": other_reduction,
    "scalar": change_scalar,
    "swap": swap_operands,
    "op": change_op,
    "rewire": rewire,
    "drop add": drop_add,
    "integer": change_integer,
    "layout": change_layout,
    "one rank": one_rank,
    "one rank's term": one_rank_term,
    "gradient not reduced": lose_gradient_reduction,
}
