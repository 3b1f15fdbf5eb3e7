"""From a raw trace to the flat functional graph of a Program.

1. placeholders in the order of the signature, constant tensors as inputs of their own;
2. if any op changes a tensor in place, the flat graph is run once more under ``torch.func.functionalize``, which leaves changes of
   inputs as trailing ``copy_``; those become UPDATE outputs;
3. ``detach``, ``alias`` and ``lift_fresh_copy`` say nothing in a functional graph and go; so does what no output needs.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.fx as fx
from torch._subclasses import FakeTensorMode
from torch.fx._lazy_graph_module import _LazyGraphModule, _use_lazy_graph_module
from torch.fx.experimental.proxy_tensor import get_proxy_mode, make_fx

from ..errors import CaptureError
from ..program import NOTE, Note, Phase, Role, RoleKind, ancestors, note, output_node
from .trace import Raw

_aten = torch.ops.aten
_ORDER = [
    RoleKind.PARAM,
    RoleKind.BUFFER,
    RoleKind.INPUT,
    RoleKind.STATE,
    RoleKind.SEED,
    RoleKind.CONSTANT,
    RoleKind.TANGENT,
]
_IDENTITIES = (
    _aten.detach.default,
    _aten.alias.default,
    _aten.lift_fresh_copy.default,
    _aten.lift_fresh.default,
    _aten.lift.default,
)
_KEPT = (RoleKind.PARAM, RoleKind.BUFFER, RoleKind.INPUT, RoleKind.STATE, RoleKind.TANGENT)


@dataclass
class Flat:
    """A graph with its roles; ``constants`` are the values of the CONSTANT inputs."""

    graph: fx.Graph
    inputs: list[Role]
    outputs: list[Role]
    constants: dict[str, torch.Tensor]


def flatten(raw: Raw, mode: FakeTensorMode) -> Flat:
    """The flat functional graph of a trace. Raises CaptureError where a closed-over tensor is trained or changed."""
    flat = _ordered(raw, mode)
    if any(mutates(node) for node in flat.graph.nodes):
        flat = _functional(flat, mode)
    flat = _simplified(flat)
    _finish_notes(flat.graph)
    return flat


def mutates(node: fx.Node) -> bool:
    """True for an op that changes a tensor in place."""
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable


def _ordered(raw: Raw, mode: FakeTensorMode) -> Flat:
    """Placeholders first and in order; a get_attr node of a constant becomes a placeholder. Changes the trace's own graph."""
    graph = raw.graph.graph
    constants, attributes = _constants(raw.graph)
    anchor = next(node for node in graph.nodes if node.op != "placeholder")
    entries = [(raw.inputs[node.name], node) for node in graph.nodes if node.op == "placeholder"]
    with graph.inserting_before(anchor):
        made = {name: graph.placeholder(name) for name in constants}
    for name, node in made.items():
        node.meta["val"] = mode.from_tensor(constants[name].detach(), static_shapes=True)
        entries.append((Role(RoleKind.CONSTANT, name), node))
    entries.sort(key=lambda entry: _ORDER.index(entry[0].kind))
    for node in list(graph.nodes):
        if node.op == "get_attr":
            node.replace_all_uses_with(made[attributes[str(node.target)]])
            graph.erase_node(node)
        elif node.op not in ("placeholder", "call_function", "output"):
            raise CaptureError(f"cannot capture {note(node).source}: the trace holds a {node.op} node; use plain tensor ops there")
    anchor = next(node for node in graph.nodes if node.op not in ("placeholder", "get_attr"))
    for role, node in entries:
        anchor.prepend(node)
        _name_input(node, role)
    results = output_node(graph)
    results.args = (tuple(results.args[0]),)  # type: ignore[arg-type]
    return Flat(graph, [role for role, _ in entries], list(raw.outputs), constants)


def _name_input(node: fx.Node, role: Role) -> None:
    node._rename(identifier(role))
    node.target = node.name
    node.meta[NOTE] = Note(role=role)


