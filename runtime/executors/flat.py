"""The production executor: one rank, one loop over the instruction list.

Values are freed after their last use, also across segments. The loop knows nothing of ops: every step is a callable and positions
in the frame (see ``load``). A monitor and stamps cost two more calls a step, in a loop of their own.
"""

from __future__ import annotations

import contextlib
import operator
import time
import zlib
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import torch

from ..communicator import Communicator
from ..errors import InputError, RunError
from ..load import COMPUTE, TILES, WAITING, LoadedProgram, Step
from ..program import Segment
from .failure import rank_failed
from .tile_runner import TileRunner

UNSHAPED = frozenset(("all_to_all", "send", "recv"))
"""Collectives whose input shape may differ between the ranks of a group."""


class Monitor(Protocol):
    """Told where a rank is. Called once per instruction, so it must be cheap (0.2 us) and must not raise."""

    def at(self, index: int) -> None:
        """Instruction ``index`` starts."""
        ...

    def issue(self, index: int, fingerprint: int) -> None:
        """A collective starts; ranks of a group that agree on op, axis, shape and dtype have the same fingerprint (crc32)."""
        ...

    def wait(self, index: int) -> None:
        """The rank begins to wait for a collective's result (``at`` of the next instruction ends it)."""
        ...


class Stamp(NamedTuple):
    """When an instruction ran: nanoseconds of ``time.monotonic_ns``."""

    index: int  # type: ignore[assignment]  # a tuple has a method of that name
    start: int
    stop: int


class _Code(NamedTuple):
    """A step bound to a rank: ``get`` reads several arguments from the frame; ``single`` is the position of an only argument."""

    call: Callable[..., Any]
    get: Callable[[list[Any]], Iterable[Any]] | None
    single: int
    output: int
    spread: tuple[int, ...]
    frees: tuple[int, ...]
    index: int  # type: ignore[assignment]


class Frame:
    """The values of one run, alive between its segments."""

    def __init__(self, values: list[Any]) -> None:
        self.values = values
        self.done: set[str] = set()
        self.closed = False

    def close(self) -> None:
        """Drop every value. Closing twice is harmless."""
        self.values = []
        self.closed = True


