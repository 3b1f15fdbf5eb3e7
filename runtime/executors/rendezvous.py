"""Collectives between ranks that live in one process: what they compute, and how independent ranks meet.

``group_results`` is the meaning of every collective, on plain lists of tensors. ``Rendezvous`` brings ranks together that run
different programs: an operation completes when its last member arrives, and members must agree on what they do.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from ..communicator import Pending, Wire, wire_bytes
from ..errors import CollectiveMismatch, ProgramError
from ..mesh import Mesh
from ..pieces import reduce_tensors

SAME_RESULT = frozenset(("all_reduce", "all_gather", "broadcast"))
"""Collectives that give every member the same tensor."""


def group_results(kind: str, tensors: Sequence[torch.Tensor], extras: Sequence[tuple[Any, ...]]) -> list[torch.Tensor]:
    """Results of one collective for the members of a group, in the order of their index.

    extras: the other arguments of each member, without the axis: (op,), (output_splits, input_splits) or (source,). Raises
    CollectiveMismatch when splits do not fit; agreement on shapes is checked by the caller (``disagreement``).
    """
    parts = len(tensors)
    match kind:
        case "all_reduce":
            return [reduce_tensors(tensors, extras[0][0])] * parts
        case "all_gather":
            return [torch.cat(list(tensors))] * parts
        case "reduce_scatter":
            whole = reduce_tensors(tensors, extras[0][0])
            length = whole.shape[0] // parts
            return [whole.narrow(0, i * length, length) for i in range(parts)]
        case "broadcast":
            return [tensors[extras[0][0]]] * parts
        case "all_to_all":
            pieces = [t.split(list(extra[1])) for t, extra in zip(tensors, extras, strict=True)]
            return [torch.cat([pieces[i][j] for i in range(parts)]) for j in range(parts)]
    raise ProgramError(f"{kind!r} is no collective")


def disagreement(kind: str, tensors: Sequence[torch.Tensor], extras: Sequence[tuple[Any, ...]]) -> tuple[int, str] | None:
    """The index of the first member that does not fit member 0 and what is wrong, or None. O(members)."""
    parts, first = len(tensors), tensors[0]
    for index, (tensor, extra) in enumerate(zip(tensors, extras, strict=True)):
        if tensor is first and extra == extras[0] and kind != "all_to_all":
            continue
        if tensor.dtype != first.dtype or (kind != "all_to_all" and (tensor.shape != first.shape or extra != extras[0])):
            return index, f"{_describe(first, extras[0])} against {_describe(tensor, extra)}"
        if kind == "all_to_all" and (len(extra[0]) != parts or len(extra[1]) != parts or sum(extra[1]) != tensor.shape[0]):
            return index, f"splits {extra} of a tensor of {tuple(tensor.shape)} among {parts} ranks"
    if kind == "all_to_all":
        for i, (outputs, _) in enumerate(extras):
            for j, (_, inputs) in enumerate(extras):
                if outputs[j] != inputs[i]:
                    return j, f"index {i} expects {outputs[j]} rows from index {j}, which sends {inputs[i]}"
    if kind == "reduce_scatter" and first.shape[0] % parts:
        return 0, f"{first.shape[0]} rows cannot be cut into {parts} equal pieces"
    return None


def _describe(tensor: torch.Tensor, extra: tuple[Any, ...]) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)} {extra if extra else ''}".strip()


@dataclass
class Meeting:
    """One collective of one group: who has arrived with what, and the results once all have."""

    kind: str
    members: tuple[int, ...]
    arrived: dict[int, tuple[torch.Tensor, tuple[Any, ...], str]] = field(default_factory=dict)
    results: list[torch.Tensor] | None = None


@dataclass
class Mailbox:
    """Messages from one rank to another, numbered in the order of sending; receives are numbered in the order of posting."""

    sent: int = 0
    posted: int = 0
    messages: dict[int, torch.Tensor] = field(default_factory=dict)


@dataclass
class Arrival:
    """A rank's pending result: of a meeting, of a message (``number`` in ``mailbox``, shaped ``like``), or known already."""

    rank: int
    text: str
    meeting: Meeting | None = None
    mailbox: Mailbox | None = None
    number: int = 0
    like: torch.Tensor | None = None

    @property
    def ready(self) -> bool:
        """Whether ``take`` has something to give."""
        if self.meeting is not None:
            return self.meeting.results is not None
        return self.mailbox is None or self.number in self.mailbox.messages

    def take(self) -> torch.Tensor:
        """The result, once ``ready``. CollectiveMismatch when a message has another shape or dtype than expected."""
        if self.meeting is not None:
            assert self.meeting.results is not None
            return self.meeting.results[self.meeting.members.index(self.rank)]
        assert self.like is not None
        if self.mailbox is None:
            return self.like
        found = self.mailbox.messages.pop(self.number)
        if found.shape != self.like.shape or found.dtype != self.like.dtype:
            raise CollectiveMismatch(
                f"rank {self.rank} expects {_describe(self.like, ())} at {self.text}, found {_describe(found, ())}", rank=self.rank
            )
        return found


