"""Build the program of one part of a stage from the nodes that belong to it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import torch
import torch.fx as fx

from ..compiler.program import NOTE, Program, Role, RoleKind, Signature, annotate, check_program, graph_module, note
from ..compiler.stages import PartKind, StagePart, Value
from .backward_split_costs import is_alias, work_of


def is_inlined(node: fx.Node) -> bool:
    """Whether every part that reads a node makes it anew: views, and the integers that tell ranks of a lowered program apart."""
    return is_alias(node) or (node.op == "call_function" and isinstance(node.meta.get("val"), int))


@dataclass
class Draft:
    """A part in the making. nodes: what it computes, in order; results: what it gives, by role."""

    kind: PartKind
    stage: int
    piece: int = 0
    nodes: list[fx.Node] = field(default_factory=list)
    results: dict[Role, fx.Node] = field(default_factory=dict)

    def reads(self) -> list[fx.Node]:
        """Values of other parts and inputs of the step that it needs, views looked through, in order of first use."""
        own = set(self.nodes)
        found: dict[fx.Node, None] = {}
        seen: set[fx.Node] = set()
        stack = [*reversed(list(self.results.values())), *reversed([s for node in self.nodes for s in node.all_input_nodes])]
        while stack:
            node = stack.pop()
            if node in own or node in seen:
                continue
            seen.add(node)
            if is_inlined(node):
                stack.extend(reversed(node.all_input_nodes))
            else:
                found[node] = None
        return list(found)


def value_of(node: fx.Node) -> Value:
    """The description of a node's value."""
    value = node.meta["val"]
    assert isinstance(value, torch.Tensor), f"{node.name} has several results and cannot pass between parts as one value"
    shape = tuple(int(size) for size in value.shape)
    return Value(node.name, shape, value.dtype, _own_stride(value, shape))


def _own_stride(value: torch.Tensor, shape: Sequence[int]) -> tuple[int, ...]:
    """The strides of a tensor, gaps included, or contiguous ones where its elements share memory: kernels choose by strides."""
    strides = tuple(int(stride) for stride in value.stride())
    expected = 1
    for dim in sorted(range(len(shape)), key=lambda dim: (strides[dim], shape[dim])):
        if shape[dim] > 1:
            if strides[dim] < expected:
                return contiguous(shape)
            expected = strides[dim] * shape[dim]
    return strides


def contiguous(shape: Sequence[int]) -> tuple[int, ...]:
    """Row-major strides."""
    strides, step = [], 1
    for size in reversed(shape):
        strides.append(step)
        step *= max(size, 1)
    return tuple(reversed(strides))


def build(draft: Draft, program: Program, role_of: Callable[[fx.Node], Role]) -> StagePart:
    """The part. role_of: what a node that the part reads is to it: an input of the step, or a value."""
    reads = sorted(draft.reads(), key=lambda node: node.op != "placeholder")
    graph = fx.Graph()
    made: dict[fx.Node, fx.Node] = {}
    roles = [role_of(node) for node in reads]
    for node, role in zip(reads, roles, strict=True):
        made[node] = graph.placeholder(f"{role.kind}_{node.name}")
        made[node].meta.update(node.meta)
        made[node].meta[NOTE] = dataclasses.replace(note(node), role=role)

    def copied(node: fx.Node) -> fx.Node:
        if node not in made:
            assert is_inlined(node), f"{node.name} is read before it is made"
            made[node] = graph.node_copy(node, copied)
        return made[node]

    for node in draft.nodes:
        made[node] = graph.node_copy(node, copied)
    results = [copied(node) for node in draft.results.values()]
    graph.output(tuple(results))
    for node in graph.nodes:
        if node.op == "call_function":
            annotate(node, stage=draft.stage)
    constants = {role.name: program.constants[role.name] for role in roles if role.kind is RoleKind.CONSTANT}
    signature = Signature(inputs=tuple(roles), outputs=tuple(draft.results))
    new = Program(graph_module(graph), signature, mesh=program.mesh, constants=constants, sizes=program.sizes)
    check_program(new)
    works = [work_of(node) for node in graph.nodes if node.op == "call_function" and isinstance(node.target, torch._ops.OpOverload)]
    flops, moved = sum(float(w.flops) for w in works), sum(float(w.bytes_moved) for w in works)
    return StagePart(new, draft.kind, draft.stage, draft.piece, (), flops, moved)


def groups_of(nodes: Sequence[fx.Node]) -> list[list[fx.Node]]:
    """The nodes that hang together (through views too), each group and the groups among themselves in order."""
    owner: dict[fx.Node, fx.Node] = {node: node for node in nodes}

    def root(node: fx.Node) -> fx.Node:
        while owner[node] is not node:
            owner[node] = owner[owner[node]]
            node = owner[node]
        return node

    def bases(sources: Iterable[fx.Node]) -> Iterable[fx.Node]:
        for source in sources:
            if source in owner:
                yield source
            elif is_alias(source):
                yield from bases(source.all_input_nodes)

    for node in nodes:
        for source in bases(node.all_input_nodes):
            owner[root(node)] = root(source)
    found: dict[fx.Node, list[fx.Node]] = {}
    for node in nodes:
        found.setdefault(root(node), []).append(node)
    return list(found.values())
