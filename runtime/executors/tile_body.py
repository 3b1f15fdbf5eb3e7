"""The region of a tile loop, made ready for tiles of one length: its ops as callables, its products able to write in place.

    first    sink  = a @ b          torch.mm(a, b, out=sink)
    add      sink += a @ b          torch.addmm(sink, a, b, out=sink)
    finish   out   = sink + a @ b   torch.addmm(sink, a, b, out=out)

A product whose tile leaves the loop computes straight into the place where the tile belongs, also through the views that follow it
(a reshape of the product is a reshape of the sink). Where the memory of the sink does not allow that, and for every other op, the
tile is computed first and copied or added.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from ..ops import resolve
from ..templates import Site, fold
from ..tile_loop import TileLoop, slots_of

_VIEWS = {
    "aten.reshape.default",
    "aten.view.default",
    "aten._unsafe_view.default",
    "aten.contiguous.default",
    "aten.permute.default",
    "aten.squeeze.dim",
    "aten.unsqueeze.default",
}
_ADDING: dict[str, Callable[..., Any]] = {"aten.mm.default": torch.addmm, "aten.bmm.default": torch.baddbmm}
_FRESH: dict[str, Callable[..., Any]] = {
    "aten.mm.default": torch.mm,
    "aten.bmm.default": torch.bmm,
    "aten.addmm.default": torch.addmm,
}


@dataclass
class Sink:
    """Where the tile of one result goes. how: first, add or finish; memory: the tile's place in a buffer or a whole result;
    out: for ``finish``, where the sum goes."""

    how: str
    memory: torch.Tensor
    out: torch.Tensor | None = None

    def take(self, value: torch.Tensor) -> None:
        """Deliver a computed tile."""
        if self.how == "finish":
            torch.add(self.memory, value, out=self.out)
        elif self.how == "add":
            self.memory.add_(value)
        elif value.data_ptr() != self.memory.data_ptr() or value.stride() != self.memory.stride():
            self.memory.copy_(value)


@dataclass
class _Chain:
    """A product and the views between it and a result. is_private: nothing else reads any of them."""

    product: int
    views: tuple[int, ...]
    is_private: bool


class _Op(NamedTuple):
    """A call, ready. is_flat: no argument holds slots deeper down."""

    op: Callable[..., Any]
    args: list[Any]
    kwargs: dict[str, Any]
    is_flat: bool


@dataclass
class TileBody:
    """The calls of a loop for tiles of ``length`` rows on one rank."""

    loop: TileLoop
    site: Site
    length: int
    ops: list[_Op] = field(init=False)
    chains: dict[int, _Chain] = field(init=False, default_factory=dict)
    _given: dict[Any, tuple[list[int], ...]] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        self.ops = []
        for call in self.loop.calls:
            args, kwargs = self.loop.arguments(call, self.length)
            ready = [_folded(template, self.site) for template in args]
            named = {name: _folded(t, self.site) for name, t in kwargs.items()}
            is_flat = not any(type(a) is list for a in (*ready, *named.values()))
            self.ops.append(_Op(resolve(call.op), ready, named, is_flat))
        for number, result in enumerate(self.loop.results):
            chain = _chain(self.loop, result.slot)
            if chain is not None:
                self.chains[number] = chain

    def candidates(self, hows: Mapping[int, str]) -> dict[int, int]:
        """Calls that may compute straight into the sink of a result: product -> result number. hows: of the sinks."""
        found = {}
        for number, how in hows.items():
            chain = self.chains.get(number)
            if chain is not None and (how == "first" or chain.is_private):
                found[chain.product] = number
        return found

    def run(
        self, operands: Sequence[torch.Tensor], sinks: Mapping[int, Sink], candidates: Mapping[int, int] | None = None
    ) -> dict[int, torch.Tensor]:
        """Compute one tile. sinks: result number -> where it goes; candidates: of these sinks, where they are known. Returns the
        tiles of the results without a sink."""
        if candidates is None:
            candidates = self.candidates({number: sink.how for number, sink in sinks.items()})
        slots: dict[int, Any] = dict(enumerate(operands))
        done: list[int] = []
        skipped: tuple[int, ...] = ()
        for index, (op, args, kwargs, is_flat) in enumerate(self.ops):
            if index in skipped:
                continue
            call = self.loop.calls[index]
            given = [slots[a] if type(a) is _Slot else a for a in args] if is_flat else [_filled(a, slots) for a in args]
            number = candidates.get(index)
            found = None if number is None else self._in_place(self.chains[number], sinks[number], call.op, given)
            if found is None:
                found = op(*given, **{k: _filled(a, slots) for k, a in kwargs.items()}) if kwargs else op(*given)
            elif number is not None:
                done.append(number)
                skipped += self.chains[number].views
            if not call.spread:
                slots[call.outputs[0]] = found
                continue
            slots.update((slot, v) for slot, v in zip(call.outputs, found, strict=True) if slot >= 0)
        for number, sink in sinks.items():
            if number not in done:
                sink.take(slots[self.loop.results[number].slot])
        if len(sinks) == len(self.loop.results):
            return {}
        return {n: slots[r.slot] for n, r in enumerate(self.loop.results) if n not in sinks}

    def _in_place(self, chain: _Chain, sink: Sink, op: str, args: list[Any]) -> torch.Tensor | None:
        """The product computed where its tile belongs; None where that memory cannot be seen as the product's result."""
        left, right = args[-2:]
        shape = (*left.shape[:-1], right.shape[-1])
        memory = self._seen_by_product(chain, sink.memory, shape)
        out = memory if sink.out is None else self._seen_by_product(chain, sink.out, shape)
        if memory is None or out is None or memory.dtype != left.dtype:
            return None
        if sink.how == "first":
            _FRESH[op](*args, out=memory)
        elif op == "aten.addmm.default":
            torch.addmm(memory, left, right, out=out).add_(args[0])
        else:
            _ADDING[op](memory, left, right, out=out)
        return memory

    def _seen_by_product(self, chain: _Chain, memory: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor | None:
        """The memory of a tile through the views of its chain, backwards; None where no view of it exists."""
        shapes = self._shapes(chain, shape) if chain.views else ()
        for index, before in zip(reversed(chain.views), reversed(shapes), strict=True):
            op, args = self.loop.calls[index].op, self.ops[index].args
            if op == "aten.permute.default":
                order = [d % len(before) for d in args[1]]
                memory = memory.permute([order.index(d) for d in range(len(order))])
            else:
                try:
                    memory = memory.view(before)
                except RuntimeError:
                    return None
        return memory if memory.shape == shape else None

    def _shapes(self, chain: _Chain, shape: tuple[int, ...]) -> tuple[list[int], ...]:
        """What each view of a chain is given, from the shape of the product."""
        key = (chain.product, chain.views, shape)
        if key not in self._given:
            found, value = [], torch.empty(shape, device="meta")
            for index in chain.views:
                found.append(list(value.shape))
                value = self.ops[index].op(value, *self.ops[index].args[1:])
            self._given[key] = tuple(found)
        return self._given[key]


def _chain(loop: TileLoop, slot: int) -> _Chain | None:
    """The product that makes a result and the views after it, None where something else makes it."""
    makers = {out: i for i, call in enumerate(loop.calls) for out in call.outputs}
    readers: dict[int, int] = {}
    for call in loop.calls:
        for read in slots_of((call.args, call.kwargs)):
            readers[read] = readers.get(read, 0) + 1
    for result in loop.results:
        readers[result.slot] = readers.get(result.slot, 0) + 1
    views: list[int] = []
    private = True
    while slot in makers:
        index = makers[slot]
        call = loop.calls[index]
        private = private and readers.get(slot, 0) == 1
        if call.op in _FRESH and not call.kwargs:
            return _Chain(index, tuple(reversed(views)), private) if not call.spread else None
        if call.op not in _VIEWS or call.spread:
            return None
        if not private:
            return None
        views.append(index)
        slot = slots_of(call.args)[0]
    return None


def _folded(template: Any, site: Site) -> Any:
    """Constants folded; slots stay."""
    if isinstance(template, dict) and "slot" in template:
        return _Slot(template["slot"])
    if isinstance(template, list):
        return [_folded(item, site) for item in template]
    return fold(template, site)


class _Slot(int):
    """A number that stands for a slot."""


def _filled(argument: Any, slots: dict[int, Any]) -> Any:
    if type(argument) is _Slot:
        return slots[argument]
    if type(argument) is list:
        return [_filled(item, slots) for item in argument]
    return argument
