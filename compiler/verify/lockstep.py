"""All ranks of a lowered program in one process, node by node, in floating point.

Every node is run for every rank before the next one; a collective is a function of the ranks' values (``together``), so no rank
ever waits and the run is deterministic. Ranks whose arguments are the very same tensors share one result, which makes replicated
work as cheap as on one rank. A logical program runs as the one rank that holds everything.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.fx as fx

from ...runtime.mesh import Mesh
from ..errors import CollectiveMismatch, InputError, UnsupportedError, VerificationError
from ..layout import Layout, Partial, Replicate, assemble, coordinate, cut, format_layout, global_slices
from ..program import Program, Role, RoleKind, note
from .together import is_collective, run_collective, run_exchange
from .widen import widen_call, widen_tensor

Values = list[Any]
"""One value per rank."""

RESHAPED: dict[Any, Any] = {torch.ops.aten.view.default: torch.ops.aten.reshape.default}
"""A view was traced for the strides of the example; inputs given here may have others (the tangent of a transposed output)."""

ONE_RANK = Mesh((("one", 1),))


@dataclass(frozen=True)
class LockstepRun:
    """outputs: global value per output role, None for absent ones; values: node name -> value per rank, where recorded."""

    outputs: dict[Role, torch.Tensor | None]
    values: dict[str, Values] = field(default_factory=dict)


def run_ranks(
    program: Program,
    inputs: Mapping[Role, torch.Tensor],
    *,
    dtype: torch.dtype | None = None,
    record: bool = False,
    check_replicas: bool = True,
) -> LockstepRun:
    """Run every rank of a lowered program on pieces of global ``inputs`` and put the outputs together.

    inputs: one per input role, CONSTANT ones may be left out. dtype: compute every float in it (``torch.float64``; the casts that
    the program makes are rewritten too). record: keep the value of every node on every rank. check_replicas: an output that claims
    to be replicated over an axis must be bitwise equal along it. Raises InputError, VerificationError (an op failed on a rank, or
    replicas differ), CollectiveMismatch.
    """
    mesh = program.mesh or ONE_RANK
    values: dict[fx.Node, Values] = {}
    uses = _last_uses(program)
    placeholders = dict(zip(program.placeholders, program.signature.inputs, strict=True))
    with torch.no_grad(), _default_dtype(dtype):
        for node in program.nodes:
            if node.op == "output":
                break
            if node in placeholders:
                values[node] = _pieces(node, _input(program, placeholders[node], inputs), mesh, dtype)
            else:
                values[node] = _run_node(node, values, mesh, dtype)
            if not record:
                for dead in uses.get(node, ()):
                    values[dead] = []
        outputs = {}
        for role, result in zip(program.signature.outputs, program.results, strict=True):
            outputs[role] = None if result is None else _join(role, result, values[result], mesh, check=check_replicas)
    return LockstepRun(outputs, {node.name: found for node, found in values.items()} if record else {})


def run_global(
    program: Program, inputs: Mapping[Role, torch.Tensor], dtype: torch.dtype | None = None, *, record: bool = False
) -> LockstepRun:
    """Run a logical program; see ``run_ranks``."""
    if program.mesh is not None:
        raise InputError(f"expected a logical program, found one lowered to mesh {program.mesh}; use run_ranks")
    return run_ranks(program, inputs, dtype=dtype, record=record)


def layout_of(node: fx.Node, mesh: Mesh, index: int = 0) -> Layout | None:
    """How a node's output lies over the ranks; replicated for a logical program, None for a helper that holds no whole value."""
    layouts = note(node).layouts
    if mesh is ONE_RANK:
        return (Replicate(),)
    return None if layouts is None else layouts[index]


def _last_uses(program: Program) -> dict[fx.Node, list[fx.Node]]:
    """node -> the nodes whose value nobody reads after it."""
    last: dict[fx.Node, fx.Node] = {}
    for node in program.nodes:
        last[node] = node
        for used in node.all_input_nodes:
            last[used] = node
    kept = {node for node in program.results if node is not None}
    found: dict[fx.Node, list[fx.Node]] = {}
    for node, user in last.items():
        if node not in kept and user.op != "output":
            found.setdefault(user, []).append(node)
    return found


def _input(program: Program, role: Role, inputs: Mapping[Role, torch.Tensor]) -> torch.Tensor:
    if role in inputs:
        return inputs[role]
    if role.kind is RoleKind.CONSTANT and role.name in program.constants:
        return program.constants[role.name]
    raise InputError(f"expected a value for input {role}, found none among {', '.join(map(str, inputs)) or 'no inputs'}")