@dataclass
class Rendezvous:
    """Where all ranks of a mesh meet."""

    mesh: Mesh
    _open: dict[tuple[str, tuple[int, ...]], list[Meeting]] = field(default_factory=dict)
    _mail: dict[tuple[int, int, int, str], Mailbox] = field(default_factory=dict)

    def meet(self, rank: int, kind: str, tensor: torch.Tensor, extra: tuple[Any, ...], axis: str, text: str) -> Arrival:
        """A rank arrives at the next collective of its group on ``axis``. CollectiveMismatch when it does not fit the others'."""
        members = self.mesh.group(axis, rank)
        meetings = self._open.setdefault((axis, members), [])
        meeting = next((m for m in meetings if rank not in m.arrived), None)
        if meeting is None:
            meeting = Meeting(kind, members)
            meetings.append(meeting)
        if meeting.kind != kind:
            other, (_, _, theirs) = next(iter(meeting.arrived.items()))
            raise CollectiveMismatch(f"rank {other} is at {theirs} while rank {rank} is at {text} on axis {axis!r}", rank=rank)
        meeting.arrived[rank] = (tensor, extra, text)
        if len(meeting.arrived) == len(members):
            meetings.remove(meeting)
            self._complete(meeting, axis)
        return Arrival(rank, text, meeting=meeting)

    def _complete(self, meeting: Meeting, axis: str) -> None:
        tensors, extras, texts = zip(*(meeting.arrived[rank] for rank in meeting.members), strict=True)
        wrong = disagreement(meeting.kind, tensors, extras)
        if wrong is not None:
            index, what = wrong
            raise CollectiveMismatch(
                f"rank {meeting.members[0]} at {texts[0]} and rank {meeting.members[index]} at {texts[index]} disagree on axis "
                f"{axis!r}: {what}",
                rank=meeting.members[index],
            )
        meeting.results = group_results(meeting.kind, tensors, extras)

    def mailbox(self, source: int, target: int, tag: int, axis: str) -> Mailbox:
        """The messages under way from one rank to another."""
        return self._mail.setdefault((source, target, tag, axis), Mailbox())


class RankEnd:
    """One rank's ``Communicator`` at a rendezvous. ``text`` says where the rank is; the executor keeps it up to date."""

    def __init__(self, rendezvous: Rendezvous, rank: int) -> None:
        self.rendezvous = rendezvous
        self.mesh = rendezvous.mesh
        self.rank = rank
        self.wire = Wire()
        self.text = ""

    def all_reduce(self, tensor: torch.Tensor, op: str, axis: str) -> Pending:
        """See ``Communicator``."""
        return self._meet("all_reduce", tensor, (op,), axis)

    def all_gather(self, tensor: torch.Tensor, axis: str) -> Pending:
        """See ``Communicator``."""
        return self._meet("all_gather", tensor, (), axis)

    def reduce_scatter(self, tensor: torch.Tensor, op: str, axis: str) -> Pending:
        """See ``Communicator``."""
        return self._meet("reduce_scatter", tensor, (op,), axis)

    def all_to_all(self, tensor: torch.Tensor, output_splits: Sequence[int], input_splits: Sequence[int], axis: str) -> Pending:
        """See ``Communicator``."""
        return self._meet("all_to_all", tensor, (output_splits, input_splits), axis)

    def broadcast(self, tensor: torch.Tensor, source: int, axis: str) -> Pending:
        """See ``Communicator``."""
        return self._meet("broadcast", tensor, (source,), axis)

    def send(self, tensor: torch.Tensor, peer: int, tag: int, axis: str) -> Pending:
        """See ``Communicator``."""
        self.wire.count("send", wire_bytes("send", tensor, 1))
        mailbox = self.rendezvous.mailbox(self.rank, self._peer(peer, axis), tag, axis)
        mailbox.messages[mailbox.sent] = tensor
        mailbox.sent += 1
        return Arrival(self.rank, self.text, like=tensor)

    def recv(self, like: torch.Tensor, peer: int, tag: int, axis: str) -> Pending:
        """See ``Communicator``."""
        self.wire.count("recv", 0)
        mailbox = self.rendezvous.mailbox(self._peer(peer, axis), self.rank, tag, axis)
        mailbox.posted += 1
        return Arrival(self.rank, self.text, mailbox=mailbox, number=mailbox.posted - 1, like=like)

    def wait(self, pending: Pending) -> torch.Tensor:
        """The result of an arrival that is ``ready``."""
        assert isinstance(pending, Arrival)
        return pending.take()

    def flush(self) -> None:
        """Messages are delivered as they are sent."""

    def barrier(self) -> None:
        """Ranks of one process need none."""

    def _meet(self, kind: str, tensor: torch.Tensor, extra: tuple[Any, ...], axis: str) -> Pending:
        parts = self.mesh.axis_size(axis)
        if kind == "all_to_all":
            own = self.mesh.coordinate(self.rank)[axis]
            row = tensor[:1].numel() * tensor.element_size()
            self.wire.count(kind, sum(n for i, n in enumerate(extra[1]) if i != own) * row)
        elif kind == "broadcast":
            source = parts > 1 and self.mesh.coordinate(self.rank)[axis] == extra[0]
            self.wire.count(kind, wire_bytes(kind, tensor, parts) if source else 0)
        else:
            self.wire.count(kind, wire_bytes(kind, tensor, parts))
        return self.rendezvous.meet(self.rank, kind, tensor, extra, axis, self.text)

    def _peer(self, index: int, axis: str) -> int:
        members = self.mesh.group(axis, self.rank)
        if not 0 <= index < len(members) or members[index] == self.rank:
            raise CollectiveMismatch(f"rank {self.rank} has no peer {index} on axis {axis!r} at {self.text}", rank=self.rank)
        return members[index]
