"""A step that writes its results to places chosen beforehand, so that no memory is asked for between two steps.

    u + c W   ->  addmm(u, c, W, out=y[t])
    tanh(.)   ->  tanh(y[t], out=y[t])

Every op of the body that torch can tell where to write is told so; an elementwise op writes over an operand that nobody reads
again. What becomes the next carry is written straight into the stored states. Slices of buffers are taken once and not in every
step. The arithmetic is that of the functional ops, op for op and in their order.

A plan is made once for each body and its sizes, from one step that really ran; it is bound to buffers for every solve.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..load import LoadedProgram, load
from ..ops import overload_of, resolve
from .body import Body

Form = tuple[tuple[int, ...], torch.dtype, torch.device]

QUICK: dict[str, Callable[..., Any]] = {
    "aten.add.Tensor": torch.add,
    "aten.addcmul.default": torch.addcmul,
    "aten.addmm.default": torch.addmm,
    "aten.lerp.Tensor": torch.lerp,
    "aten.mm.default": torch.mm,
    "aten.mul.Tensor": torch.mul,
    "aten.sigmoid.default": torch.sigmoid,
    "aten.sub.Tensor": torch.sub,
    "aten.tanh.default": torch.tanh,
}
"""The same kernels behind torch's own bindings, which parse their arguments in half the time. For calls without keywords."""

_UNPLACED = -1


class Line(NamedTuple):
    """One call of a plan: ``frame[output] = call(*get(frame), out=frame[place])``; without ``out`` where place is -1, and to the
    slots of ``spread`` where output is -1."""

    call: Callable[..., Any]
    get: Callable[[list[Any]], tuple[Any, ...]]
    place: int
    output: int
    spread: tuple[int, ...]


@dataclass
class Plan:
    """Where a body writes. Positions are those of a frame: slots, constants, then buffers, then the places of the next carries.

    fixed: calls that see nothing but shared values and buffers: done once; lines: of every step; copies: (position, place) of next
    carries that no call can write to their place.
    """

    empty: list[Any]
    buffers: list[tuple[int, Form]] = field(default_factory=list)
    fixed: list[Line] = field(default_factory=list)
    lines: list[Line] = field(default_factory=list)
    copies: list[tuple[int, int]] = field(default_factory=list)
    places: int = 0


@functools.cache
def writer(op: str) -> Callable[..., Any] | None:
    """The op with a keyword ``out`` for its only result; None where torch has no kernel that writes where it is told."""
    if op in QUICK:
        return QUICK[op]
    functional = overload_of(op)
    wanted = [(a.name, str(a.type)) for a in functional._schema.arguments]
    packet = functional.overloadpacket
    for name in packet.overloads():
        found = getattr(packet, name)
        outs = [a for a in found._schema.arguments if a.is_out]
        rest = [(a.name, str(a.type)) for a in found._schema.arguments if not a.is_out]
        if len(outs) != 1 or rest != wanted or torch.Tag.generated in found.tags or len(found._schema.returns) != 1:
            continue  # a generated one computes elsewhere and copies
        keyword = outs[0].name
        return found if keyword == "out" else _renamed(found, keyword)
    return None


def _renamed(op: Any, keyword: str) -> Callable[..., Any]:
    def call(*args: Any, out: Tensor) -> Any:
        return op(*args, **{keyword: out})

    return call


def getter(positions: tuple[int, ...]) -> Callable[[list[Any]], tuple[Any, ...]]:
    """A tuple of the values at some positions, also for none and for one."""
    if len(positions) > 1:
        return operator.itemgetter(*positions)
    if not positions:
        return lambda _frame: ()
    only = positions[0]
    return lambda frame: (frame[only],)


_PLANS: dict[Any, Plan] = {}
_MOST_PLANS = 256


def plan(body: Body, floating: torch.dtype | None, inputs: Sequence[Tensor]) -> Plan:
    """The plan of a body's next carries, kept by the forms of its inputs. inputs: of one step: carries, shared values, slices."""
    key = (body.text, floating, tuple((tuple(t.shape), t.dtype, t.device) for t in inputs))
    found = _PLANS.get(key)
    if found is None:
        loaded = load(body.as_program(body.needed(body.following)), 0, floating=floating)
        found = _Planner(loaded, inputs, body.following, range(body.carries, body.carries + body.shared)).made()
        while len(_PLANS) >= _MOST_PLANS:
            _PLANS.pop(next(iter(_PLANS)))
        _PLANS[key] = found
    return found


