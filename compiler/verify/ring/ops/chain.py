"""``hocket::chain`` over the ring: the loop that it means, whatever solver it names.

    c = init;   for t in range(count): c, e_t = body(c, shared, streams[t]);   (last c, e stacked)

A chain that asks for a fixed number k of Jacobi sweeps means those sweeps: all steps at once, k times, from zero. It equals the
loop on its first k steps, and so everywhere once k reaches the number of steps (contract ``EqualAfter(k)``).

A chain that says it is a layer of torch (``How.native``) may be run by torch's kernel. That the layer means the loop is checked
here, against torch's reference decomposition, whenever the chain is evaluated.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch._decomp.decompositions as torch_decompositions

from .....runtime.fixedpoint.body import Body, read_body
from .....runtime.fixedpoint.how import read_how
from .....runtime.fixedpoint.op import chain_op
from .....runtime.fixedpoint.resume import resume_op
from .....runtime.mesh import Mesh
from .....runtime.ops import overload_of
from .....runtime.templates import Site, fold
from ....errors import VerificationError
from ..algebra import Algebra
from ..equality import same
from ..value import Value

aten = torch.ops.aten
Values = Sequence[Value]


def chain(alg: Algebra, init: Values, shared: Values, streams: Values, count: int, body: str, how: str) -> list[Value]:
    """See the module."""
    step, decision = _Step(alg, read_body(body), list(shared)), read_how(how)
    slices = [[_apply(alg, aten.select.int, stream, 0, t) for stream in streams] for t in range(count)]
    sweeps = decision.sweeps
    rows = _sweeps(alg, step, init, slices, min(sweeps, count)) if sweeps else _loop(step, init, slices)
    last = rows[-1][: len(init)]
    emitted = zip(*[row[len(init) :] for row in rows], strict=True)
    if decision.native:
        check_layer(step, decision.native, init, streams[0], slices[:CHECKED_STEPS])
    return [*last, *[_apply(alg, aten.stack.default, list(column)) for column in emitted]]


CHECKED_STEPS = 3
"""Steps on which a layer is held against its loop. Both repeat one step, so what holds for these holds for any number."""


def check_layer(step: _Step, name: str, init: Values, x: Value, slices: list[list[Value]]) -> None:
    """Hold torch's reference decomposition of a layer against the loop. VerificationError where they differ."""
    from ..eager import run_eagerly  # which calls back into the table that this file is part of

    alg, rows = step.alg, _loop(step, init, slices)
    first = _apply(alg, aten.slice.Tensor, x, 0, 0, len(slices))
    expected = run_eagerly(alg, functools.partial(_layer, name), (list(init), step.shared, first), {})
    found = [*rows[-1][: len(init)], _apply(alg, aten.stack.default, [row[len(init)] for row in rows])]
    if not all(same(alg, a, b) for a, b in zip(found, expected, strict=True)):
        raise VerificationError(f"a chain says that it is torch's {name}, and does not compute the same")


def _layer(name: str, init: list[torch.Tensor], weights: list[torch.Tensor], x: torch.Tensor) -> list[torch.Tensor]:
    """One direction of one layer as torch decomposes it: (last states, first state after every step)."""
    if name == "lstm":
        output, (last, cell) = torch_decompositions.one_layer_lstm(x, init, weights, len(weights) == 4)
        return [last.reshape(init[0].shape), cell.reshape(init[1].shape), output]
    output, last = torch_decompositions.one_layer_rnn(x, init[0], weights, len(weights) == 4, _CELLS[name])
    return [last, output]


_CELLS: Mapping[str, Callable[..., Any]] = {
    "rnn_tanh": torch_decompositions.rnn_cell(torch.tanh),
    "rnn_relu": torch_decompositions.rnn_cell(torch.relu),
    "gru": torch_decompositions.gru_cell,
}


def resume(alg: Algebra, init: Values, shared: Values, streams: Values, count: int, body: str, how: str) -> list[Value]:
    """``hocket::resume``: the same loop; what is known of it, behind its streams, changes only what it costs."""
    return chain(alg, init, shared, streams[: read_body(body).streams], count, body, how)


def _loop(step: _Step, init: Values, slices: list[list[Value]]) -> list[list[Value]]:
    """(carries, emits) after every step."""
    rows, state = [], list(init)
    for inputs in slices:
        rows.append(step(state, inputs))
        state = rows[-1][: len(init)]
    return rows


def _sweeps(alg: Algebra, step: _Step, init: Values, slices: list[list[Value]], sweeps: int) -> list[list[Value]]:
    """The same after some Jacobi sweeps; the emits are those of the states of the last sweep."""
    zeros = [_apply(alg, aten.zeros_like.default, first) for first in init]
    states = [list(init), *[zeros] * (len(slices) - 1)]
    after: list[list[Value]] = []
    for _ in range(sweeps):
        after = [step(state, inputs)[: len(init)] for state, inputs in zip(states, slices, strict=True)]
        states = [list(init), *after[:-1]]
    rows = [step(state, inputs) for state, inputs in zip(states, slices, strict=True)]
    place = {slot: i for i, slot in enumerate(step.body.following)}
    emits = [(place.get(slot), len(init) + i) for i, slot in enumerate(step.body.emits)]
    return [[*own, *[row[i] if state is None else own[state] for state, i in emits]] for own, row in zip(after, rows, strict=True)]


class _Step:
    """One step of a body over the ring."""

    def __init__(self, alg: Algebra, body: Body, shared: list[Value]) -> None:
        self.alg, self.body, self.shared = alg, body, shared
        self.site = Site.of(Mesh((("one", 1),)), 0)

    def __call__(self, carries: Values, slices: Values) -> list[Value]:
        values: dict[int, Value] = dict(enumerate([*carries, *self.shared, *slices]))

        def decode(template: Any) -> Any:
            if isinstance(template, dict) and "slot" in template:
                return values[template["slot"]]
            if isinstance(template, list):
                return [decode(item) for item in template]
            return fold(template, self.site)

        for call in self.body.calls:
            kwargs = {name: decode(value) for name, value in call.kwargs.items()}
            result = _apply(self.alg, overload_of(call.op), *map(decode, call.args), **kwargs)
            if call.spread:
                values.update((slot, result[i]) for i, slot in enumerate(call.outputs) if slot >= 0)
            else:
                values[call.outputs[0]] = result
        return [values[slot] for slot in (*self.body.following, *self.body.emits)]


def _apply(alg: Algebra, op: Any, *args: Value, **kwargs: Value) -> Any:
    from ..evaluate import apply  # evaluate looks ops up in the table that this file is part of

    return apply(alg, op, args, kwargs)


def is_chain(op: torch._ops.OpOverload) -> bool:
    """Whether an op is a chain or resumes one, whose meaning is asked for even where no floating point value enters it."""
    return op.namespace == "hocket" and op in (chain_op(), resume_op())


CHAIN: Mapping[Any, Callable[..., Any]] = {chain_op().overloadpacket: chain, resume_op().overloadpacket: resume}
