"""The single changes that mutants are made of: what a faulty pass could have forgotten, doubled or mixed up.

Each changes a program in place and says what it did, or returns "" where it found nothing to change.
"""

from __future__ import annotations

import operator
import random
from collections.abc import Callable

import torch
import torch.fx as fx

from ..compiler.layout import Partial, Replicate, coordinate, local_offset
from ..compiler.program import NOTE, Note, Program, RoleKind, annotate, note

aten = torch.ops.aten
c10d = torch.ops._c10d_functional


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
    reduce_twice(program, node)
    return f"{node.name} twice"


def reduce_twice(program: Program, node: fx.Node) -> None:
    """Make a reduction a second time, of its own result."""
    wait = next(iter(node.users))
    with program.graph.graph.inserting_after(wait):
        again = program.graph.graph.call_function(c10d.all_reduce.default, (wait, *node.args[1:]))
    with program.graph.graph.inserting_after(again):
        ready = program.graph.graph.call_function(c10d.wait_tensor.default, (again,))
    again.meta.update(node.meta)
    ready.meta.update(wait.meta)
    wait.replace_all_uses_with(ready, delete_user_cb=lambda user: user is not again)


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
