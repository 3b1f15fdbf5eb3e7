"""From evidence to one exception: which rank is to blame, where it was, and what the others were doing.

Causes are ranked: ranks that disagree on a collective (one of them may have crashed of it) > a dead process > an exception > a rank
without progress > an error of the network, which is the shadow of something else and is held back for a moment.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from .errors import CollectiveMismatch, RankDied, RankFailed, RankHung, RunError
from .mesh import Mesh
from .monitor import Disagreement, Position, State, find_disagreement
from .program import RankProgram

AFTERWARDS = "All ranks have been ended; parameters and buffers in your process are intact."

_WORDS = {
    State.STARTING: "starting",
    State.IDLE: "idle between steps",
    State.LOADING: "loading a program",
    State.RUNNING: "between two instructions",
    State.WRITING: "writing results",
}


@dataclass
class Evidence:
    """What the controller knows when something is wrong.

    failures: rank -> its report {type, message, traceback, memory, communication}; dead: rank -> "was killed by SIGKILL";
    stalled: seconds without any progress, 0 if that is not the problem; waited_for: ranks whose answer is missing.
    """

    mesh: Mesh
    pids: Sequence[int]
    positions: Sequence[Position]
    programs: Mapping[int, RankProgram]
    failures: dict[int, dict[str, Any]] = field(default_factory=dict)
    dead: dict[int, str] = field(default_factory=dict)
    stalled: float = 0.0
    waited_for: frozenset[int] = frozenset()
    dump: Callable[[int], str] = lambda _: ""

    @property
    def disagreement(self) -> Disagreement | None:
        """Ranks that entered a collective differently, or one that left a step without a collective that others wait in."""
        return find_disagreement(self.positions, self.mesh) or self._absent()

    @property
    def decisive(self) -> bool:
        """Whether a first cause is known, not only its shadows."""
        return bool(self.dead) or any(not f["communication"] for f in self.failures.values()) or self.disagreement is not None

    def _absent(self) -> Disagreement | None:
        """A rank that has answered, while members of its group are inside a collective that it never entered in that step."""
        answered = [r for r, p in enumerate(self.positions) if r not in self.waited_for and p.state is State.IDLE]
        for number, axis in enumerate(self.mesh.names):
            for rank in answered:
                for other in self.mesh.group(axis, rank):
                    there, here = self.positions[other], self.positions[rank]
                    behind = here.counts[number] < there.counts[number] and here.sequence == there.sequence
                    if other in self.waited_for and there.waiting and behind:
                        entered = {other: there.entries[-1]} if there.entries else {}
                        return Disagreement(axis, there.counts[number], (rank,), entered)
        return None

    def place(self, rank: int) -> tuple[str, str]:
        """(instruction, source line) at which a rank is; the first is words where it is at none."""
        return self.instruction(self.positions[rank].handle, self.positions[rank].instruction, self.positions[rank].state)

    def instruction(self, handle: int, index: int, state: State = State.RUNNING) -> tuple[str, str]:
        """Text and source line of an instruction."""
        program = self.programs.get(handle)
        if program is None or state is not State.RUNNING or not 0 <= index < len(program.instructions):
            return _WORDS[state], ""
        return program.describe(index), program.source(index)

    def at(self, rank: int) -> str:
        """``in step 4 (backward) at `%7 = ...` from model.py:41 ...``."""
        instruction, source = self.place(rank)
        position = self.positions[rank]
        program = self.programs.get(position.handle)
        if program is None or position.state is not State.RUNNING:
            return instruction
        name = program.segments[position.segment].name
        return f"in {name} (message {position.sequence}) at `{instruction}`" + (f" from {source}" if source else "")

    def others(self, *blamed: int) -> str:
        """What the ranks that are not to blame were doing, equal places together."""
        places: dict[str, list[int]] = {}
        for rank in range(self.mesh.size):
            if rank not in blamed:
                verb = "waits" if self.positions[rank].waiting else "is"
                places.setdefault(f"{verb} {self.at(rank)}", []).append(rank)
        return "".join(f"; rank {', '.join(map(str, ranks))} {place}" for place, ranks in places.items())


def process_state(pid: int) -> str:
    """The letter the kernel gives: R running, S sleeping, D in a system call, T stopped, Z dead."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0]
    except OSError:
        return "Z"


