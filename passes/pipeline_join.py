"""Join the parts of a pipeline into one program again: all forwards, the backwards in reverse, weight gradients, the optimizer."""

from __future__ import annotations

import dataclasses

import torch
import torch.fx as fx

from ..compiler.program import NOTE, Phase, Program, Role, RoleKind, annotate, check_program, graph_module, note
from ..compiler.stages import ONCE, PartKind, Pipeline, StagePart

HELD = frozenset({RoleKind.VALUE, RoleKind.GRADIENT})
"""Kinds of a part's inputs that are no inputs of the step."""


def in_order(pipeline: Pipeline) -> list[StagePart]:
    """The parts as one micro-batch runs them."""
    last_first = list(reversed(pipeline.stages))
    parts = [part for stage in pipeline.stages for part in stage.of(PartKind.FORWARD)]
    parts += [part for stage in last_first for part in stage.of(PartKind.BACKWARD_INPUT)]
    parts += [part for stage in last_first for part in stage.of(PartKind.BACKWARD_WEIGHT)]
    parts += [part for stage in pipeline.stages for part in stage.of(PartKind.SHARE)]
    return parts + [part for stage in pipeline.stages for part in stage.of(PartKind.OPTIMIZER)]


def join(pipeline: Pipeline) -> Program:
    """One program with the signature of ``pipeline.program``, made of the parts alone: what they compute and what they hand on."""
    return _Join(pipeline).run()


class _Join:
    def __init__(self, pipeline: Pipeline) -> None:
        self.pipeline = pipeline
        self.graph = fx.Graph()
        self.inputs: dict[Role, fx.Node] = {}
        self.values: dict[str, fx.Node] = {}
        self.sums: dict[Role, fx.Node] = {}
        self.results: dict[Role, fx.Node] = {}

    def run(self) -> Program:
        original = self.pipeline.program
        for role, node in zip(original.signature.inputs, original.placeholders, strict=True):
            self.inputs[role] = self.graph.node_copy(node)
        for part in in_order(self.pipeline):
            self._inline(part)
        found = {**self.sums, **self.results}
        self.graph.output(tuple(found.get(role) for role in original.signature.outputs))
        joined = original.replace(graph=graph_module(self.graph))
        check_program(joined)
        return joined

    def _inline(self, part: StagePart) -> None:
        made: dict[fx.Node, fx.Node] = {}
        for role, node in zip(part.program.signature.inputs, part.program.placeholders, strict=True):
            made[node] = self._input(role)
        for node in part.program.nodes:
            if node.op == "call_function":
                made[node] = self.graph.node_copy(node, made.__getitem__)
        for role, result in zip(part.program.signature.outputs, part.program.results, strict=True):
            assert result is not None, "a part gives only what exists"
            if role.kind is RoleKind.VALUE:
                self.values[role.name] = made[result]
            elif role.kind is RoleKind.GRADIENT and part.kind not in ONCE:
                self.sums[role] = self._sum(self.sums[role], made[result]) if role in self.sums else made[result]
            else:
                self.results[role] = made[result]

    def _input(self, role: Role) -> fx.Node:
        if role.kind is RoleKind.VALUE:
            return self.values[role.name]
        return self.sums[role] if role.kind is RoleKind.GRADIENT else self.inputs[role]

    def _sum(self, one: fx.Node, other: fx.Node) -> fx.Node:
        """The gradients of two stages added: the reduction of a tied group."""
        node = self.graph.call_function(torch.ops.aten.add.Tensor, (one, other))
        node.meta.update(other.meta)
        node.meta[NOTE] = dataclasses.replace(note(other), role=None, origin="")
        annotate(node, phase=Phase.BACKWARD_WEIGHT, added_by="pipeline")
        return node
