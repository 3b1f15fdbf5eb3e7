"""Before anything runs: do the ranks agree on every collective, and can their orders of operations deadlock?

The rendezvous is played without tensors. A collective holds a rank until every member of its group stands at the same operation of
the same group: stricter than asynchronous transports demand, but safe on all of them, since two groups whose members start the same
operations in different orders do deadlock on some. Messages are buffered: a send goes on, the wait of a receive holds until the
message is sent. If no rank can move and some have not ended, they wait for each other.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from .errors import CollectiveMismatch, InputError
from .ops import COLLECTIVES, RECV, SEND, WAIT
from .program import Collective, RankProgram
from .templates import Site, fold, fold_integer, is_rank_dependent

ALL_TO_ALL = "_c10d_functional.all_to_all_single.default"


def match_collectives(programs: RankProgram | Sequence[RankProgram]) -> None:
    """Raise CollectiveMismatch, naming two ranks and their source lines, unless all ranks can run to the end together.

    programs: one for all ranks of its mesh, or one per rank. Compared are op, shape and dtype of every collective of a group in
    order, broadcast sources, all_to_all splits, and the pairing of messages. O(ranks * collectives).
    """
    if isinstance(programs, RankProgram):
        programs = [programs] * programs.mesh.size
    if not programs or len(programs) != programs[0].mesh.size or len({program.mesh for program in programs}) != 1:
        raise InputError(f"expected one program per rank of one mesh, found {len(programs)}")
    if all(program is programs[0] for program in programs) and not _depends_on_rank(programs[0]):
        return
    _Play([_Player(rank, program) for rank, program in enumerate(programs)]).finish()


def _depends_on_rank(program: RankProgram) -> bool:
    """Whether ranks that run this one list may still disagree: messages, or collectives with rank-dependent arguments."""
    found = (program.instructions[c.instruction] for c in program.collectives)
    return any(ins.op in (SEND, RECV) or is_rank_dependent(ins.form.args) for ins in found)


@dataclass(frozen=True)
class _Event:
    """A collective, a send, a posted receive, or the wait of a receive (``wait_of``: the instruction of the receive)."""

    index: int
    collective: Collective | None
    wait_of: Collective | None = None


@dataclass
class _Player:
    """One rank and how far it is."""

    rank: int
    program: RankProgram
    position: int = 0
    events: list[_Event] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.site = Site.of(self.program.mesh, self.rank)
        self.events = list(self._list())

    def _list(self) -> Iterator[_Event]:
        recorded = {c.instruction: c for c in self.program.collectives}
        receives: dict[int, Collective] = {}
        if not recorded:
            return
        for index, ins in enumerate(self.program.instructions):
            if index in recorded:
                if ins.op == RECV:
                    receives[ins.outputs[0]] = recorded[index]
                yield _Event(index, recorded[index])
            elif ins.op == WAIT and ins.reads[0] in receives:
                yield _Event(index, None, receives[ins.reads[0]])

    @property
    def event(self) -> _Event | None:
        """Where the rank stands, None at the end."""
        return self.events[self.position] if self.position < len(self.events) else None

    def place(self) -> str:
        """Where the rank stands, for messages."""
        event = self.event
        if event is None:
            return f"rank {self.rank} has ended"
        found = event.collective or event.wait_of
        assert found is not None
        shape = f"{found.dtype}[{', '.join(map(str, found.shape))}]"
        source = self.program.source(event.index) or "an unknown line"
        return f"rank {self.rank} is at {self.program.describe(event.index)} on {shape} over {found.axis!r}, from {source}"

    def argument(self, event: _Event, position: int) -> object:
        """An argument of a collective, folded on this rank."""
        return fold(self.program.instructions[event.index].form.args[position], self.site)

    def peer(self, event: _Event, collective: Collective) -> int:
        """The other rank of a message; CollectiveMismatch when there is none."""
        index = fold_integer(self.program.instructions[collective.instruction].form.args[1], self.site)
        members = self.program.mesh.group(collective.axis, self.rank)
        if not 0 <= index < len(members) or members[index] == self.rank:
            raise _mismatch(f"there is no peer {index}: {self.place()}", self, event)
        return members[index]


@dataclass
class _Play:
    players: list[_Player]
    mail: dict[tuple[int, int, int, str], deque[tuple[Collective, _Player, int]]] = field(default_factory=dict)

    def finish(self) -> None:
        """Play until every rank has ended."""
        moved = True
        while moved:
            moves = [self._advance(player) for player in self.players]
            moved = any(moves)
        stuck = [player for player in self.players if player.event is not None]
        if stuck:
            self._explain(stuck)
        for letters in self.mail.values():
            for _, sender, index in letters:
                sender.position = next(i for i, event in enumerate(sender.events) if event.index == index)
                raise _mismatch(f"a message is never received: {sender.place()}", sender, sender.events[sender.position])

    def _advance(self, player: _Player) -> bool:
        """Move one rank (and with it its group) as far as it can."""
        start = player.position
        while (event := player.event) is not None:
            found = event.collective or event.wait_of
            assert found is not None
            if found.op == SEND:
                key = (player.rank, player.peer(event, found), self._tag(player, found), found.axis)
                self.mail.setdefault(key, deque()).append((found, player, event.index))
            elif event.wait_of is not None:
                if not self._receive(player, event, found):
                    break
            elif found.op != RECV:
                if not self._meet(player, found):
                    break
                continue
            player.position += 1
        return player.position > start

    def _tag(self, player: _Player, collective: Collective) -> int:
        return fold_integer(player.program.instructions[collective.instruction].form.args[2], player.site)

    def _receive(self, player: _Player, event: _Event, found: Collective) -> bool:
        letters = self.mail.get((player.peer(event, found), player.rank, self._tag(player, found), found.axis))
        if not letters:
            return False
        sent, sender, index = letters.popleft()
        if (sent.shape, sent.dtype) != (found.shape, found.dtype):
            line = sender.program.source(index) or "an unknown line"
            raise _mismatch(
                f"{player.place()}, but rank {sender.rank} sends {sent.dtype}{list(sent.shape)}, from {line}", player, event
            )
        return True

    def _meet(self, player: _Player, found: Collective) -> bool:
        """Whether the whole group stands at a collective of the same axis; then it agrees and moves on, or the play ends."""
        group = [self.players[rank] for rank in player.program.mesh.group(found.axis, player.rank)]
        for other in group:
            theirs = other.event
            if (
                theirs is None
                or theirs.collective is None
                or theirs.collective.axis != found.axis
                or theirs.collective.op in (SEND, RECV)
            ):
                return False
        for other in group:
            self._agree(group[0], other)
        if found.op == ALL_TO_ALL:
            self._agree_on_splits(group)
        for other in group:
            other.position += 1
        return True

    def _agree(self, first: _Player, other: _Player) -> None:
        one, two = first.event, other.event
        assert one is not None
        assert two is not None
        assert one.collective is not None
        assert two.collective is not None
        same = one.collective.op == two.collective.op and one.collective.dtype == two.collective.dtype
        if same and one.collective.op != ALL_TO_ALL:
            same = one.collective.shape == two.collective.shape
            for position in COLLECTIVES[one.collective.op].arguments[1:]:
                same = same and first.argument(one, position) == other.argument(two, position)
        if not same:
            raise _mismatch(f"{first.place()}; {other.place()}", other, two)

    def _agree_on_splits(self, group: list[_Player]) -> None:
        splits = [[player.argument(player.event, position) for position in (1, 2)] for player in group if player.event is not None]
        for i, (outputs, _) in enumerate(splits):
            for j, (_, inputs) in enumerate(splits):
                fits = isinstance(outputs, list) and isinstance(inputs, list) and len(outputs) == len(inputs) == len(group)
                if not fits or outputs[j] != inputs[i]:  # type: ignore[index]
                    event = group[j].event
                    assert event is not None
                    raise _mismatch(
                        f"the splits differ, {outputs} against {inputs}: {group[i].place()}; {group[j].place()}", group[j], event
                    )

    def _explain(self, stuck: list[_Player]) -> None:
        event = stuck[0].event
        assert event is not None
        ended = [player for player in self.players if player.event is None]
        places = "; ".join(player.place() for player in (stuck + ended)[:8])
        raise _mismatch(f"these ranks would wait for each other for ever: {places}", stuck[0], event)


def _mismatch(message: str, player: _Player, event: _Event) -> CollectiveMismatch:
    return CollectiveMismatch(
        f"the programs cannot run together: {message}",
        rank=player.rank,
        instruction=player.program.describe(event.index),
        source=player.program.source(event.index),
    )
