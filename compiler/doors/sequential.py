"""``hocket.sequential(step)(state, xs)``: a recurrence, said to be one.

Called outside a capture it is the plain Python loop, so a model that uses it stays an ordinary module. While hocket captures the
model it becomes one node, however many steps there are, which ``tactics=[hocket.Jacobi()]`` may then solve in parallel.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor

from ..chains.adjoint import chain
from ..chains.trace import is_tracing, tensors_of, trace_step
from ..errors import InputError

Step = Callable[[Any, Any], tuple[Any, Any]]


def sequential(step: Step) -> Callable[[Any, Any], tuple[Any, Any]]:
    """The function ``(state, xs) -> (last state, outputs)`` that applies ``step(state, x) -> (next state, output)`` along ``xs``.

    state: a tensor or a tree of tensors, whose shapes and dtypes stay the same from step to step. xs: a tensor or a tree of tensors
    of shape [T, ...]; ``step`` sees one slice of each. outputs: what the steps returned, stacked to [T, ...]. The step may close
    over parameters and other tensors; it must not draw random numbers (pass them in ``xs``) or change its inputs in place.

    Raises InputError for xs of different lengths or none, and CaptureError, while a model is being captured, for a step that
    cannot be one node.
    """
    if not callable(step):
        raise InputError(f"expected a function step(state, x) -> (next state, output); found {step!r}")

    def along(state: Any, xs: Any) -> tuple[Any, Any]:
        streams, spec = _streams(xs)
        if is_tracing():
            return _traced(step, state, streams, spec)
        return _looped(step, state, streams, spec)

    return along


def _streams(xs: Any) -> tuple[list[Tensor], pytree.TreeSpec]:
    streams, spec = pytree.tree_flatten(xs)
    if not streams or not all(isinstance(x, Tensor) and x.dim() > 0 for x in streams):
        raise InputError("expected xs to be a tensor [T, ...] or a tree of such; found something else in it, or nothing")
    lengths = {x.shape[0] for x in streams}
    if len(lengths) != 1 or 0 in lengths:
        raise InputError(f"expected all of xs to have the same first dimension T >= 1; found {sorted(lengths)}")
    return streams, spec


def _pair(found: Any) -> tuple[Any, Any]:
    if not isinstance(found, tuple) or len(found) != 2:
        raise InputError(f"expected step to return (next state, output); found {type(found).__name__}")
    return found


def _looped(step: Step, state: Any, streams: list[Tensor], spec: pytree.TreeSpec) -> tuple[Any, Any]:
    rows, tree = [], None
    for slices in zip(*[stream.unbind(0) for stream in streams], strict=True):
        state, output = _pair(step(state, pytree.tree_unflatten(slices, spec)))
        leaves, tree = pytree.tree_flatten(output)
        rows.append(leaves)
    assert tree is not None
    return state, pytree.tree_unflatten([torch.stack(column) for column in zip(*rows, strict=True)], tree)


def _traced(step: Step, state: Any, streams: list[Tensor], spec: pytree.TreeSpec) -> tuple[Any, Any]:
    where = f"hocket.sequential({getattr(step, '__qualname__', type(step).__name__)})"
    carries, state_spec = tensors_of(state, where)
    trees: list[pytree.TreeSpec] = []

    def flat(before: list[Tensor], slices: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        found = _pair(step(pytree.tree_unflatten(before, state_spec), pytree.tree_unflatten(slices, spec)))
        after, after_spec = tensors_of(found[0], where)
        if after_spec != state_spec:
            raise InputError(f"{where}: the state keeps its form; it goes in as {state_spec} and comes out as {after_spec}")
        emits, tree = pytree.tree_flatten(found[1])
        trees.append(tree)
        return after, emits

    body, shared = trace_step(flat, carries, [stream[0] for stream in streams], where)
    last, emits = chain(body, streams[0].shape[0], [*carries, *shared, *streams])
    return pytree.tree_unflatten(last, state_spec), pytree.tree_unflatten(emits, trees[-1])
