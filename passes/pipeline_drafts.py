"""Which nodes make up each part of each stage, after placement.

g = (a_0 + b_2) + c_2        gradient of a weight that stages 0 and 2 read
stage 0 gives a_0, stage 2 gives b_2 + c_2; they are added once a step rather than sent for each micro-batch
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping

import torch
import torch.fx as fx

from ..compiler.errors import InputError
from ..compiler.program import Phase, Program, Role, RoleKind, ancestors, annotate, note, tensor_inputs
from ..compiler.stages import PartKind
from .backward_split_choice import base_of
from .backward_split_normal import is_backward
from .pipeline_finish import draft_finish, optimizer_nodes, updated_parameter
from .pipeline_parts import Draft, groups_of, is_inlined
from .pipeline_place import Placement, kind_of

_BY = "pipeline"


def gradients_of(program: Program) -> dict[str, fx.Node]:
    """Name of a parameter or input -> the node of its gradient, as it is accumulated over micro-batches. What the optimizer's phase
    makes of it (its sum over replicas, the update) reads an input of role GRADIENT instead.

    Raises InputError for an optimizer that needs several gradients for one parameter, unless the program also returns its
    gradients: from their names it is known which is which.
    """
    found = {
        role.name: _accumulated(node)
        for role, node in zip(program.signature.outputs, program.results, strict=True)
        if role.kind is RoleKind.GRADIENT and node is not None
    }
    known = set(found.values())
    for role, node in zip(program.signature.outputs, program.results, strict=True):
        if role.kind is not RoleKind.UPDATE or node is None or note(node).phase is not Phase.OPTIMIZER:
            continue
        read = {source for one in optimizer_nodes(node) for source in one.all_input_nodes if is_backward(source)} - known
        if len(read) > 1:
            raise InputError(
                f"the update of {role.name} reads {len(read)} gradients; in a pipeline a parameter is updated from its own alone"
            )
        for source in read:
            found.setdefault(updated_parameter(program, role), source)
    for name, source in found.items():
        readers = [user for user in source.users if user.op == "call_function" and note(user).phase is Phase.OPTIMIZER]
        if readers:
            _detach(program, name, source, readers)
    return found


def _accumulated(gradient: fx.Node) -> fx.Node:
    """What one micro-batch contributes to a gradient: without the steps of the optimizer's phase behind it.

    Where several gradients are summed as one (``SumInBuckets``), piece i of the sum is made of piece i of what is summed.
    """
    node, place = gradient, 0
    while node.op == "call_function" and note(node).phase is Phase.OPTIMIZER:
        if node.target is operator.getitem:
            source, place = node.args[0], node.args[1]  # type: ignore[assignment]
        elif node.target is torch.ops.aten.cat.default:
            source = tensor_inputs(node)[place]
        else:
            source = node.all_input_nodes[0]
        assert isinstance(source, fx.Node), "a step of the optimizer's phase behind a gradient reads a node"
        node = source
    return node


def _detach(program: Program, name: str, gradient: fx.Node, readers: Iterable[fx.Node]) -> None:
    first = next(iter(program.graph.graph.nodes))
    with program.graph.graph.inserting_before(first):
        given = program.graph.graph.placeholder(f"accumulated_{gradient.name}")
    given.meta.update(gradient.meta)
    annotate(given, role=Role(RoleKind.GRADIENT, name), phase=Phase.OPTIMIZER)
    for reader in readers:
        reader.replace_input_with(gradient, given)


def draft_parts(program: Program, placement: Placement, gradients: Mapping[str, fx.Node], pieces: Mapping[str, int]) -> list[Draft]:
    """All parts of all stages. Changes ``program``, a fresh copy: what a stage needs of its own is copied or added."""
    stages = dict(placement.stages)
    given = {name: _contributions(node, stages, placement.count) for name, node in gradients.items()}
    results = [
        (role, node)
        for role, node in zip(program.signature.outputs, program.results, strict=True)
        if node is not None and role.kind is not RoleKind.GRADIENT and note(base_of(node)).phase is not Phase.OPTIMIZER
    ]
    roots = [node for _, node in results] + [node for by_stage in given.values() for node in by_stage.values()]
    _own_copies(placement, stages, roots)
    drafts = _collect(program, stages, roots, pieces)
    for role, node in results:
        _draft_of(base_of(node), drafts, placement.count).results[role] = node
    for name, by_stage in given.items():
        for stage, node in by_stage.items():
            draft = _draft_of(base_of(node), drafts, stage + 1, PartKind.BACKWARD_INPUT)
            draft.results[Role(RoleKind.GRADIENT, name)] = node
    _complete(drafts, placement.count, has_backward=bool(gradients))
    owners = {name: min(by_stage) for name, by_stage in given.items()}
    finishing = draft_finish(program, owners)
    return sorted([*drafts.values(), *finishing], key=lambda draft: (draft.stage, "FIWSO".index(draft.kind), draft.piece))


Drafts = dict[tuple[int, PartKind, int], Draft]


def _contributions(gradient: fx.Node, stages: dict[fx.Node, int], count: int) -> dict[int, fx.Node]:
    """Stage -> the share of a gradient that is made there."""
    by_stage: dict[int, fx.Node] = {}
    for leaf in _terms(gradient, stages, top=True):
        stage = stages.get(base_of(leaf), count - 1)
        if stage in by_stage:
            by_stage[stage] = _sum(by_stage[stage], leaf, gradient)
            stages[by_stage[stage]] = stage
        else:
            by_stage[stage] = leaf
    return by_stage


def _terms(node: fx.Node, stages: dict[fx.Node, int], *, top: bool) -> list[fx.Node]:
    """The terms of a sum over several stages, in order; the node itself where it is no such sum."""
    if node.target is not torch.ops.aten.add.Tensor or node.kwargs or not (top or len(node.users) == 1):
        return [node]
    if not all(isinstance(arg, fx.Node) and is_backward(arg) for arg in node.args):
        return [node]
    terms = [term for arg in node.args for term in _terms(arg, stages, top=False)]  # type: ignore[arg-type]
    return terms if len({stages.get(base_of(term)) for term in terms}) > 1 else [node]


def _sum(left: fx.Node, right: fx.Node, like: fx.Node) -> fx.Node:
    graph = like.graph
    with graph.inserting_before(like):
        node = graph.call_function(torch.ops.aten.add.Tensor, (left, right))
    node.meta.update(like.meta)
    annotate(node, phase=_later(note(base_of(left)).phase, note(base_of(right)).phase), added_by=_BY)
    return node


def _later(one: Phase, other: Phase) -> Phase:
    return Phase.BACKWARD_WEIGHT if Phase.BACKWARD_WEIGHT in (one, other) else Phase.BACKWARD_INPUT


def _own_copies(placement: Placement, stages: dict[fx.Node, int], roots: list[fx.Node]) -> None:
    """Give every stage its own copy of the portable nodes it needs, at the first phase that needs them there."""
    copies = _Copies(set(placement.portable), stages)
    needed = ancestors(roots)
    placed = [node for node in stages if node in needed]
    for phase in (Phase.FORWARD, Phase.BACKWARD_INPUT, Phase.BACKWARD_WEIGHT):
        for node in placed:
            if note(node).phase is phase:
                copies.adopt(node, stages[node], phase)
    for root in roots:
        copies.local(base_of(root), 0, Phase.FORWARD)


class _Copies:
    """Copies of portable nodes (and of views of them) by stage; ``stages`` learns where each of them is."""

    def __init__(self, portable: set[fx.Node], stages: dict[fx.Node, int]) -> None:
        self.portable = portable
        self.stages = stages
        self.made: dict[tuple[fx.Node, int], fx.Node] = {}

    def adopt(self, node: fx.Node, stage: int, phase: Phase) -> None:
        """Let a node read the copies of its stage."""
        for source in node.all_input_nodes:
            new = self.local(source, stage, phase)
            if new is not source:
                node.replace_input_with(source, new)

    def local(self, node: fx.Node, stage: int, phase: Phase) -> fx.Node:
        """The value of a node at a stage: the node itself unless it is portable and belongs to another stage."""
        if node.op == "placeholder" or not (is_inlined(node) or node in self.portable) or self.stages.get(node) == stage:
            return node
        if (node, stage) not in self.made:
            self.made[node, stage] = self._view(node, stage, phase) if is_inlined(node) else self._call(node, stage, phase)
        return self.made[node, stage]

    def _view(self, node: fx.Node, stage: int, phase: Phase) -> fx.Node:
        inputs = {source: self.local(source, stage, phase) for source in node.all_input_nodes}
        return node if all(source is new for source, new in inputs.items()) else self._copy(node, inputs, phase)

    def _call(self, node: fx.Node, stage: int, phase: Phase) -> fx.Node:
        if node not in self.stages:  # nobody has it yet
            self.adopt(node, stage, phase)
            annotate(node, phase=phase)
            self.stages[node] = stage
            return node
        new = self._copy(node, {source: self.local(source, stage, phase) for source in node.all_input_nodes}, phase)
        self.portable.add(new)
        self.stages[new] = stage
        return new

    def _copy(self, node: fx.Node, inputs: dict[fx.Node, fx.Node], phase: Phase) -> fx.Node:
        with node.graph.inserting_after(node):  # its inputs' copies stand behind its inputs, so before it
            new = node.graph.node_copy(node, inputs.__getitem__)
        annotate(new, phase=phase, added_by=_BY)
        return new


def _collect(program: Program, stages: dict[fx.Node, int], roots: list[fx.Node], pieces: Mapping[str, int]) -> Drafts:
    """The calls that results need, by stage and part; weight gradients that hang together stay in one piece."""
    needed = ancestors(roots)
    drafts: Drafts = {}
    weights: dict[int, list[fx.Node]] = {}
    for node in program.nodes:
        if node not in stages or node not in needed:
            continue
        if kind_of(node) is PartKind.BACKWARD_WEIGHT:
            weights.setdefault(stages[node], []).append(node)
        else:
            key = (stages[node], kind_of(node), 0)
            drafts.setdefault(key, Draft(key[1], key[0])).nodes.append(node)
    for stage, nodes in weights.items():
        wanted: dict[int, list[fx.Node]] = {}
        for group in groups_of(nodes):
            wanted.setdefault(max(pieces.get(node.name, 0) for node in group), []).extend(group)
        for piece, number in enumerate(sorted(wanted)):
            key = (stage, PartKind.BACKWARD_WEIGHT, piece)
            drafts[key] = Draft(key[1], stage, piece, wanted[number])
    return drafts


def _draft_of(node: fx.Node, drafts: Drafts, count: int, default: PartKind = PartKind.FORWARD) -> Draft:
    """The part that makes a value; for one that is an input, that of the last stage."""
    for draft in drafts.values():
        if node in draft.nodes:
            return draft
    key = (count - 1, default, 0)
    return drafts.setdefault(key, Draft(default, key[0]))


def _complete(drafts: Drafts, count: int, *, has_backward: bool) -> None:
    """Every stage has a forward, and in training an I part, if only to hand values on."""
    for stage in range(count):
        for kind in (PartKind.FORWARD, PartKind.BACKWARD_INPUT) if has_backward else (PartKind.FORWARD,):
            drafts.setdefault((stage, kind, 0), Draft(kind, stage))