def describe_exit(status: int | None) -> str:
    """``was killed by SIGKILL``, ``exited with code 1``; from a wait status, None where nobody could say."""
    if status is None:
        return "is gone"
    code = os.waitstatus_to_exitcode(status)
    if code >= 0:
        return f"exited with code {code}"
    return f"was killed by {signal.Signals(-code).name}" if -code in set(signal.Signals) else f"was killed by signal {-code}"


def diagnose(evidence: Evidence) -> RunError:
    """The one exception that the user sees."""
    disagreement = evidence.disagreement
    if disagreement is not None:
        return _mismatch(evidence, disagreement)
    if evidence.dead:
        return _died(evidence)
    if evidence.failures:
        return _failed(evidence)
    return _hung(evidence)


def _error(kind: type[RunError], evidence: Evidence, text: str, rank: int | None, remote: str = "") -> RunError:
    instruction, source = evidence.place(rank) if rank is not None else ("", "")
    return kind(f"{text}. {AFTERWARDS}", rank=rank, instruction=instruction, source=source, remote=remote)


def _mismatch(evidence: Evidence, found: Disagreement) -> RunError:
    rank = found.odd[0]
    handle = evidence.positions[rank].handle
    entered = []
    for member, entry in sorted(found.entries.items()):
        instruction, source = evidence.instruction(evidence.positions[member].handle, entry.instruction)
        entered.append(
            f"rank {member} `{instruction}` from {source or 'unknown source'}, fingerprint {entry.fingerprint & 0xFFFFFFFF:08x}"
        )
    own = found.entries.get(rank)
    if own is None:
        entered.append(f"rank {rank} skipped it and ended its step")
        own = next(iter(found.entries.values()), None)
    text = f"expected all ranks of axis {found.axis!r} to enter the same collective number {found.number}, found " + "; ".join(
        entered
    )
    instruction, source = evidence.instruction(handle, own.instruction if own else -1)
    return CollectiveMismatch(f"{text}. {AFTERWARDS}", rank=rank, instruction=instruction, source=source)


def _died(evidence: Evidence) -> RunError:
    rank = min(evidence.dead)
    how = evidence.dead[rank]
    hint = " (the kernel does this where memory runs out)" if "SIGKILL" in how else ""
    age = time.monotonic() - evidence.positions[rank].time
    more = f"; rank {', '.join(map(str, sorted(set(evidence.dead) - {rank})))} too" if len(evidence.dead) > 1 else ""
    text = f"rank {rank} (pid {evidence.pids[rank]}) {how}{hint}{more}, {evidence.at(rank)}, last progress {age:.2f} s ago"
    return _error(RankDied, evidence, text + evidence.others(*evidence.dead), rank, evidence.dump(rank))


def _failed(evidence: Evidence) -> RunError:
    primary = {r: f for r, f in evidence.failures.items() if not f["communication"]} or evidence.failures
    rank = min(primary)
    report = primary[rank]
    same = [r for r in primary if r != rank and primary[r]["type"] == report["type"]]
    what = "ran out of memory" if report["memory"] else f"raised {report['type']}"
    also = f" (so did rank {', '.join(map(str, same))})" if same else ""
    text = f"rank {rank} {what} {evidence.at(rank)}{also}: {report['message'].strip().rstrip('.')}"
    return _error(RankFailed, evidence, text + evidence.others(rank, *same), rank, report["traceback"])


def _hung(evidence: Evidence) -> RunError:
    states = [process_state(pid) for pid in evidence.pids]
    late = [r for r in sorted(evidence.waited_for) if not evidence.positions[r].waiting] or sorted(evidence.waited_for)
    stopped = [r for r in sorted(evidence.waited_for) if states[r] in "Tt"]
    rank = (stopped or sorted(late, key=lambda r: sum(evidence.positions[r].counts)))[0]
    if evidence.positions[rank].waiting and not stopped:
        text = f"no rank made progress for {evidence.stalled:.1f} s and all wait for the network: rank {rank} {evidence.at(rank)}"
    else:
        state = "stopped by a signal" if rank in stopped else f"process state {states[rank]}"
        text = f"rank {rank} (pid {evidence.pids[rank]}, {state}) made no progress for {evidence.stalled:.1f} s {evidence.at(rank)}"
    return _error(RankHung, evidence, text + evidence.others(rank), rank, "" if stopped else evidence.dump(rank))