class _Planner:
    """Chooses places, call by call, from the values of one step."""

    def __init__(self, loaded: LoadedProgram, inputs: Sequence[Tensor], following: tuple[int, ...], shared: Iterable[int]) -> None:
        self.loaded, self.following = loaded, following
        self.values = loaded.new_frame()
        self.values[: len(inputs)] = inputs
        self.plan = Plan(loaded.new_frame())
        self.root = {i: i for i in range(len(inputs))}  # slot -> slot whose memory it is a view of
        self.buffer: dict[int, int] = {}  # root slot -> number of the buffer that holds it
        self.forms: list[Form] = []
        self.free: dict[Form, list[int]] = {}
        self.fixed = set(shared) | set(range(loaded.program.slots, len(self.values)))
        self.rows: list[tuple[Callable[..., Any], tuple[int, ...], int, int, tuple[int, ...]]] = []
        self.last = self._last_reads()

    def made(self) -> Plan:
        """Go through the calls in order."""
        for index, (ins, step) in enumerate(zip(self.loaded.program.instructions, self.loaded.steps, strict=True)):
            assert step.call is not None
            plain = step.call is resolve(ins.op)
            result = step.call(*[self.values[p] for p in step.inputs])
            write = writer(ins.op) if plain and step.output >= 0 else None
            if step.output < 0:
                self._spread(step.inputs, step.spread, result)
                self.rows.append((step.call, step.inputs, _UNPLACED, -1, step.spread))
                continue
            self.values[step.output] = result
            if write is not None and isinstance(result, Tensor) and result.layout == torch.strided:
                number = self._place(index, ins.op, step.inputs, step.output, result)
                self.rows.append((write, step.inputs, number, step.output, ()))
            else:
                self._view(step.inputs, step.output, result)
                quick = QUICK.get(ins.op, step.call) if plain else step.call
                self.rows.append((quick, step.inputs, _UNPLACED, step.output, ()))
        return self._bound()

    def _last_reads(self) -> dict[int, int]:
        """Slot -> the last call that reads it, or a view of it; the end for what becomes a carry."""
        last: dict[int, int] = dict.fromkeys(self.following, len(self.loaded.steps))
        for index, step in enumerate(self.loaded.steps):
            for position in step.inputs:
                last[position] = max(index, last.get(position, index))
        for index in reversed(range(len(self.loaded.steps))):  # what a view reads lives as long as the view: any result may be one
            step = self.loaded.steps[index]
            if step.output < 0 or writer(self.loaded.program.instructions[index].op) is None:
                ends = max((last.get(slot, index) for slot in (step.output, *step.spread) if slot >= 0), default=index)
                for position in step.inputs:
                    last[position] = max(last[position], ends)
        return last

    def _place(self, index: int, op: str, inputs: tuple[int, ...], output: int, result: Tensor) -> int:
        """The buffer of a result: that of an operand which ends here if the op is elementwise, else one that is free."""
        form = (tuple(result.shape), result.dtype, result.device)
        dying = {self.root[p] for p in inputs if p in self.root and self.root[p] in self.buffer and self._ends(self.root[p], index)}
        taken = None
        if torch.Tag.pointwise in overload_of(op).tags:
            for position in inputs:
                sharers = [p for p in inputs if self.root.get(p) == position and p != position]
                if position in dying and not sharers and self.forms[self.buffer[position]] == form:
                    taken = self.buffer[position]
                    break
        if taken is None:
            pool = self.free.get(form, [])
            taken = pool.pop() if pool else self._new(form)
        self.root[output], self.buffer[output] = output, taken
        for root in dying:
            number = self.buffer.pop(root)
            if number != taken:
                self.free.setdefault(self.forms[number], []).append(number)
        return taken

    def _ends(self, root: int, index: int) -> bool:
        return all(self.last.get(slot, -1) <= index for slot, own in self.root.items() if own == root)

    def _new(self, form: Form) -> int:
        self.forms.append(form)
        return len(self.forms) - 1

    def _view(self, inputs: tuple[int, ...], output: int, result: Any) -> None:
        """Note whose memory a result is part of."""
        if not isinstance(result, Tensor):
            return
        memory = result.untyped_storage().data_ptr()
        for position in inputs:
            source = self.values[position]
            if isinstance(source, Tensor) and source.untyped_storage().data_ptr() == memory and position in self.root:
                self.root[output] = self.root[position]

    def _spread(self, inputs: tuple[int, ...], spread: tuple[int, ...], result: Any) -> None:
        for slot, element in zip(spread, result, strict=True):
            if slot >= 0:
                self.values[slot] = element
                self._view(inputs, slot, element)

    def _bound(self) -> Plan:
        """Buffers that end as carries become places; what sees only fixed values moves ahead of the steps."""
        made, start = self.plan, len(self.values)
        place: dict[int, int] = {}
        for i, slot in enumerate(self.following):
            number = self.buffer.get(slot, _UNPLACED) if self.root.get(slot) == slot else _UNPLACED
            if number == _UNPLACED or number in place:
                made.copies.append((slot, start + len(self.forms) + i))
            else:
                place[number] = start + len(self.forms) + i
        made.buffers = [(start + n, form) for n, form in enumerate(self.forms) if n not in place]
        where = {n: place.get(n, start + n) for n in range(len(self.forms))}
        where[_UNPLACED] = _UNPLACED
        still = {slot for slot, number in self._written().items() if number not in place}  # always in the same buffer
        for call, inputs, number, output, spread in self.rows:
            line = Line(call, getter(inputs), where[number], output, spread)
            results = [output] if output >= 0 else [slot for slot in spread if slot >= 0]
            views = number == _UNPLACED and all(self.root.get(slot, slot) != slot for slot in results)
            if views and all(p in self.fixed or p in still for p in inputs):
                made.fixed.append(line)
                self.fixed.update(results)
            else:
                made.lines.append(line)
        made.places = len(self.following)
        made.empty = made.empty + [None] * (len(self.forms) + made.places)
        return made

    def _written(self) -> dict[int, int]:
        """Slot -> the buffer it is written to, for all that were ever placed."""
        return {output: number for _, _, number, output, _ in self.rows if number != _UNPLACED}