def _constants(module: fx.GraphModule) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """name -> value of the constants that are used, each tensor once; attribute of the traced module -> its constant."""
    names: dict[int, str] = {}
    values: dict[str, torch.Tensor] = {}
    attributes: dict[str, str] = {}
    for node in module.graph.nodes:
        if node.op != "get_attr":
            continue
        value = operator.attrgetter(str(node.target))(module)
        if not isinstance(value, torch.Tensor):
            raise CaptureError(
                f"cannot capture {_source_of(node)}: it runs a nested graph ({node.target}); use plain tensor ops there"
            )
        if value.requires_grad:
            raise CaptureError(
                f"cannot capture {_source_of(node)}: it uses a tensor of shape {tuple(value.shape)} that needs a gradient but is "
                "neither a parameter nor an input; register it as nn.Parameter, or pass it as an argument"
            )
        name = names.setdefault(id(value), f"constant{len(names)}")
        values[name] = value
        attributes[str(node.target)] = name
    return values, attributes


def _source_of(node: fx.Node) -> str:
    return next((note(user).source for user in node.users if note(user).source), note(node).source) or "the model"


def lazy_module(graph: fx.Graph) -> fx.GraphModule:
    """A GraphModule whose Python code is only written when somebody asks for it."""
    return _LazyGraphModule(torch.nn.Module(), graph)


def identifier(role: Role) -> str:
    """A node name for an input."""
    return re.sub(r"\W+", "_", f"{role.kind.value}_{role.name}").strip("_")


class _Replay(fx.Interpreter):
    """Runs a graph and puts each node's note on whatever nodes its run creates in the graph being traced."""

    def __init__(self, module: fx.GraphModule, target: fx.Graph) -> None:
        super().__init__(module, garbage_collect_values=True)
        self.created = target

    def run_node(self, n: fx.Node) -> Any:
        last = next(iter(reversed(self.created.nodes)), None)
        result = super().run_node(n)
        for node in reversed(self.created.nodes):
            if node is last:
                break
            node.meta.setdefault(NOTE, note(n))
        return result


def _functional(flat: Flat, mode: FakeTensorMode) -> Flat:
    """The same graph without in-place ops; changed inputs come out as UPDATE outputs."""
    module = lazy_module(flat.graph)
    placeholders = [n for n in flat.graph.nodes if n.op == "placeholder"]
    absent = [x is None for x in output_node(flat.graph).args[0]]  # type: ignore[union-attr]

    def run(*values: torch.Tensor) -> list[torch.Tensor]:
        proxy_mode = get_proxy_mode()
        assert proxy_mode is not None
        results = _Replay(module, proxy_mode.tracer.graph).run(*values, enable_io_processing=False)
        return [value for value, missing in zip(results, absent, strict=True) if not missing]

    wrapped: Callable[..., Any] = torch.func.functionalize(run, remove="mutations")
    with mode, torch.no_grad(), _use_lazy_graph_module(True):  # noqa: FBT003
        traced = make_fx(lambda *values: wrapped(*values))(*[_fresh(n.meta["val"]) for n in placeholders])
    roles = dict(zip([n for n in traced.graph.nodes if n.op == "placeholder"], flat.inputs, strict=True))
    results = iter(output_node(traced.graph).args[0])  # type: ignore[arg-type]
    values: list[Any] = [None if missing else next(results) for missing in absent]
    outputs = list(flat.outputs)
    for node in [n for n in traced.graph.nodes if mutates(n)]:
        _to_update(node, roles, outputs, values)
    output_node(traced.graph).args = (tuple(values),)
    for node, role in roles.items():
        _name_input(node, role)
    return Flat(traced.graph, flat.inputs, outputs, flat.constants)


def _fresh(value: torch.Tensor) -> torch.Tensor:
    return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=value.device)


