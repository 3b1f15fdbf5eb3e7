"""The one intermediate form: a flat, functional ATen FX graph of a step, its signature, and a typed note on every node.

A ``Program`` obeys these invariants (``check_program`` enforces them after every pass):

1. The graph is flat: placeholders, ``call_function`` nodes and one output. No ``get_attr``, no submodules: constant tensors are
   inputs of role CONSTANT, repeated blocks are marked by ``Note.region``.
2. ``call_function`` targets are ATen/prims overloads without mutation, ``_c10d_functional`` collectives (groups are mesh-axis
   names), ``operator.getitem``, hocket's own functional ops, and the rank-dependent integers of ``layout``.
3. ``signature.inputs`` names every placeholder in order, ``signature.outputs`` every element of the flat output tuple in order
   (an element may be None where a gradient does not exist).
4. Every node carries ``meta["val"]`` (fake tensors) and a ``Note``. In a logical program ``val`` is the global value; in a lowered
   one (``mesh`` set) it is the piece of rank 0, and ``Note.layouts`` says how the pieces make the global value.
"""

from __future__ import annotations

import dataclasses
import enum
import operator
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import sympy
import torch
import torch.fx as fx
from torch.fx._lazy_graph_module import _LazyGraphModule
from torch.utils._pytree import TreeSpec

from ..runtime.mesh import Mesh
from .errors import HocketError
from .layout import Layout, coordinate, local_offset, local_size, padded_size, padding

NOTE = "hocket"
"""The only key of ours in ``node.meta``."""

INTEGER_FUNCTIONS = (coordinate, local_offset, local_size, padded_size, padding)
"""Rank-dependent integers that may stand in a lowered graph."""


class RoleKind(enum.StrEnum):
    """What a placeholder or an output is to the user."""

    PARAM = "param"
    BUFFER = "buffer"
    INPUT = "input"
    TANGENT = "tangent"  # dL/d(output of that name), given from outside
    STATE = "state"  # optimizer state, named "exp_avg:layers.0.weight"
    SEED = "seed"  # int64 scalar behind the random numbers of the step
    CONSTANT = "constant"  # value in Program.constants
    VALUE = "value"  # handed from one part of a step to another, inside a pipeline
    OUTPUT = "output"
    GRADIENT = "gradient"  # dL/d(param or input of that name)
    UPDATE = "update"  # new value of the param, buffer, state or input of that name


@dataclass(frozen=True)
class Role:
    """kind and name. Parameters and buffers have their qualified name; inputs and outputs their path, as in ``args[0]['x']``."""

    kind: RoleKind
    name: str

    def __str__(self) -> str:
        return f"{self.kind}:{self.name}"


class Phase(enum.StrEnum):
    """When a node runs. Capture knows FORWARD, BACKWARD_INPUT and OPTIMIZER; the backward split sets BACKWARD_WEIGHT."""

    FORWARD = "forward"
    BACKWARD_INPUT = "backward-input"
    BACKWARD_WEIGHT = "backward-weight"
    OPTIMIZER = "optimizer"


@dataclass(frozen=True)
class Region:
    """A repeated block: ``pattern`` such as ``layers.*`` and which copy of it."""

    pattern: str
    copy: int


@dataclass(frozen=True)
class Note:
    """What hocket knows of a node.

    source: the user's line, ``"model.py:41 self.o(h)"`` (backward nodes carry that of their forward node); module: qualified name
    of the submodule that ran it; layouts: per output of the node, None for outputs that are not tensors; origin: name of the node
    of the captured program that this one stands for, "" for nodes added by a pass; added_by: name of the pass that added it;
    shapes: per output, its global sizes as expressions of the program's named sizes, where capture knows them; global_shapes: per
    output of a node of a lowered program, the sizes of the value that the pieces make (None where the node holds no whole value);
    carries: in a lowered program, the name of the logical node whose value this one holds, in whichever layout.
    """

    role: Role | None = None
    phase: Phase = Phase.FORWARD
    region: Region | None = None
    source: str = ""
    module: str = ""
    layouts: tuple[Layout | None, ...] | None = None
    stage: int | None = None
    origin: str = ""
    added_by: str = ""
    shapes: tuple[tuple[sympy.Expr, ...] | None, ...] | None = None
    global_shapes: tuple[tuple[int, ...] | None, ...] | None = None
    carries: str = ""


def note(node: fx.Node) -> Note:
    """The note of a node; an empty one if no pass has written it."""
    found = node.meta.get(NOTE)
    return found if isinstance(found, Note) else Note()


def annotate(node: fx.Node, **changes: Any) -> Note:
    """Replace fields of a node's note and return the new one."""
    node.meta[NOTE] = new = dataclasses.replace(note(node), **changes)
    return new


@dataclass(frozen=True)
class Literal:
    """A leaf of the user's inputs or outputs that is no tensor: baked into the program."""

    value: object


@dataclass(frozen=True)
class Signature:
    """How the user's call maps onto the flat graph.

    inputs, outputs: roles in graph order. in_spec: tree of ``(args, kwargs)``; in_leaves: per leaf of it, the index into ``inputs``
    or a Literal. out_spec, out_leaves: the same for what the user's function returns, with indices into ``outputs``. tied: other
    names of a parameter or buffer -> the one in ``inputs``. A differentiable OUTPUT has a TANGENT input of the same name.
    """

    inputs: tuple[Role, ...]
    outputs: tuple[Role, ...]
    in_spec: TreeSpec | None = None
    in_leaves: tuple[int | Literal, ...] = ()
    out_spec: TreeSpec | None = None
    out_leaves: tuple[int | Literal, ...] = ()
    tied: Mapping[str, str] = field(default_factory=dict)

    def inputs_of(self, kind: RoleKind) -> dict[str, int]:
        """name -> position, for the inputs of one kind."""
        return {role.name: i for i, role in enumerate(self.inputs) if role.kind is kind}

    def outputs_of(self, kind: RoleKind) -> dict[str, int]:
        """name -> position, for the outputs of one kind."""
        return {role.name: i for i, role in enumerate(self.outputs) if role.kind is kind}


