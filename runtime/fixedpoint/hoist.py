"""What of a body sees no carry, done for all steps at once when the chain is solved.

    chain(h, W, x):  h' = f(h W + x U)    ->    y = x U for all steps;    chain(h, W, y):  h' = f(h W + y)

A pass does this once and for all where it can (``passes.chain.split``). A chain that is kept whole, because torch has a kernel for
all of it (``native``), is split here where a solver and not that kernel is to run.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from ..templates import slots_in
from .body import Body, Call, read_body
from .steps import Chain


class Hoisted(NamedTuple):
    """fixed: slots of the whole body that are the same in every step; ahead: those that differ and see no carry; shared, streams:
    which inputs the rest still reads, by their place; rest: the body of what is left, whose shared values are ``shared`` then
    ``fixed``, whose streams are ``streams`` then ``ahead``."""

    fixed: tuple[int, ...]
    ahead: tuple[int, ...]
    shared: tuple[int, ...]
    streams: tuple[int, ...]
    rest: Body


@functools.lru_cache(maxsize=128)
def hoisted(text: str) -> Hoisted:
    """The parts of a body."""
    body = read_body(text)
    first_stream = body.carries + body.shared
    carried, varying = set(range(body.carries)), set(range(first_stream, body.inputs))
    for call in body.calls:
        read, made = _reads(call), {slot for slot in call.outputs if slot >= 0}
        if read & carried:
            carried |= made
        elif read & varying:
            varying |= made
    rest = [call for call in body.calls if any(slot in carried for slot in call.outputs if slot >= 0)]
    wanted = sorted(set().union(*map(_reads, rest), body.following, body.emits) - carried)
    fixed = tuple(slot for slot in wanted if slot >= body.inputs and slot not in varying)
    ahead = tuple(slot for slot in wanted if slot >= body.inputs and slot in varying)
    shared = tuple(slot - body.carries for slot in wanted if slot < first_stream)
    streams = tuple(slot - first_stream for slot in wanted if first_stream <= slot < body.inputs)
    order = [body.carries + place for place in shared] + [*fixed] + [first_stream + place for place in streams] + [*ahead]
    return Hoisted(fixed, ahead, shared, streams, _renumbered(body, rest, order, (len(shared) + len(fixed))))


def hoist(chain: Chain) -> Chain:
    """The chain of what must be done in order; the chain itself where that is all of it."""
    parts = hoisted(chain.body.text)
    if not parts.fixed and not parts.ahead:
        return chain
    fixed = chain.runner(parts.fixed)(chain.init, [stream[0] for stream in chain.streams]) if parts.fixed else []
    ahead: Sequence[Tensor] = []
    if parts.ahead:
        lanes = chain.lanes(chain.count, parts.ahead)
        ahead = lanes.unpack(lanes.step(_repeated(chain), lanes.pack(chain.streams)))
    shared = [*[chain.shared[i] for i in parts.shared], *fixed]
    return Chain(parts.rest, chain.init, shared, [*[chain.streams[i] for i in parts.streams], *ahead], chain.count)


def _repeated(chain: Chain) -> list[Tensor]:
    """Carries for a step that does not read them."""
    return chain.init if chain.body.rows else [first.expand(chain.count, *first.shape) for first in chain.init]


def _reads(call: Call) -> set[int]:
    return {*slots_in(call.args), *slots_in(call.kwargs.values())}


def _renumbered(body: Body, calls: Sequence[Call], order: Sequence[int], shared: int) -> Body:
    """Some calls as a body of their own. order: the slots that become its inputs behind the carries; shared: how many are fixed."""
    place = {slot: i for i, slot in enumerate([*range(body.carries), *order])}
    renamed = []
    for call in calls:
        args, kwargs = _mapped(call.args, place.__getitem__), _mapped(call.kwargs, place.__getitem__)
        for slot in call.outputs:
            if slot >= 0:
                place[slot] = len(place)
        renamed.append(call._replace(args=args, kwargs=kwargs, outputs=tuple(place.get(slot, -1) for slot in call.outputs)))
    following, emits = tuple(map(place.__getitem__, body.following)), tuple(map(place.__getitem__, body.emits))
    return Body(body.carries, shared, len(order) - shared, tuple(renamed), following, emits, body.rows, body.floating)


def _mapped(template: Any, rename: Callable[[int], int]) -> Any:
    """A template with other slots."""
    if isinstance(template, list):
        return [_mapped(item, rename) for item in template]
    if isinstance(template, dict):
        if set(template) == {"slot"}:
            return {"slot": rename(template["slot"])}
        return {name: _mapped(value, rename) for name, value in template.items()}
    return template
