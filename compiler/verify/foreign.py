"""Graphs that others have made, as Programs: lifted, checked, and given the roles and layouts of the program they stand for."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.fx as fx
from torch._subclasses.fake_tensor import FakeTensorMode

from ...runtime.mesh import Mesh
from ..errors import HocketError, InputError
from ..layout import Layout, coordinate, format_layout, local_shape, parse_placement, replicated
from ..program import INTEGER_FUNCTIONS, NOTE, Note, Program, Role, RoleKind, Signature, annotate, graph_module, note, output_node
from .ranks import Lifted, Merged, RankGraphs, merge

aten = torch.ops.aten

Layouts = Mapping[str, Layout | str]
"""Role (``"param:up.weight"``) or its name alone -> layout, as placements or as text (``"S(0),R"``); else replicated."""

INTEGERS = (*INTEGER_FUNCTIONS, operator.add, operator.sub, operator.mul, operator.floordiv, operator.mod, operator.neg, min, max)


def is_aten_graph(module: object) -> bool:
    """Whether a module is a flat graph of ATen ops, to be taken as it stands; any other is called and captured."""
    if not isinstance(module, fx.GraphModule):
        return False
    calls = [node for node in module.graph.nodes if node.op not in ("placeholder", "output", "get_attr")]
    return all(n.op == "call_function" and (isinstance(n.target, torch._ops.OpOverload) or _is_python(n.target)) for n in calls)


def _is_python(target: Any) -> bool:
    return target is operator.getitem or target in INTEGERS


def has_collectives(module: fx.GraphModule) -> bool:
    """Whether ranks meet in it."""
    return any(getattr(node.target, "namespace", "") == "_c10d_functional" for node in module.graph.nodes)


@dataclass(frozen=True)
class Ports:
    """What the placeholders and results of a graph are, in its order. values: global fake tensors of the inputs."""

    inputs: tuple[Role, ...]
    outputs: tuple[Role, ...]
    values: tuple[Any, ...]


def ports_of(reference: Program) -> Ports:
    """The ports that a graph standing for ``reference`` must have: its inputs without constants, and its outputs."""
    pairs = [
        (role, node.meta["val"])
        for role, node in zip(reference.signature.inputs, reference.placeholders, strict=True)
        if role.kind is not RoleKind.CONSTANT
    ]
    return Ports(tuple(r for r, _ in pairs), reference.signature.outputs, tuple(v for _, v in pairs))


def own_ports(module: fx.GraphModule, values: Sequence[Any]) -> Ports:
    """Ports of a graph that stands for itself. values: example inputs; where there are none, those it was traced with."""
    nodes = [n for n in module.graph.nodes if n.op == "placeholder"]
    given = list(values) or [n.meta.get("val") for n in nodes]
    if len(given) != len(nodes) or any(v is None for v in given):
        raise InputError(f"the graph has {len(nodes)} inputs; expected as many example_args, found {len(values)}")
    results = _results(module.graph)
    inputs = tuple(Role(RoleKind.INPUT, f"args[{i}]") for i in range(len(nodes)))
    return Ports(inputs, tuple(Role(RoleKind.OUTPUT, f"out[{i}]") for i in range(len(results))), tuple(given))


def program_of(
    modules: Sequence[fx.GraphModule],
    ports: Ports,
    mesh: Mesh | None = None,
    layouts: Layouts | None = None,
    groups: Mapping[str, str] | None = None,
) -> Program:
    """The Program of one graph, or of one graph per rank of ``mesh``.

    groups: name of a process group in the graphs -> mesh axis. Raises InputError for graphs that change tensors in place, have
    other numbers of inputs or outputs than ``ports``, or cannot run on inputs of these shapes.
    """
    if mesh is not None and len(modules) not in (1, mesh.size):
        raise InputError(f"expected one graph, or one for each of the {mesh.size} ranks of mesh {mesh}; found {len(modules)}")
    lifted = [_lift(module, mesh, groups or {}) for module in modules]
    for rank in lifted:
        _check_ports(rank, ports)
    found = merge(lifted, mesh) if mesh is not None else Merged(lifted[0].graph, lifted[0].constants, {})
    table = _parsed(layouts or {}, ports, mesh)
    if found is not None:
        return _program(found, ports, mesh, table)
    assert mesh is not None
    each = [_program(Merged(rank.graph, rank.constants, {}), ports, mesh, table, index) for index, rank in enumerate(lifted)]
    if any(program.constants for program in each):
        raise InputError("the ranks run different ops and hold constants; make the constants inputs of the graphs")
    first = each[0]
    return RankGraphs(first.graph, first.signature, mesh, graphs=tuple(program.graph for program in each))


def _lift(module: fx.GraphModule, mesh: Mesh | None, groups: Mapping[str, str]) -> Lifted:
    """A copy of the graph with attributes as inputs at the front and groups named by mesh axes."""
    graph = fx.Graph()
    made: dict[fx.Node, fx.Node] = {}
    constants: dict[str, torch.Tensor] = {}
    for node in (n for n in module.graph.nodes if n.op == "get_attr"):
        value = _attribute(module, str(node.target))
        if isinstance(value, torch.nn.Parameter) or not isinstance(value, torch.Tensor):
            raise InputError(
                f"the graph reads the {type(value).__name__} {node.target!r} from its module; make parameters inputs of the graph"
            )
        new = made[node] = graph.placeholder(f"baked_{len(constants)}")
        constants[new.name] = value.detach()
    for node in module.graph.nodes:
        if node.op == "get_attr":
            continue
        _check_node(node)
        new = made[node] = graph.node_copy(node, lambda n: made[n])
        new.meta[NOTE] = note(node) if isinstance(node.meta.get(NOTE), Note) else Note(source=_source(node))
        if getattr(node.target, "namespace", "") == "_c10d_functional" and "wait" not in str(node.target):
            _name_group(new, mesh, groups)
    return Lifted(graph, constants)


def _attribute(module: Any, path: str) -> Any:
    for part in path.split("."):
        module = getattr(module, part)
    return module


def _source(node: fx.Node) -> str:
    lines = [line.strip() for line in str(node.meta.get("stack_trace") or "").splitlines() if line.strip()]
    return lines[-1] if lines else ""


def _check_node(node: fx.Node) -> None:
    if node.op not in ("placeholder", "output", "call_function"):
        raise InputError(f"expected a flat graph of ATen ops; found {node.op} {node.target} at {node.name}; trace it with make_fx")
    if isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable:
        raise InputError(
            f"{node.name} = {node.target} changes its input in place; make the graph functional (torch.func.functionalize) first"
        )


def _name_group(node: fx.Node, mesh: Mesh | None, groups: Mapping[str, str]) -> None:
    names = [argument.name for argument in node.target._schema.arguments]  # type: ignore[union-attr]
    place = names.index("group_name")
    name = node.args[place] if place < len(node.args) else node.kwargs["group_name"]
    if mesh is None:
        raise InputError(f"{node.name} = {node.target} joins ranks; pass mesh=, and layouts= of the inputs and outputs")
    axis = groups.get(str(name), str(name))
    if axis not in mesh.names:
        if len(mesh.names) > 1:
            raise InputError(
                f"{node.name} runs in group {name!r}, which is no axis of mesh {mesh}; name the groups of the graph so"
            )
        axis = mesh.names[0]
    if place < len(node.args):
        node.update_arg(place, axis)
    else:
        node.update_kwarg("group_name", axis)


def _results(graph: fx.Graph) -> list[Any]:
    found = output_node(graph).args[0]
    return list(found) if isinstance(found, (list, tuple)) else [found]


def _check_ports(rank: Lifted, ports: Ports) -> None:
    inputs = sum(node.op == "placeholder" for node in rank.graph.nodes) - len(rank.constants)
    outputs = len(_results(rank.graph))
    for found, roles, what in ((inputs, ports.inputs, "inputs"), (outputs, ports.outputs, "outputs")):
        if found != len(roles):
            raise InputError(
                f"the graph has {found} {what}, expected {len(roles)}: {', '.join(map(str, roles))}; "
                "without gradients pass train=False"
            )


def _parsed(layouts: Layouts, ports: Ports, mesh: Mesh | None) -> dict[Role, Layout]:
    """Every role's layout. InputError for a name that is no port, or a layout with another number of axes."""
    if mesh is None:
        if layouts:
            raise InputError("layouts say how values lie over a mesh; pass mesh= as well")
        return {}
    left = dict(layouts)
    found = {}
    for role in (*ports.inputs, *ports.outputs):
        value = layouts.get(str(role), layouts.get(role.name, replicated(mesh)))
        left.pop(str(role), None)
        left.pop(role.name, None)
        layout = tuple(map(parse_placement, value.split(","))) if isinstance(value, str) else tuple(value)
        if len(layout) != len(mesh.axes):
            raise InputError(f"layout {format_layout(layout)} of {role} needs one placement for each axis of mesh {mesh}")
        found[role] = layout
    if left:
        known = ", ".join(map(str, (*ports.inputs, *ports.outputs)))
        raise InputError(f"layouts names {', '.join(left)}, which the programs do not have; they have {known}")
    return found