def _pieces(node: fx.Node, value: torch.Tensor, mesh: Mesh, dtype: torch.dtype | None) -> Values:
    """Every rank's piece of an input; ranks that hold the same piece share the tensor."""
    layout = layout_of(node, mesh)
    if layout is None:
        raise VerificationError(f"expected a layout on input {node.name}, found none")
    expected = note(node).global_shapes
    if expected is not None and expected[0] is not None and tuple(value.shape) != expected[0]:
        raise InputError(f"expected shape {list(expected[0])} for input {node.name}, found {list(value.shape)}")
    pieces = [piece.contiguous() for piece in cut(widen_tensor(value, dtype), layout, mesh)]
    if any(isinstance(placement, Partial) for placement in layout):
        return list(pieces)
    shared: dict[tuple[tuple[int, int], ...], torch.Tensor] = {}
    return [shared.setdefault(global_slices(value.shape, layout, mesh, rank), piece) for rank, piece in enumerate(pieces)]


def _run_node(node: fx.Node, values: Mapping[fx.Node, Values], mesh: Mesh, dtype: torch.dtype | None) -> Values:
    if node.target is coordinate:
        return [mesh.coordinate(rank)[str(node.args[0])] for rank in range(mesh.size)]
    try:
        if is_collective(node.target):
            first, *rest = node.args
            if node.target is torch.ops._c10d_functional.all_to_all_single.default:
                splits = [tuple(_on_rank(rest[:2], values, rank)) for rank in range(mesh.size)]
                return list(run_exchange(values[first], splits, mesh, str(rest[2])))  # type: ignore[index]
            return list(run_collective(node.target, values[first], rest, mesh))  # type: ignore[index]
        return _run_ranks_apart(node, values, mesh, dtype)
    except (CollectiveMismatch, UnsupportedError) as error:
        raise type(error)(f"{_where(node)}: {error}") from None


def _run_ranks_apart(node: fx.Node, values: Mapping[fx.Node, Values], mesh: Mesh, dtype: torch.dtype | None) -> Values:
    """An op that looks at its own rank only. Ranks with identical arguments share the result unless the op draws random numbers."""
    target, args, kwargs = widen_call(RESHAPED.get(node.target, node.target), node.args, node.kwargs, dtype)
    share = torch.Tag.nondeterministic_seeded not in getattr(target, "tags", ())
    done: dict[tuple[int, ...], Any] = {}
    results = []
    used = [values[m] for m in node.all_input_nodes]
    for rank in range(mesh.size):
        key = tuple(id(found[rank]) for found in used)
        if not share or key not in done:
            done[key] = _call(node, target, (_on_rank(args, values, rank), _on_rank(kwargs, values, rank)), rank)
        results.append(done[key])
    return results


def _call(node: fx.Node, target: Callable[..., Any], call: tuple[Any, Any], rank: int) -> Any:
    args, kwargs = call
    try:
        return target(*args, **kwargs)
    except Exception as error:
        shown = ", ".join(str(list(a.shape)) if isinstance(a, torch.Tensor) else str(a) for a in args)
        raise VerificationError(f"{_where(node)} failed on rank {rank} with arguments ({shown}): {error}") from error


def _on_rank(argument: Any, values: Mapping[fx.Node, Values], rank: int) -> Any:
    """An argument with nodes replaced by one rank's values."""
    if isinstance(argument, fx.Node):
        return values[argument][rank]
    if isinstance(argument, (list, tuple)):
        return [_on_rank(item, values, rank) for item in argument]
    if isinstance(argument, Mapping):
        return {key: _on_rank(item, values, rank) for key, item in argument.items()}
    return argument


def _join(role: Role, node: fx.Node, pieces: Values, mesh: Mesh, *, check: bool) -> torch.Tensor:
    """The global value of an output."""
    layout = layout_of(node, mesh)
    if layout is None:
        raise VerificationError(f"expected a layout on {_where(node)}, which leaves as {role}; found none")
    for placement, axis in zip(layout, mesh.names, strict=True):
        for group in mesh.groups(axis) if check and isinstance(placement, Replicate) else ():
            for rank in group[1:]:
                if not _same_bits(pieces[group[0]], pieces[rank]):
                    raise VerificationError(
                        f"output {role} is {format_layout(layout)} on mesh {mesh}, but ranks {group[0]} and {rank} hold different "
                        f"values of {_where(node)}: a reduction over {axis} is missing, or was made from different values"
                    )
    return assemble(pieces, layout, mesh)


def _same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    if a is b:
        return True
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    return bool(torch.equal(a, b) or torch.allclose(a, b, rtol=0, atol=0, equal_nan=True))


def _where(node: fx.Node) -> str:
    return f"{node.name} = {node.target} (from {note(node).source or 'unknown source'})"


@contextlib.contextmanager
def _default_dtype(dtype: torch.dtype | None) -> Iterator[None]:
    """Factories without a dtype, and integer divisions, follow the default one."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype or before)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
