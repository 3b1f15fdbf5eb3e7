"""torch's loop operators ``scan`` and ``while_loop`` as chains, while a program is being captured.

    scan(f, init, xs)                      carry, y = f(carry, x) along xs                  one chain
    while_loop(cond, body, (i, *state))    integers decide how often: the steps are counted ahead, and the integers become
                                           streams 0, 1, 2, .. of the chain

Both operators hand a flat function to one helper of torch, which compiles it; while a program is traced, the helper is told to make
a chain of it instead. A ``while_loop`` whose condition reads a tensor runs as often as its values say, which no program of a fixed
shape can: it is refused, with the way out.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch._higher_order_ops.utils as operators
import torch.utils._pytree as pytree
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from ..errors import CaptureError
from .adjoint import chain
from .trace import fake_mode, is_tracing, trace_step

MOST_STEPS = 1 << 17
"""A loop that integers keep going for longer is taken for endless."""


@contextlib.contextmanager
def loop_operators() -> Iterator[None]:
    """Within this, loop operators that are called in a trace become chains; others run as always."""
    plain: Callable[..., Any] = operators._hop_compile_and_call

    def call(function: Callable[..., Any], args: Sequence[Any], kwargs: Any = None) -> Any:
        made = LOOPS.get(getattr(function, "__name__", "")) if is_tracing() else None
        return plain(function, args, kwargs) if made is None else made(*args)

    operators._hop_compile_and_call = call
    try:
        yield
    finally:
        operators._hop_compile_and_call = plain


def _scan(combine: Callable[..., Any], init: list[Tensor], xs: list[Tensor]) -> tuple[Any, Any]:
    """combine: of the leaves of a carry and of one slice; (next carry, output) as trees."""
    where = "torch's scan"
    trees: list[pytree.TreeSpec] = []

    def step(carries: list[Tensor], slices: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        carry, output = combine(*carries, *slices)
        leaves, spec = pytree.tree_flatten(carry)
        emits, tree = pytree.tree_flatten(output)
        if not all(isinstance(leaf, Tensor) for leaf in (*leaves, *emits)):
            raise CaptureError(f"{where}: the step returns a carry and an output of tensors only; found something else in them")
        trees[:] = [spec, tree]
        return leaves, emits

    body, shared = trace_step(step, init, [x[0] for x in xs], where)
    last, emits = chain(body, xs[0].shape[0], [*init, *shared, *xs])
    return pytree.tree_unflatten(last, trees[0]), pytree.tree_unflatten(emits, trees[1])


def _while_loop(cond: Callable[..., Any], body: Callable[..., Any], inputs: tuple[Any, ...], _more: tuple[Any, ...]) -> Any:
    """cond, body: of all inputs, flat; inputs: tensors and integers."""
    where = "torch's while_loop"
    flat = list(inputs)
    counters = [i for i, value in enumerate(flat) if type(value) is int]
    carried = [i for i, value in enumerate(flat) if isinstance(value, Tensor)]
    if not counters or len(counters) + len(carried) != len(flat) or not carried:
        raise CaptureError(f"{where}: {_DECIDED_BY_TENSORS}")
    trees: list[pytree.TreeSpec] = []
    columns, last = _counted(cond, body, flat, counters)
    steps = len(columns[0])
    if steps == 0:
        return tuple(flat)
    ticks = [torch.tensor(column, device=flat[carried[0]].device) for column in columns]

    def step(carries: list[Tensor], slices: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        given = _merged(flat, (carried, carries), (counters, slices))
        found, tree = pytree.tree_flatten(body(*given))
        trees.append(tree)
        return [found[i] for i in carried], []

    init = [flat[i] for i in carried]
    graph, shared = trace_step(step, init, [tick[0] for tick in ticks], where)
    final, _ = chain(graph, steps, [*init, *shared, *ticks])
    return pytree.tree_unflatten(_merged(flat, (carried, final), (counters, last)), trees[-1])


_DECIDED_BY_TENSORS = (
    "how often it runs is decided by the values of tensors, which a program of a fixed shape cannot follow. Count with a Python "
    "integer (while_loop(lambda i, x: i < n, ...)), or run a fixed number of steps with hocket.sequential and mask those that are "
    "too many"
)


def _counted(
    cond: Callable[..., Any], body: Callable[..., Any], flat: list[Any], counters: list[int]
) -> tuple[list[list[int]], list[int]]:
    """The values of every integer in each step, and after the last. Each must go on by the same amount in every step."""
    with _disable_current_modes(), fake_mode([v for v in flat if isinstance(v, Tensor)]), torch.no_grad():
        example = [torch.empty_like(v) if isinstance(v, Tensor) else v for v in flat]
        now = [flat[i] for i in counters]
        strides = _moved(body, example, counters, now)
        columns: list[list[int]] = [[] for _ in counters]
        for _ in range(MOST_STEPS):
            goes_on = cond(*_merged(example, (counters, now)))
            if isinstance(goes_on, Tensor):
                raise CaptureError(f"torch's while_loop: {_DECIDED_BY_TENSORS}")
            if not goes_on:
                break
            for column, value in zip(columns, now, strict=True):
                column.append(value)
            now = [value + stride for value, stride in zip(now, strides, strict=True)]
        else:
            raise CaptureError(f"torch's while_loop: its condition still holds after {MOST_STEPS} steps")
        for k in {0, len(columns[0]) // 2, len(columns[0]) - 1} if columns[0] else ():
            if _moved(body, example, counters, [column[k] for column in columns]) != strides:
                raise CaptureError("torch's while_loop: an integer must go on by the same amount in every step")
    return columns, now


def _moved(body: Callable[..., Any], example: list[Any], counters: list[int], now: list[int]) -> list[int]:
    """By how much one step moves each integer."""
    found = pytree.tree_leaves(body(*_merged(example, (counters, now))))
    after = [found[i] for i in counters]
    if not all(type(value) is int for value in after):
        raise CaptureError(f"torch's while_loop: {_DECIDED_BY_TENSORS}")
    return [new - old for new, old in zip(after, now, strict=True)]


def _merged(values: Sequence[Any], *parts: tuple[Sequence[int], Sequence[Any]]) -> list[Any]:
    """The values with those at some places replaced."""
    found = list(values)
    for places, new in parts:
        for place, value in zip(places, new, strict=True):
            found[place] = value
    return found


LOOPS: dict[str, Callable[..., Any]] = {"run_flattened_scan": _scan, "_while_loop_op_wrapper": _while_loop}
"""Name of the function that torch's operator hands to its helper -> what becomes of it."""