def _program(merged: Merged, ports: Ports, mesh: Mesh | None, table: Mapping[Role, Layout], rank: int = 0) -> Program:
    graph = merged.graph
    names = {name: Role(RoleKind.CONSTANT, f"baked:{name}") for name in merged.constants}
    ordinary = iter(zip(ports.inputs, ports.values, strict=True))
    roles, feeds = [], []
    for node in (n for n in graph.nodes if n.op == "placeholder"):
        role, value = (names[node.name], merged.constants[node.name]) if node.name in names else next(ordinary)
        layout = None if mesh is None else merged.layouts.get(node.name, table.get(role, replicated(mesh)))
        shape = tuple(int(n) for n in value.shape)
        annotate(node, role=role, layouts=None if layout is None else (layout,), global_shapes=None if layout is None else (shape,))
        feeds.append((shape if mesh is None or layout is None else local_shape(shape, layout, mesh, rank), value))
        roles.append(role)
    signature = Signature(tuple(roles), ports.outputs)
    _declare_results(graph, ports, table)
    for node in graph.nodes:
        if not isinstance(node.meta.get(NOTE), Note):
            node.meta[NOTE] = Note()
    _propagate(graph, feeds, mesh, rank)
    constants = {names[name].name: tensor for name, tensor in merged.constants.items()}
    return Program(graph_module(graph), signature, mesh, constants=constants)