class FlatExecutor:
    """Runs a loaded program on its rank.

    schedule: gives the steps of a segment, where several instructions are one call (``inductor.Fusion.steps``); by default every
    instruction is a step. stamps: set it to a list to record every step of the following runs.
    """

    def __init__(
        self,
        loaded: LoadedProgram,
        communicator: Communicator,
        monitor: Monitor | None = None,
        schedule: Callable[[Segment], Iterable[Step]] | None = None,
    ) -> None:
        self.loaded = loaded
        self.program = loaded.program
        self.communicator = communicator
        self.monitor = monitor
        self.stamps: list[Stamp] | None = None
        schedule = schedule or (lambda segment: loaded.steps[segment.start : segment.stop])
        self._tiles = TileRunner.of(communicator)
        self._code = {s.name: tuple(map(self._bind, schedule(s))) for s in self.program.segments}

    def open(self, inputs: Sequence[torch.Tensor | None]) -> Frame:
        """A frame with the inputs of the first segment, one entry per input port (None for ports of later segments).

        Several frames may be alive. InputError when an input is missing; shapes are not checked here, since this runs every step.
        """
        if len(inputs) != len(self.program.inputs):
            raise InputError(f"expected {len(self.program.inputs)} inputs, found {len(inputs)}")
        values = self.loaded.new_frame()
        self._place(values, self.program.segments[0].inputs, [inputs[port] for port in self.program.segments[0].inputs])
        return Frame(values)

    def opener(
        self, bound: Mapping[int, torch.Tensor], fed: Sequence[int], copied: Collection[int] = ()
    ) -> Callable[[Sequence[torch.Tensor]], Frame]:
        """``open`` for frames that have most inputs in common, at the cost of those they have not.

        bound: input port -> value that every frame has; fed: the other ports of the first segment; copied: of the bound ones, those
        of which every frame has a copy. The function takes the values of ``fed``, which must not require gradients.
        """
        first = self.program.segments[0].inputs
        if sorted((*bound, *fed)) != sorted(first):
            raise InputError(f"expected the inputs {sorted(first)}, found {sorted(bound)} and {sorted(fed)}")
        common = self.loaded.new_frame()
        self._place(common, tuple(bound), tuple(bound.values()))
        ports, apart = tuple(fed), tuple(copied)

        def opened(given: Sequence[torch.Tensor]) -> Frame:
            values = common.copy()
            for port, value in zip(ports, given, strict=True):
                values[port] = value
            for port in apart:
                values[port] = values[port].clone()
            return Frame(values)

        return opened

    def run(
        self,
        frame: Frame,
        segment: str,
        extra_inputs: Sequence[torch.Tensor | None] = (),
        out: Mapping[int, torch.Tensor] | None = None,
    ) -> list[torch.Tensor | None]:
        """Run one segment of a frame.

        extra_inputs: values of the ports of a later segment (tangents), in the order of its ``inputs``. out: output port ->
        destination of the same shape, which receives the result and is returned for it. Returns the local results in the order of
        ``segment_outputs``. Raises RankFailed naming the instruction when an op raises; RunErrors of the communicator pass.
        """
        chosen = self.program.segment(segment)
        if frame.closed or segment in frame.done:
            raise InputError(f"segment {segment!r} cannot run: its frame is closed or has run it already")
        values = frame.values
        if chosen is not self.program.segments[0]:
            self._place(values, chosen.inputs, extra_inputs)
        frame.done.add(segment)
        code = self._code[segment]
        grad = torch.no_grad() if torch.is_grad_enabled() else _NOTHING  # entering costs microseconds
        with grad, torch._C._DisableAutocast():
            if self.monitor is None and self.stamps is None:
                self._run_plain(values, code)
            else:
                self._run_watched(values, code)
            self.communicator.flush()
            results = [None if slot < 0 else values[slot] for _, slot in chosen.results]
            for slot in chosen.frees:
                values[slot] = None
            if out:
                results = [_deliver(out.get(port), value) for (port, _), value in zip(chosen.results, results, strict=True)]
        return results

    def _place(self, values: list[Any], ports: Sequence[int], given: Sequence[torch.Tensor | None]) -> None:
        if len(given) != len(ports):
            raise InputError(f"expected {len(ports)} inputs of the segment, found {len(given)}")
        for port, value in zip(ports, given, strict=True):
            if value is None:
                raise InputError(f"rank {self.loaded.rank}: input {self.program.inputs[port]} is missing")
            values[port] = value.detach() if value.requires_grad else value

    def _bind(self, step: Step) -> _Code:
        call = step.call
        if step.kind == WAITING:
            call = self.communicator.wait
        elif step.kind == TILES:
            call = self._tiles.bind(self.loaded.loops[step.index], self.loaded.site)
        elif step.kind != COMPUTE:
            call = getattr(self.communicator, step.kind)
        assert call is not None
        get: Callable[[list[Any]], Iterable[Any]] | None = None
        single = -1
        if len(step.inputs) == 1:
            single = step.inputs[0]
        else:
            get = operator.itemgetter(*step.inputs) if step.inputs else _nothing
        return _Code(call, get, single, step.output, step.spread, step.frees, step.index)

    def _run_plain(self, values: list[Any], code: Sequence[_Code]) -> None:
        index = 0
        try:
            for call, get, single, output, spread, frees, index in code:  # noqa: B007  (read when a step raises)
                result = call(*get(values)) if get is not None else call(values[single])
                if output >= 0:
                    values[output] = result
                else:
                    for slot, element in zip(spread, result, strict=True):
                        if slot >= 0:
                            values[slot] = element
                for slot in frees:
                    values[slot] = None
        except RunError:
            raise
        except Exception as error:
            raise rank_failed(self.program, self.loaded.rank, index, error) from error

    def _run_watched(self, values: list[Any], code: Sequence[_Code]) -> None:
        stamps, monitor, clock = self.stamps, self.monitor or _NoMonitor(), time.monotonic_ns
        at, steps = monitor.at, self.loaded.steps
        index = start = 0
        try:
            for call, get, single, output, spread, frees, index in code:
                at(index)
                kind = steps[index].kind
                if kind is not COMPUTE:
                    self._announce(monitor, index, kind, values)
                if stamps is not None:
                    start = clock()
                result = call(*get(values)) if get is not None else call(values[single])
                if stamps is not None:
                    stamps.append(Stamp(index, start, clock()))
                if output >= 0:
                    values[output] = result
                else:
                    for slot, element in zip(spread, result, strict=True):
                        if slot >= 0:
                            values[slot] = element
                for slot in frees:
                    values[slot] = None
        except RunError:
            raise
        except Exception as error:
            raise rank_failed(self.program, self.loaded.rank, index, error) from error

    def _announce(self, monitor: Monitor, index: int, kind: str, values: list[Any]) -> None:
        if kind == WAITING:
            monitor.wait(index)
            return
        form = self.program.instructions[index].form
        if kind == TILES:
            monitor.issue(index, zlib.crc32(repr(form.args[1:]).encode()))
            return
        tensor = values[self.loaded.steps[index].inputs[0]]
        shape = "" if kind in UNSHAPED else tuple(tensor.shape)
        monitor.issue(index, zlib.crc32(f"{form.op}{form.args[-1]}{shape}{tensor.dtype}".encode()))


_NOTHING = contextlib.nullcontext()


class _NoMonitor:
    def at(self, index: int) -> None:
        """Nobody watches."""

    def issue(self, index: int, fingerprint: int) -> None:
        """Nobody watches."""

    def wait(self, index: int) -> None:
        """Nobody watches."""


def _nothing(values: list[Any]) -> tuple[Any, ...]:
    del values
    return ()


def _deliver(destination: torch.Tensor | None, value: torch.Tensor | None) -> torch.Tensor | None:
    if destination is None or value is None:
        return value
    if destination.shape != value.shape:
        raise InputError(f"a result of shape {tuple(value.shape)} does not fit a destination of shape {tuple(destination.shape)}")
    return destination.copy_(value)
