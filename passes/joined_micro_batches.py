"""Weight gradients of several micro-batches by one product over all their rows (the concatenated backward-p2 of 2BP, 2405.18047).

    sum_m  left_m right_m    ==    [left_1 .. left_n] [right_1; ..; right_n]

A pipeline adds up a weight's gradient micro-batch by micro-batch. Written as a program over the factors that its stages hold, that
sum is one that ``JoinProducts`` rewrites: it states the bound of the reordering, and the pass manager proves the rest. The factors
of a micro-batch are kept until the last one of its group, so it costs memory. It pays where a micro-batch is too small to use the
processor well; it is asked for (``PipelineParallel(joined=4)``), never chosen by itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.fx as fx
from torch._subclasses.fake_tensor import FakeTensorMode

from ..compiler.contract import Context
from ..compiler.program import Decision, Note, Phase, Program, Role, RoleKind, Signature, annotate, graph_module, note
from ..compiler.stages import PartKind, Pipeline, StageProgram
from .backward_split_choice import base_of
from .backward_split_costs import Costs, stored_bytes
from .joined_products import JoinProducts

aten = torch.ops.aten

NAME = "join-micro-batches"

SMALL = (3, 4, 5)
"""Rows, columns and inner size of the products of a proof: the identity does not depend on them."""


@dataclass(frozen=True)
class Product:
    """A weight gradient that is one product which nobody else reads. stage, piece: of the part that makes it."""

    parameter: str
    node: fx.Node
    stage: int
    piece: int

    @property
    def factors(self) -> tuple[fx.Node, fx.Node]:
        """What is multiplied."""
        left, right = self.node.args
        assert isinstance(left, fx.Node), "factors are computed"
        assert isinstance(right, fx.Node), "factors are computed"
        return left, right

    @property
    def sizes(self) -> tuple[int, int, int]:
        """Rows, columns, inner size, of one micro-batch."""
        left, right = (factor.meta["val"].shape for factor in self.factors)
        return int(left[0]), int(right[1]), int(left[1])

    def held(self) -> int:
        """Bytes that its factors keep in memory."""
        return sum(stored_bytes(node) for node in {base_of(factor): None for factor in self.factors})


def products_of(pipeline: Pipeline) -> Iterator[Product]:
    """All of them, stage by stage."""
    for stage in pipeline.stages:
        yield from products_of_stage(stage)


def products_of_stage(stage: StageProgram) -> Iterator[Product]:
    """Those of one stage."""
    for part in stage.of(PartKind.BACKWARD_WEIGHT):
        for role, node in zip(part.program.signature.outputs, part.program.results, strict=True):
            if role.kind is RoleKind.GRADIENT and node is not None and is_product(node):
                yield Product(role.name, node, part.stage, part.piece)


def is_product(node: fx.Node) -> bool:
    """Whether a gradient is one product that nothing else reads."""
    return node.target is aten.mm.default and len(node.users) == 1


def accumulation(parameter: str, sizes: tuple[int, int, int], count: int, like: fx.Node | None = None) -> Program:
    """The gradient of a parameter as micro-batches add it up, over their factors. like: the product whose type it has."""
    rows, columns, inner = sizes
    dtype = like.meta["val"].dtype if like is not None else torch.float32
    known = note(like) if like is not None else Note()
    graph, roles, pairs = fx.Graph(), list[Role](), list[tuple[fx.Node, fx.Node]]()
    with FakeTensorMode():
        forms = (torch.empty(rows, inner, dtype=dtype), torch.empty(inner, columns, dtype=dtype))
        result = torch.empty(rows, columns, dtype=dtype)

    def taken(role: Role, name: str, form: torch.Tensor) -> fx.Node:
        roles.append(role)
        node = graph.placeholder(name)
        node.meta["val"] = form
        annotate(node, role=role)
        return node

    taken(Role(RoleKind.PARAM, parameter), "parameter", result)  # nobody reads it; the result is its gradient
    for m in range(count):
        named = [(Role(RoleKind.INPUT, f"{side} factor of micro-batch {m}"), f"{side}_{m}") for side in ("left", "right")]
        left, right = (taken(role, name, form) for (role, name), form in zip(named, forms, strict=True))
        pairs.append((left, right))
    total: Any = None
    for pair_ in pairs:
        product = graph.call_function(aten.mm.default, pair_)
        total = product if total is None else graph.call_function(aten.add.Tensor, (total, product))
        for made in {product, total}:
            made.meta["val"] = result
            annotate(made, phase=Phase.BACKWARD_WEIGHT, source=known.source, module=known.module)
    graph.output((total,))
    signature = Signature(inputs=tuple(roles), outputs=(Role(RoleKind.GRADIENT, parameter),))
    return Program(graph_module(graph), signature)


def joining() -> JoinProducts:
    """The rewrite of an accumulation, whatever its size."""
    return JoinProducts(least=2, columns=1 << 62)


def decisions_of(pipeline: Pipeline, count: int, context: Context) -> tuple[Decision, ...]:
    """For every weight gradient of a pipeline: joined, with the bound and the bytes; or why not."""
    found: list[Decision] = []
    costs = Costs(context.cluster)
    joined = {(one.stage, one.parameter): one for one in products_of(pipeline)}
    for stage in pipeline.stages:
        for part in stage.of(PartKind.BACKWARD_WEIGHT):
            for role, node in zip(part.program.signature.outputs, part.program.results, strict=True):
                if role.kind is not RoleKind.GRADIENT or node is None:
                    continue
                product = joined.get((part.stage, role.name))
                if product is None:
                    reason = "no product of two factors of its own: added up micro-batch by micro-batch"
                    found.append(Decision(NAME, role.name, applied=False, reason=reason, source=note(node).source))
                    continue
                made = joining()(accumulation(role.name, product.sizes, count, node), context)
                (said,) = (decision for decision in made.decisions if decision.by == JoinProducts.name)
                copied = count * sum(_bytes(factor) for factor in product.factors)
                gain = -copied * costs.seconds_per_byte()
                reason = f"{said.reason}; {product.held():,} bytes of a micro-batch are kept until {count} are there"
                found.append(Decision(NAME, role.name, applied=True, reason=reason, gain=gain, source=note(node).source))
    return tuple(found)


def _bytes(node: fx.Node) -> int:
    value = node.meta["val"]
    return int(value.numel()) * int(value.element_size())
