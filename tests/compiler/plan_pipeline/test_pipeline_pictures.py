"""Pictures say what the simulation says."""

import json
import xml.etree.ElementTree as ElementTree

from hocket.compiler.plan.pipeline.costs import LinkCosts, PipelineCosts, StageCosts
from hocket.compiler.plan.pipeline.forms import closed_form
from hocket.compiler.plan.pipeline.picture import gantt, trace_events
from hocket.compiler.plan.pipeline.simulate import Simulation, simulate


def simulation() -> Simulation:
    stage = StageCosts(1.0, 1.2, (0.6,), boundary=10.0)
    return simulate(closed_form("zb-h1", 4, 8), PipelineCosts((stage,) * 4, LinkCosts(0.1, 0.05, 0.0, 0.05, 0.0)))


def test_the_chart_shows_every_instruction_that_takes_time() -> None:
    result = simulation()
    root = ElementTree.fromstring(gantt(result))
    titles = [title.text or "" for title in root.iter("{http://www.w3.org/2000/svg}title")]
    assert "4 stages on 4 ranks, 8 micro-batches; simulated" in titles[0]
    taking_time = sum(span.stop > span.start for spans in result.spans for span in spans)
    assert len(titles) == 1 + taking_time
    assert any(title.startswith("W s3 m7 p0 [") for title in titles)


def test_the_trace_has_a_track_per_rank_and_ends_when_the_step_does() -> None:
    result = simulation()
    events = json.loads(trace_events(result))["traceEvents"]
    spans = [event for event in events if event["ph"] == "X"]
    assert {event["tid"] for event in spans} == {0, 1, 2, 3}
    assert abs(max(event["ts"] + event["dur"] for event in spans) - result.seconds * 1e6) < 1e-3
    counters = [event["args"]["bytes"] for event in events if event["ph"] == "C" and event["name"] == "memory of rank 0"]
    assert max(counters) == result.peaks[0]


def test_messages_cost_both_ends_and_a_latency() -> None:
    """One micro-batch, two ranks: F, send, latency, receive and F; then the same way back."""
    stage = StageCosts(1.0, 1.0, (1.0,), boundary=10.0)
    costs = PipelineCosts((stage,) * 2, LinkCosts(latency=0.5, send=0.1, send_byte=0.01, receive=0.2, receive_byte=0.02))
    result = simulate(closed_form("naive-2bp", 2, 1), costs)
    there = 1.0 + 0.2 + 0.5 + 0.4 + 1.0
    back = 1.0 + 0.2 + 0.5 + 0.4 + 1.0
    assert abs(result.seconds - (there + back + 1.0)) < 1e-9
    assert abs(result.busy[0] - (1.0 + 0.2 + 0.4 + 1.0 + 1.0)) < 1e-9
