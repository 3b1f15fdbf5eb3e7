"""A body made ready to run: one step of the chain, or the same step on many lanes at once.

    lane    one copy of the state, at its own place in the chain; n lanes advance together by one batched step

A body whose rows are independent takes its lanes as more rows: one matrix product instead of a batch of small ones. Any other body
is vectorised by ``torch.func.vmap``, traced once for each number of lanes, so that a step costs its ops and nothing else.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from ..load import load
from ..ops import resolve
from .body import Body, read_body
from .inplace import QUICK, Form, Stepper, getter, plan
from .scratch import Scratch

Step = Callable[[Sequence[Tensor], Sequence[Tensor]], list[Tensor]]
"""(carries, one slice of every stream) -> results."""


_Code = list[tuple[Callable[..., Any], Callable[[list[Any]], tuple[Any, ...]], int, tuple[int, ...]]]


@functools.lru_cache(maxsize=1024)
def _code(text: str, results: tuple[int, ...], floating: torch.dtype | None) -> tuple[_Code, list[Any]]:
    """The calls that some results of a body need, and an empty frame for them."""
    body = read_body(text)
    loaded = load(body.as_program(body.needed(results)), 0, floating=floating)
    code: _Code = []
    for ins, step in zip(loaded.program.instructions, loaded.steps, strict=True):
        assert step.call is not None
        call = QUICK.get(ins.op, step.call) if step.call is resolve(ins.op) else step.call
        code.append((call, getter(step.inputs), step.output, step.spread))
    return code, loaded.new_frame()


class Runner:
    """Some results of a body as a function. Its frame is kept between calls: a runner serves one solve at a time."""

    def __init__(self, body: Body, results: Sequence[int], shared: Sequence[Tensor], floating: torch.dtype | None) -> None:
        """floating: stands for every floating dtype of the body where it is not the body's own."""
        self._code, empty = _code(body.text, tuple(results), floating)
        self._frame = list(empty)
        self._frame[body.carries : body.carries + len(shared)] = shared
        self._carries, self._streams, self._inputs = body.carries, body.carries + len(shared), body.inputs
        self._results = getter(tuple(results))

    def __call__(self, carries: Sequence[Tensor], slices: Sequence[Tensor]) -> list[Tensor]:
        """One step. carries, slices: one tensor each."""
        frame = self._frame
        frame[: self._carries] = carries
        frame[self._streams : self._inputs] = slices
        for call, get, output, spread in self._code:
            result = call(*get(frame))
            if output >= 0:
                frame[output] = result
            else:
                for slot, element in zip(spread, result, strict=True):
                    if slot >= 0:
                        frame[slot] = element
        return list(self._results(frame))


@functools.lru_cache(maxsize=128)
def _vectorised(text: str, results: tuple[int, ...], floating: torch.dtype | None, forms: tuple[tuple[Form, ...], ...]) -> Any:
    """A body on many lanes as a traced function of (carries, shared, slices). forms: of these three groups, lanes included."""
    body = read_body(text)

    def one(carries: list[Tensor], shared: list[Tensor], slices: list[Tensor]) -> list[Tensor]:
        return Runner(body, results, shared, floating)(carries, slices)

    examples = [[torch.zeros(size, dtype=dtype, device=device) for size, dtype, device in group] for group in forms]
    return make_fx(torch.func.vmap(one, in_dims=(0, None, 0)))(*examples)


class Lanes:
    """The same step for n lanes. A state of all lanes is a list of packed carries; ``pack`` and ``unpack`` go between them and
    tensors ``[n, *shape of the carry]``."""

    def __init__(self, n: int, step: Step, rows: int | None, chain: Chain | None = None) -> None:
        """rows: rows of one lane where lanes are folded into rows, None where they are a dimension of their own; chain: whose next
        carries the step gives, where ``sweep`` may be planned for them."""
        self.n = n
        self.step = step
        self.rows = rows
        self._chain = chain
        self._stepper: Stepper | None = None

    def sweep(
        self, state: Sequence[Tensor], slices: Sequence[Sequence[Tensor]], *, keep: bool = True, scratch: Scratch | None = None
    ) -> list[Tensor]:
        """Do some steps, one after the other.

        state: packed; slices: the packed slices of every step. Returns every carry after each step, [steps, *packed]; after the
        last one only, [1, *packed], if not ``keep``. scratch: where the result may lie.
        """
        if self._chain is None:
            return self._functional(list(state), slices, keep=keep)
        if self._stepper is None:
            self._stepper = self._chain.stepper(state, slices[0])
        take = (scratch or Scratch()).take
        stored = [take((len(slices) if keep else 2, *first.shape), first) for first in state]
        last = self._stepper.run(state, slices, itertools.cycle(zip(*[s.unbind(0) for s in stored], strict=True)))
        return stored if keep else [new[None] for new in last]

    def _functional(self, state: list[Tensor], slices: Sequence[Sequence[Tensor]], *, keep: bool) -> list[Tensor]:
        found = []
        for inputs in slices:
            state = self.step(state, inputs)
            found.append(state)
        kept = found if keep else found[-1:]
        return [torch.stack(column) for column in zip(*kept, strict=True)]

    def pack(self, values: Sequence[Tensor]) -> list[Tensor]:
        """[n, *shape] each -> what ``step`` takes."""
        if self.rows is None:
            return list(values)
        return [value.reshape(-1, *value.shape[2:]) for value in values]

    def unpack(self, values: Sequence[Tensor]) -> list[Tensor]:
        """Inverse of ``pack``."""
        if self.rows is None:
            return list(values)
        return [value.reshape(self.n, -1, *value.shape[1:]) for value in values]

    def pack_each(self, values: Tensor) -> Tensor:
        """[k, n, *shape] -> k packed ones, stacked."""
        return values if self.rows is None else values.reshape(values.shape[0], -1, *values.shape[3:])

    def unpack_each(self, values: Tensor) -> Tensor:
        """k packed ones, stacked -> [k, n, *shape]."""
        return values if self.rows is None else values.reshape(values.shape[0], self.n, -1, *values.shape[2:])


