"""``hocket::resume``: a chain solved again from other starts, where most of what an earlier solve found still holds.

    resume(init, shared, [*streams, *known], count, body, how)  =  chain(init, shared, streams, count, body, how)

``known``, behind the streams, is what an earlier solve of the same chain gave out, from other starts; it changes the cost and not
the meaning. The steps are done in order until every row has merged with the known states; the rest is taken from there. This is one
sweep of a chain that is cut in time (``passes.chain.segments``): the part that sees its start for the first time goes on from it
for as long as the start is remembered, the others find at once that nothing has changed. No rank waits for another in it, so ranks
may take different numbers of steps.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from ..errors import ProgramError
from ..own_ops import define_op
from .body import read_body
from .how import read_how
from .op import chain_of, chain_shapes
from .report import RECENT, ChainReport
from .solvers import TEST_EVERY, Stop
from .steps import Chain

SCHEMA = "resume(Tensor[] init, Tensor[] shared, Tensor[] streams, int count, str body, str how) -> Tensor[]"


@functools.cache
def resume_op() -> torch._ops.OpOverload:
    """The op, defined in torch by the first call."""
    return define_op(SCHEMA, resume, _shapes)


def resume(
    init: Sequence[Tensor], shared: Sequence[Tensor], streams: Sequence[Tensor], count: int, body: str, how: str
) -> list[Tensor]:
    """See the module. ProgramError unless the body gives out its states."""
    own, known = _apart(streams, body)
    chain, decision = chain_of(init, shared, own, count, body), read_how(how)
    places = _places(chain, known)
    states = [known[i] for i in places]
    stop = Stop([decision.tolerance(first.dtype) for first in chain.init])
    stop.measure(states)
    found, merged = _resumed(chain, states, stop)
    RECENT.append(ChainReport("resume", count, len(found), 1, stop.residual if merged else 0.0, exact_prefix=len(found)))
    new = [torch.stack(column) for column in zip(*found, strict=True)]
    whole = [torch.cat([n, old[len(found) :]]) for n, old in zip(new, known, strict=True)] if merged else new
    return [*[whole[i][-1].clone() for i in places], *whole]


def _apart(streams: Sequence[Tensor], body: str) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
    """The streams, and what is known."""
    own = read_body(body).streams
    return streams[:own], streams[own:]


def _resumed(chain: Chain, states: Sequence[Tensor], stop: Stop) -> tuple[list[list[Tensor]], bool]:
    """What the first steps give out, up to the merge, and whether there is more behind it."""
    body = chain.body
    run, state = chain.runner((*body.following, *body.emits)), chain.init
    columns = [stream.unbind(0) for stream in chain.streams]
    before = [column.unbind(0) for column in states]
    given: list[list[Tensor]] = []
    for t in range(chain.count):
        made = run(state, [column[t] for column in columns])
        state = made[: body.carries]
        given.append(made[body.carries :])
        tested = t % TEST_EVERY == TEST_EVERY - 1 and t < chain.count - 1
        if tested and stop.settled(state, [column[t] for column in before]):
            return given, True
    return given, False


def _places(chain: Chain, known: Sequence[Tensor]) -> list[int]:
    """Which emit each next carry is."""
    body = chain.body
    missing = [slot for slot in body.following if slot not in body.emits]
    if missing or len(known) != len(body.emits) or any(k.shape[:1] != (chain.count,) for k in known):
        raise ProgramError(
            f"a chain is resumed from all that its {chain.count} steps gave out, its states among it: expected "
            f"{len(body.emits)} known values, found {len(known)}; states that are not given out: {len(missing)}"
        )
    return [body.emits.index(slot) for slot in body.following]


def _shapes(
    init: Sequence[Tensor], shared: Sequence[Tensor], streams: Sequence[Tensor], count: int, body: str, how: str
) -> list[Tensor]:
    """Fake kernel."""
    own, known = _apart(streams, body)
    _places(chain_of(init, shared, own, count, body), known)
    return chain_shapes(init, shared, own, count, body, how)
