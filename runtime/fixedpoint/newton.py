"""Newton's method on a chain: few iterations even where the memory is long, for more work in each.

    full      A[t] = df/dc at the present states;  solve c[t+1] = A[t] c[t] + (f(c[t]) - A[t] c_old[t]) for all t by doubling
              (DEER, arXiv 2309.12252): quadratic, O(T H^3): small states only
    shooting  blocks of w steps; only the states between blocks are unknown, and a block's Jacobian is replaced by the diagonal
              D = v * (J v), v random signs (quasi-DEER, arXiv 2407.19115, at the level of blocks):
                  b[k+1] = end[k](b_old[k]) + D[k] (b[k] - b_old[k])

Both end at the loop's own values whatever the derivatives are worth: the test is on the recurrence itself, and after k iterations
the first k steps (blocks) are exact, since what precedes them has not changed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from ..errors import InputError
from .report import ChainReport
from .solvers import Solved, Stop, by_step, finish, in_order, shifted
from .steps import Chain, Lanes

LARGEST_STATE = 256
"""Numbers in a state (rows times width) up to which full Jacobians are formed."""


def newton(chain: Chain, stop: Stop, cap: int = 0) -> Solved:
    """Full Newton. InputError for states that are too large or not one floating point tensor."""
    size = chain.init[0].numel()
    if len(chain.init) != 1 or not chain.init[0].is_floating_point() or size > LARGEST_STATE:
        raise InputError(
            f"full Newton takes one floating point state of at most {LARGEST_STATE} numbers; found {len(chain.init)} of {size}; "
            'use solver="shooting" or "blocks"'
        )
    count, first = chain.count, chain.init[0].reshape(-1)
    linearise = _linearised(chain)
    before = torch.cat([first[None], first.new_zeros((count - 1, size))])
    most, done, settled = min(cap or count, count), 0, False
    states = before
    while done < most and not settled:
        values, jacobians = linearise(before, chain.streams)
        states = _affine(jacobians, values - torch.einsum("tij,tj->ti", jacobians, before), first)
        done += 1
        new = torch.cat([first[None], states[:-1]])
        stop.measure([new])
        settled = done >= count or stop.settled([new], [before])
        before = new
    trajectory = [states.reshape(count, *chain.init[0].shape)]
    exact = min(done, count)
    report = ChainReport("newton", count, done, done, 0.0 if done >= count else stop.residual, exact_prefix=exact)
    return Solved(trajectory, report) if settled else finish(chain, trajectory, exact, report)


def _linearised(chain: Chain) -> Callable[[Tensor, Sequence[Tensor]], tuple[Tensor, Tensor]]:
    """States [T, size] -> (next states [T, size], Jacobians [T, size, size])."""
    shape = chain.init[0].shape
    step = chain.runner(chain.body.following)

    def flat(state: Tensor, slices: list[Tensor]) -> tuple[Tensor, Tensor]:
        after = step([state.reshape(shape)], slices)[0].reshape(-1)
        return after, after

    def both(state: Tensor, slices: list[Tensor]) -> tuple[Tensor, Tensor]:
        jacobian, value = torch.func.jacrev(flat, has_aux=True)(state, slices)
        return value, jacobian

    example = chain.init[0].new_zeros((chain.count, chain.init[0].numel()))
    traced = _traced(torch.func.vmap(both), example, list(chain.streams))
    return lambda states, streams: traced(states, list(streams))


def _affine(matrices: Tensor, offsets: Tensor, first: Tensor) -> Tensor:
    """s[t] = A[t] s[t-1] + b[t] for all t by recursive doubling; s[-1] = ``first``."""
    start = torch.cat([(offsets[0] + matrices[0] @ first)[None], offsets[1:]])
    matrices = torch.cat([torch.zeros_like(matrices[:1]), matrices[1:]])
    reach, count = 1, len(offsets)
    while reach < count:
        moved = torch.bmm(matrices[reach:], start[:-reach, :, None])[:, :, 0]
        joined = torch.bmm(matrices[reach:], matrices[:-reach])
        start = torch.cat([start[:reach], start[reach:] + moved])
        matrices = torch.cat([matrices[:reach], joined])
        reach *= 2
    return start


def shooting(chain: Chain, stop: Stop, window: int, cap: int = 0) -> Solved:
    """Blocks whose starts are corrected by diagonal Jacobians. InputError unless all states are floating point."""
    if not all(first.is_floating_point() for first in chain.init):
        raise InputError('shooting needs floating point states; use solver="blocks" or "windows"')
    count = chain.count
    number = -(-count // window)
    lanes = chain.lanes(number)
    columns = [by_step(lanes, stream, window) for stream in chain.streams]
    slices = [[column[t] for column in columns] for t in range(window)]
    starts = [torch.cat([first[None], first.new_zeros((number - 1, *first.shape))]) for first in chain.init]
    signs = [torch.where(_noise(start) > 0, 1.0, -1.0).to(start.dtype) for start in starts]
    push = _pushed(lanes, starts, slices[0] if slices else [])
    sweeps, settled = 0, False
    stored: list[list[Tensor]] = []
    while not settled and sweeps < min(cap or number, number):
        state, tangent, stored = lanes.pack(starts), lanes.pack(signs), []
        for inputs in slices:
            state, tangent = push(state, tangent, inputs)
            stored.append(state)
        sweeps += 1
        stop.measure([torch.stack([s[j] for s in stored]) for j in range(len(starts))])
        ends = lanes.unpack(state)
        settled = sweeps >= number or stop.settled(shifted(chain.init, ends), starts)
        if not settled:
            diagonals = [(v * t).clamp(-1, 1) for v, t in zip(signs, lanes.unpack(tangent), strict=True)]
            starts = [_corrected(*parts) for parts in zip(chain.init, starts, ends, diagonals, strict=True)]
    trajectory = [in_order(lanes, torch.stack([s[j] for s in stored]), count) for j in range(len(starts))]
    exact = min(sweeps * window, count)
    residual = 0.0 if exact == count else stop.residual
    report = ChainReport(f"shooting:{window}", count, sweeps * window, sweeps, residual, exact_prefix=exact)
    return Solved(trajectory, report) if settled else finish(chain, trajectory, exact, report)


def _noise(like: Tensor) -> Tensor:
    """The same numbers on every rank and in every run."""
    return torch.randn(like.shape, generator=torch.Generator().manual_seed(0)).to(like.device)


def _corrected(first: Tensor, starts: Tensor, ends: Tensor, diagonals: Tensor) -> Tensor:
    """New starts of all blocks, one after the other: elementwise, so cheap beside a step."""
    new = [first]
    for k in range(len(starts) - 1):
        new.append(torch.addcmul(ends[k], diagonals[k], new[k] - starts[k]))
    found = torch.stack(new)
    return torch.where(torch.isfinite(found), found, torch.cat([first[None], ends[:-1]]))


def _pushed(lanes: Lanes, starts: list[Tensor], slices: list[Tensor]) -> Callable[..., tuple[list[Tensor], list[Tensor]]]:
    """A step together with its derivative along a direction."""

    def both(state: list[Tensor], tangent: list[Tensor], inputs: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        found: Any = torch.func.jvp(lambda *s: tuple(lanes.step(list(s), inputs)), tuple(state), tuple(tangent))
        return list(found[0]), list(found[1])

    traced = _traced(both, lanes.pack(starts), lanes.pack(starts), list(slices))
    return lambda state, tangent, inputs: traced(list(state), list(tangent), list(inputs))


def _traced(function: Callable[..., Any], *examples: Any) -> Any:
    """The ops of a function that differentiates. Within an op's kernel torch has differentiation off: here it is on."""
    include = torch._C._dispatch_tls_local_include_set()
    with torch._C._ForceDispatchKeyGuard(include, torch._C.DispatchKeySet(torch._C.DispatchKey.Undefined)), torch.enable_grad():
        return make_fx(function)(*examples)
