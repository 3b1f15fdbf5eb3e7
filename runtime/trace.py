"""From time stamps to a trace for Chrome or Perfetto: one process per rank, waiting on a second track, arrows join a collective.

Format: the Trace Event Format of Chrome ("X" complete events, "s" and "f" flow events), times in microseconds.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

from .monitor import Stamp, State
from .program import RankProgram

Stamps = Sequence[tuple[int, int, float]]
"""Of one rank: (Stamp, instruction or handle or state, monotonic seconds)."""

_COMPUTE, _NETWORK = 0, 1


def read_stamps(fd: int) -> Stamps:
    """What a rank wrote into the file ``fd``, which is closed."""
    with os.fdopen(fd, "rb") as file:
        file.seek(0)
        return [tuple(stamp) for stamp in json.loads(file.read())]


def chrome_trace(stamps: Sequence[Stamps], programs: Mapping[int, RankProgram]) -> dict[str, Any]:
    """The trace of all ranks. programs: handle -> program."""
    events: list[dict[str, Any]] = []
    for rank, own in enumerate(stamps):
        events.append({"ph": "M", "name": "process_name", "pid": rank, "args": {"name": f"rank {rank}"}})
        for track, name in ((_COMPUTE, "compute"), (_NETWORK, "network")):
            events.append({"ph": "M", "name": "thread_name", "pid": rank, "tid": track, "args": {"name": name}})
        events.extend(_rank_events(rank, own, programs))
    return {"traceEvents": events, "displayTimeUnit": "ms"}


def _rank_events(rank: int, stamps: Stamps, programs: Mapping[int, RankProgram]) -> list[dict[str, Any]]:
    events: list[dict[str, Any]] = []
    program: RankProgram | None = None
    number = 0
    for (kind, index, time), after in zip(stamps, [*stamps[1:], None], strict=True):
        if kind == Stamp.BEGIN:
            program = programs.get(index)
            continue
        if after is None or (kind == Stamp.AT and after[0] in (Stamp.ISSUE, Stamp.WAIT) and after[1] == index):
            continue  # the stamp that follows says more about the same instruction
        length = (after[2] - time) * 1e6
        if kind == Stamp.END:
            if index == State.WRITING:
                events.append(_event(rank, _COMPUTE, "write results", time, length))
            continue
        if program is None:
            continue
        event = _event(rank, _COMPUTE if kind == Stamp.AT else _NETWORK, program.instructions[index].op, time, length)
        event["args"] = {
            "instruction": program.describe(index),
            "source": program.source(index),
            "phase": program.instructions[index].phase,
        }
        events.append(event)
        if kind == Stamp.ISSUE:
            number += 1
            flow = {"name": "collective", "cat": "collective", "id": number, "pid": rank, "tid": _NETWORK, "ts": time * 1e6}
            events.append({**flow, "ph": "s"} if rank == 0 else {**flow, "ph": "f", "bp": "e"})
    return events


def _event(rank: int, track: int, name: str, time: float, length: float) -> dict[str, Any]:
    return {"ph": "X", "name": name, "pid": rank, "tid": track, "ts": time * 1e6, "dur": length}