def _declare_results(graph: fx.Graph, ports: Ports, table: Mapping[Role, Layout]) -> None:
    """Each result on a node of its own that carries its layout."""
    output, results = output_node(graph), []
    for role, node in zip(ports.outputs, _results(graph), strict=True):
        if isinstance(node, fx.Node) and table:
            with graph.inserting_before(output):
                node = graph.call_function(aten.clone.default, (node,))
            node.meta[NOTE] = Note(role=role, layouts=(table[role],), source=note(node.all_input_nodes[0]).source)
        results.append(node)
    output.args = (tuple(results),)


class _Shapes(fx.Interpreter):
    """Fake values of rank 0."""

    def __init__(self, module: fx.GraphModule, where: Mapping[str, int]) -> None:
        super().__init__(module)
        self.where = where

    def run_node(self, n: fx.Node) -> Any:
        """The node's value; kept in ``meta["val"]``."""
        if n.target is coordinate:
            result: Any = self.where[str(n.args[0])]
        else:
            result = super().run_node(n)
        if n.op != "output":
            n.meta["val"] = result
        return result


def _propagate(graph: fx.Graph, feeds: Sequence[tuple[tuple[int, ...], Any]], mesh: Mesh | None, rank: int) -> None:
    module = fx.GraphModule(torch.nn.Module(), graph)
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        values = [torch.empty(shape, dtype=value.dtype, device=value.device) for shape, value in feeds]
        shown = [list(value.shape) for value in values]
        try:
            _Shapes(module, mesh.coordinate(rank) if mesh else {}).run(*values)
        except HocketError:
            raise
        except Exception as error:
            raise InputError(f"the graph does not run on inputs of shapes {shown}: {str(error).splitlines()[0]}") from error