class Stepper:
    """The next carries of a body, step after step. It owns its buffers: one solve at a time."""

    def __init__(self, made: Plan, carries: int, shared: Sequence[Tensor], streams: int) -> None:
        """carries, streams: how many."""
        self._plan, self._carries, self._streams = made, carries, carries + len(shared)
        self._inputs = self._streams + streams
        self._frame = list(made.empty)
        self._frame[carries : self._streams] = shared
        for position, (size, dtype, device) in made.buffers:
            self._frame[position] = torch.empty(size, dtype=dtype, device=device)
        for line in made.lines:
            if line.place != _UNPLACED and self._frame[line.place] is not None:
                self._frame[line.output] = self._frame[line.place]
        for line in made.fixed:
            self._do(line)

    def run(self, state: Sequence[Tensor], slices: Iterable[Sequence[Tensor]], places: Iterable[Sequence[Tensor]]) -> list[Tensor]:
        """Do some steps and return the last state. slices: those of every step; places: where to write its states."""
        frame, made = self._frame, self._plan
        first = len(frame) - made.places
        for inputs, targets in zip(slices, places, strict=False):
            frame[: self._carries] = state
            frame[self._streams : self._inputs] = inputs
            frame[first:] = targets
            for call, get, place, output, spread in made.lines:
                if place >= 0:
                    frame[output] = call(*get(frame), out=frame[place])
                elif output >= 0:
                    frame[output] = call(*get(frame))
                else:
                    for slot, element in zip(spread, call(*get(frame)), strict=True):
                        if slot >= 0:
                            frame[slot] = element
            for position, place in made.copies:
                frame[place].copy_(frame[position])
            state = targets
        return list(state)

    def _do(self, line: Line) -> None:
        result = line.call(*line.get(self._frame))
        if line.output >= 0:
            self._frame[line.output] = result
            return
        for slot, element in zip(line.spread, result, strict=True):
            if slot >= 0:
                self._frame[slot] = element