@dataclass(frozen=True)
class Decision:
    """One candidate that a pass looked at.

    gain: predicted seconds saved per step (negative: lost), None where it has no meaning.
    """

    by: str
    node: str
    applied: bool
    reason: str
    gain: float | None = None
    source: str = ""


@dataclass(frozen=True)
class Program:
    """A step, or a part of one. Passes map Program to Program and never change one in place.

    mesh: None for a logical program (global shapes), set once lowered to local shapes. constants: values of the CONSTANT inputs.
    sizes: named sizes of the inputs, such as ``{"B": 8, "S": 128}``.
    """

    graph: fx.GraphModule
    signature: Signature
    mesh: Mesh | None = None
    decisions: tuple[Decision, ...] = ()
    constants: Mapping[str, torch.Tensor] = field(default_factory=dict)
    sizes: Mapping[str, int] = field(default_factory=dict)

    @property
    def nodes(self) -> list[fx.Node]:
        """All nodes in order."""
        return list(self.graph.graph.nodes)

    @property
    def placeholders(self) -> list[fx.Node]:
        """The inputs, in the order of ``signature.inputs``."""
        return [n for n in self.graph.graph.nodes if n.op == "placeholder"]

    @property
    def results(self) -> list[fx.Node | None]:
        """The flat outputs, in the order of ``signature.outputs``."""
        return list(output_node(self.graph.graph).args[0])  # type: ignore[arg-type]

    def input_node(self, kind: RoleKind, name: str) -> fx.Node:
        """The placeholder of one role; KeyError when absent."""
        return self.placeholders[self.signature.inputs_of(kind)[name]]

    def replace(self, **changes: Any) -> Program:
        """A copy with some fields changed."""
        return dataclasses.replace(self, **changes)

    def decided(self, *decisions: Decision) -> Program:
        """A copy with more decisions recorded."""
        return self.replace(decisions=self.decisions + decisions)


def output_node(graph: fx.Graph) -> fx.Node:
    """The single output node of a graph."""
    return cast(fx.Node, next(n for n in reversed(graph.nodes) if n.op == "output"))


def tensor_leaves(value: object) -> list[Any]:
    """Flat outputs of a node from its ``meta["val"]``: a tensor, or the elements of a tuple/list (None kept)."""
    return list(value) if isinstance(value, (tuple, list)) else [value]


def tensor_inputs(node: fx.Node) -> list[fx.Node]:
    """The tensor-valued arguments in order of appearance in (args, kwargs), repeats kept. Rules are written over this list."""
    found: list[fx.Node] = []
    fx.node.map_arg((node.args, node.kwargs), lambda m: found.append(m))
    return [m for m in found if isinstance(m.meta.get("val"), torch.Tensor)]


def producer(node: fx.Node) -> tuple[fx.Node, int]:
    """The node that computes a tensor and which of its outputs it is: looks through ``getitem``."""
    if node.target is operator.getitem:
        source, index = node.args
        return cast(fx.Node, source), cast(int, index)
    return node, 0


def ancestors(nodes: Iterable[fx.Node]) -> set[fx.Node]:
    """Some nodes and everything that they are computed from."""
    found: set[fx.Node] = set()
    pending = list(nodes)
    while pending:
        node = pending.pop()
        if node not in found:
            found.add(node)
            pending.extend(node.all_input_nodes)
    return found


def graph_module(graph: fx.Graph) -> fx.GraphModule:
    """A module around a graph whose Python code is only generated when somebody asks for it (passes never do)."""
    return _LazyGraphModule(torch.nn.Module(), graph)


def copy_program(program: Program) -> tuple[Program, dict[fx.Node, fx.Node]]:
    """A deep copy of the graph (notes are immutable and shared) and the map from old nodes to new ones."""
    graph = fx.Graph()
    mapping: dict[fx.Node, fx.Node] = {}
    for old in program.graph.graph.nodes:
        mapping[old] = graph.node_copy(old, lambda n: mapping[n])
    graph.lint()
    return program.replace(graph=graph_module(graph)), mapping


def check_program(program: Program) -> None:
    """Raise HocketError naming the first broken invariant of this module's docstring (a bug in a pass, not in the user's model)."""
    signature = program.signature
    placeholders, results = program.placeholders, program.results
    if len(placeholders) != len(signature.inputs):
        raise HocketError(f"{len(placeholders)} placeholders but the signature names {len(signature.inputs)} inputs")
    if len(results) != len(signature.outputs):
        raise HocketError(f"{len(results)} results but the signature names {len(signature.outputs)} outputs")
    for node in program.nodes:
        problem = _problem(node)
        if problem:
            raise HocketError(f"{node.format_node()}: {problem} (from {note(node).source or 'unknown source'})")
    program.graph.graph.lint()


def _problem(node: fx.Node) -> str:
    if node.op not in ("placeholder", "call_function", "output"):
        return f"a program holds no {node.op} nodes"
    if node.op == "output":
        return ""
    if "val" not in node.meta:
        return "meta['val'] is missing"
    if not isinstance(node.meta.get(NOTE), Note):
        return "the note is missing"
    target = node.target
    if node.op == "call_function" and isinstance(target, torch._ops.OpOverload) and target._schema.is_mutable:
        return "the op mutates its input"
    return ""
