"""The backward of a chain is a chain, run from the end: never differentiation through the iterations of a solver.

    c[t+1], e[t] = f(c[t], s, x[t])
    d[t] = (df/dc)^T (d[t+1], de[t])        the adjoint's carry, linear in d
    dx[t] = (df/dx)^T (d[t+1], de[t])       given out by each step
    ds    = sum over t of (df/ds)^T (...)   a second carry that only adds up

The vector-Jacobian product of one step is traced once. What it recomputes of the forward step does not depend on d, so it is later
hoisted out of the chain and done for all steps at once; the next state itself is not recomputed but taken from the forward run.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.fx as fx
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import _disable_current_modes

from ...runtime.fixedpoint.how import How
from ..program import output_node
from ..rules.decompose import exact_decompositions
from .bodies import BodyGraph, chain_op
from .trace import fake_mode

SEQUENTIAL = How("sequential")
"""Chains are born as loops; the pass decides otherwise."""


@dataclass(frozen=True)
class ChainCall:
    """A chain that is being traced. body: of one step, its emits those of the user."""

    body: BodyGraph
    count: int

    @functools.cached_property
    def with_states(self) -> BodyGraph:
        """The same body, giving out the next carries as well."""
        body = self.body.copy()
        output_node(body.graph).args = ((tuple(body.following), (*body.emits, *body.following)),)
        return body


def chain(body: BodyGraph, count: int, tensors: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """One chain node in the trace around this call, differentiable.

    tensors: init, shared, streams. Returns (last carries, emits).
    """
    call = ChainCall(body, count)
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        found = list(ChainFunction.apply(call, *tensors))  # type: ignore[no-untyped-call]
    else:
        found = run(body, count, tensors)
    return found[: body.carries], found[body.carries :]


def run(body: BodyGraph, count: int, tensors: Sequence[Tensor], how: How = SEQUENTIAL) -> list[Tensor]:
    """The chain op itself."""
    start, streams = body.carries, body.carries + body.shared
    groups = (list(tensors[:start]), list(tensors[start:streams]), list(tensors[streams:]))
    return list(chain_op()(*groups, count, body.data().to_json(), how.to_json()))


class ChainFunction(torch.autograd.Function):
    """A chain whose backward is the adjoint chain."""

    @staticmethod
    def forward(ctx: Any, call: ChainCall, *tensors: Tensor) -> tuple[Tensor, ...]:
        """(last carries, emits)."""
        body = call.body
        found = run(call.with_states, call.count, tensors)
        kept = body.carries + len(body.emits)
        ctx.call = call
        ctx.save_for_backward(*tensors, *found[kept:])
        for tensor in found[:kept]:
            if not tensor.is_floating_point():
                ctx.mark_non_differentiable(tensor)
        return tuple(found[:kept])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        """Gradients of init, shared and streams."""
        call: ChainCall = ctx.call
        body = call.body
        inputs = len(body.placeholders)
        tensors, states = list(ctx.saved_tensors[:inputs]), list(ctx.saved_tensors[inputs:])
        wanted = [i for i, t in enumerate(tensors) if t.is_floating_point()]
        return None, *_pulled_back(call, tensors, states, gradients, wanted)


def _pulled_back(
    call: ChainCall, tensors: list[Tensor], states: list[Tensor], gradients: Sequence[Tensor | None], wanted: list[int]
) -> list[Tensor | None]:
    body = call.body
    carries, shared = body.carries, body.shared
    init, streams = tensors[:carries], tensors[carries + shared :]
    live = [i for i in range(carries) if init[i].is_floating_point()]
    emitted = [i for i, g in enumerate(gradients[carries:]) if g is not None and body.emits[i].meta["val"].is_floating_point()]
    adjoint = adjoint_body(call.with_states, live, emitted)
    before = [torch.cat([first[None], after[:-1]]) for first, after in zip(init, states, strict=True)]
    given = [gradients[carries + i] for i in emitted]
    backwards = [t.flip(0) for t in (*before, *states, *streams, *given) if t is not None]
    starts = [_or_zeros(gradients[i], init[i]) for i in live]
    summed = [i for i in wanted if carries <= i < carries + shared]
    zeros = [torch.zeros_like(tensors[i]) for i in summed]
    found = run(adjoint, call.count, [*starts, *zeros, *tensors[carries : carries + shared], *backwards])
    results: list[Tensor | None] = [None] * len(tensors)
    for i, value in zip([*live, *summed], found, strict=False):
        results[i] = value
    for i, value in zip([i for i in wanted if i >= carries + shared], found[len(live) + len(summed) :], strict=True):
        results[i] = value.flip(0)
    return results


def _or_zeros(gradient: Tensor | None, like: Tensor) -> Tensor:
    return torch.zeros_like(like) if gradient is None else gradient


def adjoint_body(body: BodyGraph, live: Sequence[int], emitted: Sequence[int]) -> BodyGraph:
    """The adjoint of one step.

    body: one whose emits end with its next carries; live: the carries that have a gradient; emitted: the emits that are given one.
    Inputs: gradients of the live carries, sums of the gradients of the floating shared values; the shared values; then per step
    the carries before, the carries after, the streams, the gradients of the emits. Emits: gradients of the floating streams.
    """
    examples = [n.meta["val"] for n in body.placeholders]
    mode = fake_mode(examples)
    carries, shared = body.carries, body.shared
    step = body.function()
    after = [n.meta["val"] for n in body.following]
    floating = [i for i, e in enumerate(examples) if e.is_floating_point()]
    sums = [i for i in floating if carries <= i < carries + shared]
    pulled = [*live, *sums, *[i for i in floating if i >= carries + shared]]
    forms = [body.emits[i].meta["val"] for i in emitted]

    def pull(deltas: list[Tensor], totals: list[Tensor], inputs: list[Tensor], gradients: list[Tensor]) -> Any:
        def of_some(*some: Tensor) -> tuple[Any, ...]:
            whole = list(inputs)
            for i, value in zip(pulled, some, strict=True):
                whole[i] = value
            new, emits = step(*whole)
            return tuple([new[i] for i in live] + [emits[i] for i in emitted])

        linearised: tuple[Any, Any] = torch.func.vjp(of_some, *[inputs[i] for i in pulled])  # type: ignore[assignment]
        outputs, vjp = linearised
        found = vjp((*deltas, *gradients))
        moved = list(found[: len(live)])
        added = [total + part for total, part in zip(totals, found[len(live) : len(live) + len(sums)], strict=True)]
        return (*moved, *added, *found[len(live) + len(sums) :], *outputs[: len(live)])

    with _disable_current_modes(), mode:
        fresh = [torch.empty_like(e) for e in examples]
        deltas, totals = [torch.empty_like(examples[i]) for i in live], [torch.empty_like(examples[i]) for i in sums]
        traced = make_fx(pull, decomposition_table=exact_decompositions())(
            deltas, totals, fresh, [torch.empty_like(f) for f in forms]
        )
        return _arranged(traced, body, len(live), len(sums), [torch.empty_like(a) for a in after])


def _arranged(traced: fx.GraphModule, body: BodyGraph, deltas: int, sums: int, after: list[Tensor]) -> BodyGraph:
    """The traced vjp with its inputs in a body's order, and the recomputed next carries taken as inputs."""
    graph = traced.graph
    inputs = [n for n in graph.nodes if n.op == "placeholder"]
    first = deltas + sums
    original = inputs[first : first + len(body.placeholders)]
    before, rest = original[: body.carries], original[body.carries :]
    shared, streams = rest[: body.shared], rest[body.shared :]
    found = list(output_node(graph).args[0])  # type: ignore[arg-type]
    new, emits, recomputed = found[:first], found[first : len(found) - deltas], found[len(found) - deltas :]
    with graph.inserting_after(inputs[-1]):
        states = [graph.placeholder(f"after_{i}") for i in range(len(after))]
    for node, form in zip(states, after, strict=True):
        node.meta["val"] = form
    anchor = next(n for n in graph.nodes if n.op != "placeholder")
    for node in (*inputs[:first], *shared, *before, *states, *streams, *inputs[first + len(original) :]):
        anchor.prepend(node)
    output_node(graph).args = ((tuple(new), tuple(emits)),)
    live = [i for i, p in enumerate(body.carry_inputs) if p.meta["val"].is_floating_point()]
    for i, node in zip(live, recomputed, strict=True):
        if node.op == "call_function":
            node.replace_all_uses_with(states[i])
    for node in [n for n in graph.nodes if n.op == "call_function" and n.target in _SAME]:
        node.replace_all_uses_with(node.args[0])
        graph.erase_node(node)
    graph.eliminate_dead_code(is_impure_node=lambda node: node.op in ("placeholder", "output"))
    return BodyGraph(graph, first, body.shared)


_SAME = (torch.ops.aten.detach.default, torch.ops.aten.alias.default)