def _to_update(node: fx.Node, roles: dict[fx.Node, Role], outputs: list[Role], values: list[Any]) -> None:
    """One trailing ``copy_(input, value)``."""
    base = node.args[0]
    role = roles.get(base) if isinstance(base, fx.Node) else None
    source = next((note(n).source for n in (node, *node.all_input_nodes) if note(n).source), "the model")
    if node.target is not _aten.copy_.default or role is None:
        raise CaptureError(f"cannot capture {source}: {node.target} changes a tensor in a way that cannot be made functional")
    if role.kind is RoleKind.CONSTANT:
        raise CaptureError(
            f"cannot capture {source}: it changes a tensor that is neither a buffer nor an input; "
            "use register_buffer, so that the change has a place to go"
        )
    update = Role(RoleKind.UPDATE, role.name)
    if update in outputs:
        values[outputs.index(update)] = node.args[1]
    else:
        outputs.append(update)
        values.append(node.args[1])
    node.replace_all_uses_with(node.args[1])  # type: ignore[arg-type]
    node.graph.erase_node(node)


def _simplified(flat: Flat) -> Flat:
    """Without identities, dead code, unused constants and seeds, and updates that change nothing."""
    graph = flat.graph
    for node in list(graph.nodes):
        same = _same_value(node)
        if same is not None:
            node.replace_all_uses_with(same)
            graph.erase_node(node)
    placeholders = [n for n in graph.nodes if n.op == "placeholder"]
    roles = dict(zip(placeholders, flat.inputs, strict=True))
    results = output_node(graph)
    pairs = list(zip(flat.outputs, results.args[0], strict=True))  # type: ignore[arg-type]
    pairs = [(role, value) for role, value in pairs if not (role.kind is RoleKind.UPDATE and _is_input(value, role, roles))]
    results.args = (tuple(value for _, value in pairs),)
    live = ancestors([value for _, value in pairs if isinstance(value, fx.Node)])
    for node in reversed(list(graph.nodes)):
        droppable = node.op == "call_function" or (node.op == "placeholder" and roles[node].kind not in _KEPT)
        if node not in live and droppable:
            graph.erase_node(node)
            roles.pop(node, None)
    inputs = [roles[n] for n in placeholders if n in roles]
    constants = {role.name: flat.constants[role.name] for role in inputs if role.kind is RoleKind.CONSTANT}
    return Flat(graph, inputs, [role for role, _ in pairs], constants)


def _same_value(node: fx.Node) -> fx.Node | None:
    """The node that has this one's value: the input of an identity, the source of a copy that converts nothing."""
    if node.op != "call_function":
        return None
    if node.target in _IDENTITIES:
        return node.args[0]  # type: ignore[return-value]
    if node.target is _aten.copy.default and isinstance(node.args[1], fx.Node):
        mine, source = node.meta["val"], node.args[1].meta["val"]
        if (mine.shape, mine.stride(), mine.dtype, mine.device) == (source.shape, source.stride(), source.dtype, source.device):
            return node.args[1]
    return None


def _is_input(value: Any, role: Role, roles: dict[fx.Node, Role]) -> bool:
    source = roles.get(value) if isinstance(value, fx.Node) else None
    return source is not None and source.name == role.name


def _finish_notes(graph: fx.Graph) -> None:
    """Origins, phases and sources that the trace could not give: autograd's own sums and getitems take those of their inputs."""
    for node in graph.nodes:
        if node.op == "output":
            continue
        found, heir = note(node), note(node)
        if node.op == "call_function" and (not found.source or found.phase is Phase.FORWARD):
            sources = [note(n) for n in node.all_input_nodes]
            if not found.source:
                heir = next((n for n in sources if n.source), found)
            phase = next((n.phase for n in sources if n.phase is not Phase.FORWARD), found.phase)
        else:
            phase = found.phase
        node.meta[NOTE] = Note(found.role, phase, heir.region, heir.source, heir.module, origin=node.name)