class Chain:
    """A body with its start and its inputs.

    init: the first carries; shared: values every step sees; streams: [count, *shape] each, one slice a step.
    """

    def __init__(self, body: Body, init: Sequence[Tensor], shared: Sequence[Tensor], streams: Sequence[Tensor], count: int) -> None:
        self.body = body
        self.init = list(init)
        self.shared = list(shared)
        self.streams = list(streams)
        self.count = count
        dtype = next((c.dtype for c in self.init if c.is_floating_point()), body.dtype)
        self._floating = None if dtype == body.dtype else dtype
        self._runners: dict[tuple[int, ...], Runner] = {}

    def runner(self, results: Sequence[int]) -> Runner:
        """Some slots of the body as a function of one step's inputs."""
        key = tuple(results)
        if key not in self._runners:
            self._runners[key] = Runner(self.body, key, self.shared, self._floating)
        return self._runners[key]

    @property
    def step(self) -> Runner:
        """The next carries."""
        return self.runner(self.body.following)

    def lanes(self, n: int, results: Sequence[int] | None = None) -> Lanes:
        """``n`` lanes of the step, or of other results of the body."""
        wanted = self.body.following if results is None else results
        if self.body.rows:
            return Lanes(n, self.runner(wanted), self.init[0].shape[0], self if results is None else None)
        return Lanes(n, self._vectorised(n, wanted), None)

    def _vectorised(self, n: int, results: Sequence[int]) -> Step:
        def forms(tensors: Sequence[Tensor], lanes: tuple[int, ...], skip: int) -> tuple[Form, ...]:
            return tuple(((*lanes, *t.shape[skip:]), t.dtype, t.device) for t in tensors)

        groups = (forms(self.init, (n,), 0), forms(self.shared, (), 0), forms(self.streams, (n,), 1))
        traced = _vectorised(self.body.text, tuple(results), self._floating, groups)
        return lambda carries, slices: list(traced(list(carries), self.shared, list(slices)))

    def slices(self, start: int, stop: int) -> list[Tensor]:
        """[stop - start, *shape] of every stream."""
        return [stream[start:stop] for stream in self.streams]

    def stepper(self, state: Sequence[Tensor], slices: Sequence[Tensor]) -> Stepper:
        """Steps from states and slices of these sizes, with places for what they make."""
        made = plan(self.body, self._floating, [*state, *self.shared, *slices])
        return Stepper(made, self.body.carries, self.shared, self.body.streams)

    def loop(self, carries: Sequence[Tensor], start: int, stop: int) -> list[Tensor]:
        """The states after steps start .. stop-1, one after the other: what every solver must agree with. [steps, *shape] each."""
        columns = [stream[start:stop].unbind(0) for stream in self.streams]
        slices = [[column[k] for column in columns] for k in range(stop - start)]
        stored = [first.new_empty((stop - start, *first.shape)) for first in carries]
        self.stepper(carries, slices[0]).run(carries, slices, zip(*[s.unbind(0) for s in stored], strict=True))
        return stored

    def loop_emits(self) -> list[Tensor]:
        """The last carries and what the steps give out, by the plain loop. States that nobody asked for are not kept."""
        if set(self.body.emits) == set(self.body.following):
            states = self.loop(self.init, 0, self.count)
            return [*[s[-1] for s in states], *self.emits(states)]
        run, state, given = self.runner((*self.body.following, *self.body.emits)), self.init, []
        columns = [stream.unbind(0) for stream in self.streams]
        for t in range(self.count):
            found = run(state, [column[t] for column in columns])
            state = found[: self.body.carries]
            given.append(found[self.body.carries :])
        last = [new.clone() if new is first else new for new, first in zip(state, self.init, strict=True)]
        return last + [torch.stack([row[i] for row in given]) for i in range(len(self.body.emits))]

    def emits(self, trajectory: Sequence[Tensor]) -> list[Tensor]:
        """What the steps give out, [count, *shape] each, computed for all steps at once from the states.

        trajectory: [count, *shape] of every carry, the state after each step.
        """
        body = self.body
        free = [slot for slot in dict.fromkeys(body.emits) if slot not in body.following]
        known = dict(zip(body.following, trajectory, strict=True))
        if free:
            before = [torch.cat([first[None], states[:-1]]) for first, states in zip(self.init, trajectory, strict=True)]
            lanes = self.lanes(self.count, free)
            found = lanes.step(lanes.pack(before), lanes.pack(self.streams))
            known.update(zip(free, lanes.unpack(found), strict=True))
        return [known[slot].clone() if slot < body.inputs else known[slot] for slot in body.emits]
