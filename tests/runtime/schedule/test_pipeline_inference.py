"""Requests leave in the order in which they came, whatever they weigh; queues are bounded; an error reaches its caller only."""

import threading
import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pipelined_models import Chain, batches

from hocket.compiler.capture import capture
from hocket.compiler.plan.pipeline.stage_code import states_of
from hocket.errors import InputError, RankFailed, RunError
from hocket.passes.pipeline import cut_stages
from hocket.runtime.schedule.serve import InferencePipeline, stage_calls
from hocket.runtime.schedule.stage import Port, StageState


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=25), st.integers(1, 4), st.integers(1, 3))
def test_results_are_those_of_the_stages_in_a_row_and_in_order(sizes: list[int], stages: int, depth: int) -> None:
    layers = [torch.nn.Linear(6, 6) for _ in range(stages)]
    requests = [torch.randn(size, 6) for size in sizes]
    with InferencePipeline([layer.__call__ for layer in layers], depth) as pipeline:
        results = list(pipeline.map(requests))
    whole = torch.nn.Sequential(*layers)
    for found, request in zip(results, requests, strict=True):
        assert torch.equal(found, whole(request).detach())


def test_stages_work_at_the_same_time() -> None:
    """Both stages must be inside a request at once, or the barrier is never passed."""
    meeting = threading.Barrier(2, timeout=20)

    def first(value: int) -> int:
        if value > 0:
            meeting.wait()
        return value

    def second(value: int) -> int:
        if value < 3:
            meeting.wait()
        return value

    with InferencePipeline([first, second]) as pipeline:
        assert list(pipeline.map([0, 1, 2, 3])) == [0, 1, 2, 3]


def test_a_slow_stage_holds_back_the_front() -> None:
    gate = threading.Event()
    with InferencePipeline([lambda v: v, lambda v: gate.wait(20) and v], depth=2) as pipeline:
        futures = [pipeline.submit(value) for value in range(1, 6)]  # two at work or taken, two and one waiting
        with pytest.raises(RunError, match=r"has been busy for 0\.05 s with 2 requests waiting"):
            futures += [pipeline.submit(value, timeout=0.05) for value in (6, 7)]
        assert len(futures) <= 2 * (2 + 1)
        gate.set()
        assert [future.result(20) for future in futures] == list(range(1, len(futures) + 1))


def test_an_error_belongs_to_its_request() -> None:
    def fussy(value: int) -> int:
        if value == 2:
            raise ValueError("two is too much")
        return value

    with InferencePipeline([lambda v: v + 0, fussy, lambda v: v * 10]) as pipeline:
        futures = [pipeline.submit(value) for value in range(4)]
        assert [futures[i].result(20) for i in (0, 1, 3)] == [0, 10, 30]
        with pytest.raises(RankFailed, match="stage 1 of 3 failed on a request: two is too much") as caught:
            futures[2].result(20)
        assert isinstance(caught.value.__cause__, ValueError)
        assert (pipeline.served.finished, pipeline.served.failed) == (3, 1)


def test_closing_finishes_what_was_submitted_and_ends_the_threads() -> None:
    before = threading.active_count()
    pipeline = InferencePipeline([lambda v: (time.sleep(0.01), v)[1]] * 3, depth=4)
    futures = [pipeline.submit(value) for value in range(4)]
    pipeline.close()
    pipeline.close()
    assert [future.result(0) for future in futures] == [0, 1, 2, 3]
    assert threading.active_count() == before
    with pytest.raises(RunError, match="the pipeline is closed"):
        pipeline.submit(1)


def test_no_stages_are_refused() -> None:
    with pytest.raises(InputError, match="at least one stage"):
        InferencePipeline([])


def forward_stages(norm: str) -> tuple[torch.nn.Module, list[StageState]]:
    torch.manual_seed(0)
    model = Chain(3, norm=norm)
    if norm == "layer":
        model.eval()
    program = capture(model, batches(1)[0], train=False)
    calls = [node for node in program.nodes if node.op == "call_function"]
    pipeline = cut_stages(program, {node.name: min(place * 3 // len(calls), 2) for place, node in enumerate(calls)})
    tensors = {Port("param", name): p.detach() for name, p in model.named_parameters()}
    tensors |= {Port("buffer", name): b for name, b in model.named_buffers()}
    return model, states_of(pipeline, tensors)


def test_compiled_stages_serve_requests() -> None:
    model, states = forward_stages("layer")
    requests = batches(6)
    with InferencePipeline(stage_calls(states)) as pipeline:
        results = list(pipeline.map([{"args[0]": x, "args[1]": y} for x, y in requests]))
        with pytest.raises(RankFailed, match=r"no input 'args\[1\]'"):
            pipeline.submit({"args[0]": requests[0][0]}).result(20)
    for found, request in zip(results, requests, strict=True):
        torch.testing.assert_close(next(iter(found.values())), model(*request).detach())


def test_a_model_that_changes_while_it_serves_is_refused() -> None:
    with pytest.raises(InputError, match="capture the model in eval mode to serve it"):
        stage_calls(forward_stages("batch")[1])
