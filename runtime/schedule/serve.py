"""Inference through a pipeline: requests of any size enter at the front and leave at the back in the order in which they came.

Every stage is a worker with a bounded queue before it. Nothing polls: a worker sleeps until a request arrives, and whoever submits
sleeps while the first queue is full, so a slow stage holds back the front instead of piling up memory (non-blocking pipeline
parallelism of EnergonAI, arXiv 2209.02341, without its sleeping loops). Requests need not have the same size: a stage works on one
request at a time, and while one is long behind, shorter ones that follow it wait only for the stage itself.

An error in a stage belongs to its request: that request's result raises it, all others go on.
"""

from __future__ import annotations

import functools
import queue
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import torch

from ..errors import InputError, RankFailed, RunError
from .stage import HELD, StageState

Values = Any
"""What stages hand on: whatever the first one takes and each gives to the next."""

StageCall = Callable[[Values], Values]


@dataclass
class _Request:
    value: Values
    result: Future[Values]
    failed: BaseException | None = None
    stage: int = 0


@dataclass
class _Flow:
    """A request on its way through the programs of stages: its inputs, the values under way, and its outputs."""

    given: Mapping[str, torch.Tensor]
    values: dict[str, torch.Tensor] = field(default_factory=dict)
    outputs: dict[str, torch.Tensor] = field(default_factory=dict)


def stage_calls(states: Sequence[StageState]) -> list[StageCall]:
    """The forwards of compiled stages for an ``InferencePipeline``: a request is its inputs by name, a result its outputs by name.

    All requests have the shapes that the stages were made for. InputError for a model whose forward changes its buffers: requests
    that overlap would see them change.
    """
    for state in states:
        changed = [port.name for port in state.code.forward.outputs if port.kind == "update"]
        if changed:
            raise InputError(f"stage {state.code.stage} changes {', '.join(changed)}; capture the model in eval mode to serve it")
    return [functools.partial(_forward, state, state is states[-1]) for state in states]


def _forward(state: StageState, last: bool, value: Values) -> Values:  # noqa: FBT001
    flow = value if isinstance(value, _Flow) else _Flow(value)
    part = state.code.forward
    arguments = []
    for port in part.inputs:
        kind, name = port
        found = flow.values.get(name) if kind == "value" else state.held.get(port) if kind in HELD else flow.given.get(name)
        if found is None:
            raise InputError(f"the request has no {kind} {name!r}; it has {sorted(flow.given)}")
        arguments.append(found)
    wanted = {spec.name for spec in state.code.sends}
    made = dict(flow.values)
    for port, result in zip(part.outputs, part.run(arguments), strict=True):
        if result is not None:
            (made if port.kind == "value" else flow.outputs)[port.name] = result
    flow.values = {name: tensor for name, tensor in made.items() if name in wanted}
    return flow.outputs if last else flow


_STOP = object()


@dataclass
class Served:
    """What a pipeline has done. finished, failed: requests; waiting: now in each queue, the first stage's first."""

    finished: int = 0
    failed: int = 0
    waiting: list[int] = field(default_factory=list)


class InferencePipeline:
    """Stages as workers of this process, one thread each: torch's kernels run without the interpreter's lock, so stages overlap.

    stages: called one after the other for every request; depth: requests that may wait before each stage. Use it as a context
    manager, or ``close`` it; closing lets everything submitted finish. InputError without stages or depth.
    """

    def __init__(self, stages: Sequence[StageCall], depth: int = 2) -> None:
        if not stages or depth < 1:
            raise InputError(
                f"an inference pipeline needs at least one stage and a depth of at least 1; found {len(stages)}, {depth}"
            )
        self._stages = tuple(stages)
        self._queues: list[queue.Queue[Any]] = [queue.Queue(depth) for _ in stages]
        self._served = Served()
        self._closed = False
        self._entry = threading.Lock()
        self._threads = [
            threading.Thread(target=self._work, args=(index,), name=f"pipeline stage {index}", daemon=True)
            for index in range(len(stages))
        ]
        for thread in self._threads:
            thread.start()

    def submit(self, value: Values, timeout: float | None = None) -> Future[Values]:
        """Hand in a request; blocks while the first queue is full. The result raises RankFailed naming the stage where one failed.

        Raises RunError once the pipeline is closed, and when the queue stays full for ``timeout`` seconds.
        """
        with self._entry:
            if self._closed:
                raise RunError("the pipeline is closed; open a new one to go on")
            request = _Request(value, Future())
            try:
                self._queues[0].put(request, timeout=timeout)
            except queue.Full:
                depth = self._queues[0].maxsize
                raise RunError(
                    f"the first of {len(self._stages)} stages has been busy for {timeout} s with {depth} requests waiting"
                ) from None
            return request.result

    def map(self, values: Iterable[Values]) -> Iterator[Values]:
        """Results in the order of the requests, as they come; at most as many requests are under way as queues hold."""
        most = sum(q.maxsize + 1 for q in self._queues)
        pending: list[Future[Values]] = []
        for value in values:
            pending.append(self.submit(value))
            if len(pending) > most:
                yield pending.pop(0).result()
        for result in pending:
            yield result.result()

    @property
    def served(self) -> Served:
        """What has been done so far."""
        return Served(self._served.finished, self._served.failed, [q.qsize() for q in self._queues])

    def close(self) -> None:
        """Finish what was submitted, then stop the workers. Closing twice is harmless."""
        with self._entry:
            if self._closed:
                return
            self._closed = True
            self._queues[0].put(_STOP)
        for thread in self._threads:
            thread.join()

    def __enter__(self) -> InferencePipeline:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _work(self, index: int) -> None:
        call, mine = self._stages[index], self._queues[index]
        last = index == len(self._stages) - 1
        with torch.no_grad():
            while (request := mine.get()) is not _STOP:
                if request.failed is None:
                    try:
                        request.value = call(request.value)
                    except BaseException as error:
                        request.failed, request.stage = error, index
                if last:
                    self._finish(request)
                else:
                    self._queues[index + 1].put(request)
        if not last:
            self._queues[index + 1].put(_STOP)

    def _finish(self, request: _Request) -> None:
        if request.failed is None:
            self._served.finished += 1
            request.result.set_result(request.value)
            return
        self._served.failed += 1
        text = f"stage {request.stage} of {len(self._stages)} failed on a request: {request.failed}"
        error = RankFailed(text, rank=request.stage)
        error.__cause__ = request.failed
        request.result.set_exception(error)
