"""``hocket::chain``: a whole recurrence as one functional op, which every executor runs like any other.

    chain(Tensor[] init, Tensor[] shared, Tensor[] streams, int count, str body, str how) -> Tensor[]

    c = init;   for t in range(count): c, e_t = body(c, shared, streams[t]);   returns the last c, then the e stacked: [count,
    *shape]

That loop is the op's meaning, whatever ``how`` says; ``how`` names the solver and the exactness class (``how.How``), and may ask
for a fixed number of Jacobi sweeps, after which the first so many steps are exact.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from ..errors import ProgramError
from ..own_ops import define_op
from .body import read_body
from .decide import decided
from .how import How, read_how
from .native import check_native
from .newton import newton, shooting
from .report import RECENT
from .solvers import Solved, Stop, blocks, jacobi, loop, windows
from .steps import Chain

SCHEMA = "chain(Tensor[] init, Tensor[] shared, Tensor[] streams, int count, str body, str how) -> Tensor[]"
DEFAULT_WINDOW = 32


@functools.cache
def chain_op() -> torch._ops.OpOverload:
    """The op, defined in torch by the first call."""
    return define_op(SCHEMA, solve, chain_shapes)


def solve(
    init: Sequence[Tensor], shared: Sequence[Tensor], streams: Sequence[Tensor], count: int, body: str, how: str
) -> list[Tensor]:
    """See the module. ProgramError for a body that is none, or inputs that do not fit it."""
    chain, decision = chain_of(init, shared, streams, count, body), read_how(how)
    if decision.native:
        check_native(chain.body, decision.native)
    with torch.no_grad():  # steps write in place
        if decision.solver in ("sequential", "gauss-seidel") and not decision.sweeps:
            return chain.loop_emits()
        solved = run_solver(chain, decision)
        RECENT.append(solved.report)
        if solved.results is not None:
            return solved.results
        return [*[states[-1] for states in solved.trajectory], *chain.emits(solved.trajectory)]


def run_solver(chain: Chain, how: How) -> Solved:
    """Solve a chain as ``how`` says."""
    if how.solver == "auto" and not how.sweeps:
        return decided(chain, how)
    stop = Stop([how.tolerance(first.dtype) for first in chain.init])
    window = min(how.window or DEFAULT_WINDOW, chain.count)
    if how.sweeps:
        return jacobi(chain, stop, sweeps=min(how.sweeps, chain.count))
    match how.solver:
        case "jacobi":
            return jacobi(chain, stop)
        case "blocks":
            return blocks(chain, stop, window, cap=max(2, -(-chain.count // (4 * window))))
        case "windows":
            return windows(chain, stop, window)
        case "shooting":
            return shooting(chain, stop, window)
        case "newton":
            return newton(chain, stop)
    return loop(chain)


def chain_of(init: Sequence[Tensor], shared: Sequence[Tensor], streams: Sequence[Tensor], count: int, text: str) -> Chain:
    """A chain from the arguments of its op. ProgramError where they do not fit the body."""
    body = read_body(text)
    found = (len(init), len(shared), len(streams))
    if found != (body.carries, body.shared, body.streams) or count < 1:
        wanted = (body.carries, body.shared, body.streams)
        raise ProgramError(f"expected (carries, shared, streams) = {wanted} and a count >= 1; found {found} and {count}")
    if any(stream.dim() == 0 or stream.shape[0] != count for stream in streams):
        raise ProgramError(
            f"every stream of a chain has one slice a step: expected {count} of each, found {[*map(_sizes, streams)]}"
        )
    return Chain(body, init, shared, streams, count)


def _sizes(tensor: Tensor) -> list[int]:
    return list(tensor.shape)


def chain_shapes(
    init: Sequence[Tensor], shared: Sequence[Tensor], streams: Sequence[Tensor], count: int, body: str, how: str
) -> list[Tensor]:
    """Fake kernel: the shapes of one step, ``count`` times."""
    read_how(how)
    chain = chain_of(init, shared, streams, count, body)
    step = chain.runner((*chain.body.following, *chain.body.emits))(chain.init, [stream[0] for stream in streams])
    for first, after in zip(init, step, strict=False):
        if first.shape != after.shape or first.dtype != after.dtype:
            raise ProgramError(
                f"a carry keeps its form: it starts as {_sizes(first)} {first.dtype}, becomes {_sizes(after)} {after.dtype}"
            )
    return [torch.empty_like(first) for first in init] + [emit.new_empty((count, *emit.shape)) for emit in step[len(init) :]]
