"""Leave padding out of what works on each token by itself (DRCE of EnergonAI, arXiv 2209.02341; ByteTransformer, arXiv 2210.03052).

    f(x)[r] = g(x[r])      =>      f(x)[chosen] = f(x[chosen])             rows r = tokens, chosen = those that are valid

Linear layers, norms, activations and residuals of a batch [B, S, ...] run on T rows, the valid tokens first; what works across
tokens (attention) gets its batch back, with zeros where nothing was computed. Masked attention does not see the difference. T is
fixed when the pass runs, so shapes stay static: a call may have at most T valid tokens. Rows that are left over are filled with
padding, computed as before. Results are zero at padding, whether the pass was applied or not.
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.fx as fx
from torch._subclasses import FakeTensorMode

from ..compiler.contract import Context, Spec
from ..compiler.errors import InputError
from ..compiler.program import Decision, Note, Phase, Program, RoleKind, annotate, copy_program, graph_module, note, output_node
from .backward_split_costs import Costs
from .packed_rows import PackedRows, packable
from .token_axes import Axes, Grid, shape_of, token_axes

aten = torch.ops.aten
NAME = "packed-tokens"


@dataclass(frozen=True)
class PackedTokens:
    """Compute per-token work on ``capacity`` rows of B S.

    mask: name of the input [B, S], integer or bool, that is nonzero where a token is valid; capacity: the most valid tokens that a
    call has; least_gain: apply where that share of the forward's predicted time is saved. The contract is the program with its
    results set to zero at padding, on calls of at most ``capacity`` valid tokens.
    """

    mask: str
    capacity: int
    least_gain: float = 0.03

    @property
    def name(self) -> str:
        """Of the pass."""
        return NAME

    @property
    def contract(self) -> Spec:
        """See the class."""
        return Spec(self.reference)

    def reference(self, program: Program) -> Program:
        """The program with zeros at padding in every result that has tokens."""
        copy, _ = copy_program(program)
        grid = self._grid(copy)
        _blank(copy, token_axes(copy, grid), copy.input_node(RoleKind.INPUT, self.mask))
        return copy

    def __call__(self, program: Program, context: Context) -> Program:
        """The program on packed rows, or as it was, with the decision and the predicted gain.

        InputError for a program with a backward, a mask that is none, or a capacity that is no number of tokens of the batch.
        """
        ready = self.reference(program)
        grid = self._grid(program)
        axes = token_axes(ready, grid)
        chosen = packable(ready, axes)
        if not chosen:
            return ready.decided(self._decision(ready, None, "no linear layer works on tokens whose place in the batch is known"))
        packed = _write(ready, axes, chosen, (grid, self.mask, self.capacity))
        costs = Costs(context.cluster)
        before, after = (sum(costs.seconds(node) for node in one.nodes) for one in (ready, packed))
        gain = before - after
        share = f"{self.capacity} of {grid.tokens} tokens ({self.capacity / grid.tokens:.0%})"
        text = f"{len(chosen)} calls on {share}: predicted {before * 1e3:.3f} -> {after * 1e3:.3f} ms"
        if gain < self.least_gain * before:
            reason = f"{text}, less than {self.least_gain:.0%} to gain"
            return ready.decided(self._decision(ready, gain, reason))
        return packed.decided(self._decision(ready, gain, text, applied=True))

    def _decision(self, program: Program, gain: float | None, reason: str, *, applied: bool = False) -> Decision:
        mask = program.input_node(RoleKind.INPUT, self.mask)
        return Decision(NAME, mask.name, applied, reason, gain, note(mask).source)

    def _grid(self, program: Program) -> Grid:
        names = program.signature.inputs_of(RoleKind.INPUT)
        if self.mask not in names:
            raise InputError(f"the mask of packed tokens is an input; found no {self.mask!r} among {sorted(names)}")
        value = program.input_node(RoleKind.INPUT, self.mask).meta["val"]
        if value.dim() != 2 or value.is_floating_point() or value.shape[1] < 2:
            raise InputError(
                f"the mask of packed tokens is an integer or bool tensor [rows, positions]; {self.mask!r} is "
                f"{value.dtype}{list(value.shape)}"
            )
        if any(node.op == "call_function" and note(node).phase is not Phase.FORWARD for node in program.nodes):
            raise InputError("packed tokens are for inference: capture the model without gradients (requires_grad_(False))")
        grid = Grid(int(value.shape[0]), int(value.shape[1]))
        if not 1 <= self.capacity <= grid.tokens:
            raise InputError(f"the capacity is between 1 and the {grid.tokens} tokens of the batch; found {self.capacity}")
        return grid


def _blank(program: Program, axes: dict[fx.Node, Axes], mask: fx.Node) -> None:
    """Set results to zero at padding. Changes ``program``."""
    output = output_node(program.graph.graph)
    writer = Writer(program.graph.graph, note(output))
    results: list[fx.Node | None] = []
    with program.graph.graph.inserting_before(output):
        for result in program.results:
            at = axes.get(result) if result is not None else None
            results.append(result if result is None or at is None else _zeroed(writer, result, at, mask))
    output.args = (tuple(results),)
    program.graph.recompile()


def _zeroed(writer: Writer, result: fx.Node, at: Axes, mask: fx.Node) -> fx.Node:
    shape = [1] * len(shape_of(result))
    for dim in at.dims:
        shape[dim] = shape_of(result)[dim]
    source = writer.call(aten.t.default, mask) if at.row > at.position >= 0 else mask
    padding = writer.call(aten.reshape.default, writer.call(aten.eq.Scalar, source, 0), shape)
    return writer.call(aten.masked_fill.Scalar, result, padding, 0, like=note(result))


def _write(program: Program, axes: dict[fx.Node, Axes], chosen: set[fx.Node], how: tuple[Grid, str, int]) -> Program:
    """The program with the chosen calls on packed rows."""
    grid, mask, capacity = how
    graph = fx.Graph()
    made: dict[fx.Node, fx.Node] = {}
    writer = Writer(graph, Note())
    rows: PackedRows | None = None
    for node in program.nodes:
        if node.op == "call_function" and rows is None:
            at = made[program.input_node(RoleKind.INPUT, mask)]
            rows = PackedRows(writer, grid, _order(writer, at, grid.tokens, capacity), axes, made)
        if node in chosen:
            assert rows is not None
            rows.call(node)
        elif node.op == "output":
            assert rows is not None
            graph.output(tuple(None if r is None else rows.whole(r) for r in program.results)).meta.update(node.meta)
        else:
            if rows is not None:
                for source in node.all_input_nodes:
                    rows.whole(source)
            made[node] = graph.node_copy(node, made.__getitem__)
    graph.eliminate_dead_code()
    return program.replace(graph=graph_module(graph))


def _order(writer: Writer, mask: fx.Node, tokens: int, capacity: int) -> fx.Node:
    """The tokens to compute: those that are valid, in their order, then the first ones that are not."""
    valid = writer.call(aten.ne.Scalar, writer.call(aten.reshape.default, mask, [tokens]), 0)
    flags = writer.call(aten._to_copy.default, valid, dtype=torch.uint8)
    ordered = writer.call(aten.sort.stable, flags, stable=True, dim=0, descending=True)
    places = writer.element(ordered, 1)
    return writer.call(aten.slice.Tensor, places, 0, 0, capacity)


@dataclass
class Writer:
    """Adds calls to a graph, with their values' descriptions and whose line they are for."""

    graph: fx.Graph
    like: Note
    mode: FakeTensorMode = dataclasses.field(default_factory=lambda: FakeTensorMode(allow_non_fake_inputs=True))

    def call(self, target: Any, *args: Any, like: Note | None = None, **kwargs: Any) -> fx.Node:
        """One call. like: the note of the call it stands for."""
        node = self.graph.create_node("call_function", target, args, kwargs)
        values, named = fx.node.map_arg((args, kwargs), lambda one: one.meta["val"])
        modes = [v.fake_mode for v in _leaves(values) if hasattr(v, "fake_mode")]
        with modes[0] if modes else self.mode:
            node.meta["val"] = target(*values, **named)
        known = like or self.like
        annotate(node, source=known.source, module=known.module, phase=Phase.FORWARD, region=known.region, added_by=NAME)
        return node

    def element(self, call: fx.Node, index: int) -> fx.Node:
        """One of several results."""
        node = self.graph.create_node("call_function", operator.getitem, (call, index))
        node.meta["val"] = call.meta["val"][index]
        annotate(node, source=note(call).source, module=note(call).module, phase=Phase.FORWARD, added_by=NAME)
        return node


def _leaves(values: Sequence[Any]) -> list[Any]:
    return [leaf for value in values for leaf in (_leaves(value) if isinstance(value, (list, tuple)) else [value])]
