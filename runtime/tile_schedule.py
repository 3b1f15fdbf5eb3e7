"""What one rank does in a tile loop, step by step, and why that is safe.

Rank r works on the chunks r-1, r-2, .., r (its own last) where results go to their owners, and on r, r+1, .. (its own first) where
operands come from their owners: so every step sends what the next rank needs for its next step, and nothing waits for everybody
(the staggered order of T3, arXiv 2401.16677, 4.3, and of collective matmul, Wang et al., ASPLOS 2023).

    reduce_scatter   chunk c visits ranks c+1, c+2, .., c; each adds its tile into the buffer of rank c, then signals the next
    all_reduce       the same, then everybody reads the finished chunk from rank c
                     eager: every rank computes its own chunk while the others' tiles travel, and adds what arrived at the end
    all_to_all       the tile for rank c is put into that rank's buffer at once
    gather           every rank publishes its operand; chunk c is read in place from rank c

Buffers come in two halves, used in turn; ``epoch`` counts the loops of an axis. No signal is needed to use a half again: in the
loop between, every rank waits for something that depends on every other rank having begun it, and so having ended the one before.
Values of signals grow with the epoch, so none is ever reset.

``check_schedule`` replays all ranks with vector clocks (Mattern 1989): every wait must be answered, and two accesses to the same
tile of a buffer, of which one writes, must be ordered by signals, over several epochs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from .errors import ProgramError
from .tile_loop import MOST_SLOTS, MOST_TILES, TileLoop

PUBLISHED = MOST_SLOTS
"""Signal slots: chunk * tiles + tile below PUBLISHED, and PUBLISHED + tile."""


HALVES = 2


class Step(NamedTuple):
    """One thing that a rank does. kind:

    wait      until ``peer`` has signalled ``slot`` with at least ``value``
    signal    ``peer``: ``slot`` is ``value``
    publish   put the tile of this rank's operand where all can read it
    compute   run the region on (chunk, tile); ``how`` says what to do with the delivered tile: first, add, finish, keep, send, own
    merge     add what has arrived of (chunk, tile), this rank's own, to what it computed itself
    collect   read the finished (chunk, tile) into the result: from rank ``peer``'s buffer
    """

    kind: str
    peer: int = -1
    slot: int = 0
    value: int = 0
    chunk: int = -1
    tile: int = -1
    how: str = ""


class Access(NamedTuple):
    """A step touches a tile of a buffer: rank that owns it, "in" or "out", half, (section, tile)."""

    owner: int
    buffer: str
    half: int
    place: tuple[int, int]
    writes: bool


def steps(loop: TileLoop, rank: int, epoch: int) -> list[Step]:
    """The steps of the rank with index ``rank`` on the axis, for the loop number ``epoch`` of that axis."""
    _check_slots(loop)
    others = [(rank + k) % loop.parts for k in range(1, loop.parts)]
    found: list[Step] = []
    fetched = loop.fetches is not None
    base = epoch * (loop.parts + 1)
    if fetched:
        for tile in range(loop.tiles):
            found.append(Step("publish", tile=tile))
            found += [Step("signal", peer, PUBLISHED + tile, base + 1, tile=tile) for peer in others]
    kind = None if loop.delivers is None else loop.results[loop.delivers].kind
    chunks = [(rank + k) % loop.parts for k in range(loop.parts)]
    if kind is not None:
        chunks = [(rank - 1 - k) % loop.parts for k in range(loop.parts)]
    for number, chunk in enumerate(chunks):
        for tile in range(loop.tiles):
            if fetched and chunk != rank:
                found.append(Step("wait", chunk, PUBLISHED + tile, base + 1, tile=tile))
            found += _deliver(loop, kind, rank, base, (number, chunk, tile))
    if loop.eager:
        for tile in range(loop.tiles):
            found += _merge(loop, kind or "", rank, base, tile)
    if kind in ("all_reduce", "all_to_all"):
        found += _collect(loop, kind, rank, base)
    return found


def _deliver(loop: TileLoop, kind: str | None, rank: int, base: int, where: tuple[int, int, int]) -> list[Step]:
    """Compute one tile and pass it on."""
    number, chunk, tile = where
    slot = chunk * loop.tiles + tile
    if kind is None:
        return [Step("compute", chunk=chunk, tile=tile, how="keep")]
    if kind == "all_to_all":
        how = "own" if chunk == rank else "send"
        sent = [] if chunk == rank else [Step("signal", chunk, rank * loop.tiles + tile, base + 1, chunk, tile)]
        return [Step("compute", chunk=chunk, tile=tile, how=how), *sent]
    if loop.eager and chunk == rank:
        return [Step("compute", chunk=chunk, tile=tile, how="own")]
    found = []
    if number:
        found.append(Step("wait", (rank - 1) % loop.parts, slot, base + number, chunk, tile))
    if chunk != rank:
        found.append(Step("compute", chunk=chunk, tile=tile, how="add" if number else "first"))
        return [*found, Step("signal", (rank + 1) % loop.parts, slot, base + number + 1, chunk, tile)]
    if kind == "reduce_scatter":
        return [*found, Step("compute", chunk=chunk, tile=tile, how="finish")]
    found.append(Step("compute", chunk=chunk, tile=tile, how="add"))
    return [*found, *_finished(loop, rank, base, tile)]


def _finished(loop: TileLoop, rank: int, base: int, tile: int) -> list[Step]:
    """Tell everybody that a tile of an all-reduce is complete."""
    others = [(rank + k) % loop.parts for k in range(1, loop.parts)]
    return [Step("signal", peer, rank * loop.tiles + tile, base + loop.parts, rank, tile) for peer in others]


def _merge(loop: TileLoop, kind: str, rank: int, base: int, tile: int) -> list[Step]:
    """What the others have added up of a tile of this rank's chunk, and its own part."""
    slot = rank * loop.tiles + tile
    found = [Step("wait", (rank - 1) % loop.parts, slot, base + loop.parts - 1, rank, tile), Step("merge", chunk=rank, tile=tile)]
    return found if kind == "reduce_scatter" else [*found, *_finished(loop, rank, base, tile)]


def _collect(loop: TileLoop, kind: str, rank: int, base: int) -> list[Step]:
    """Read what the others have finished; of an all-reduce this rank's own chunk too."""
    found = []
    own = [rank] if kind == "all_reduce" else []
    for chunk in [*own, *((rank + k) % loop.parts for k in range(1, loop.parts))]:
        for tile in range(loop.tiles):
            if chunk != rank:
                value = base + loop.parts if kind == "all_reduce" else base + 1
                found.append(Step("wait", chunk, chunk * loop.tiles + tile, value, chunk, tile))
            found.append(Step("collect", chunk if kind == "all_reduce" else rank, chunk=chunk, tile=tile))
    return found


def _check_slots(loop: TileLoop) -> None:
    if loop.parts * loop.tiles > PUBLISHED or loop.tiles > MOST_TILES:
        raise ProgramError(f"{loop.parts} ranks with {loop.tiles} tiles each need more signal slots than the {PUBLISHED} there are")


def accesses(loop: TileLoop, step: Step, rank: int, half: int) -> list[Access]:
    """The tiles of shared buffers that a step touches."""
    found = []
    if step.kind == "publish":
        found.append(Access(rank, "in", half, (0, step.tile), writes=True))
    if step.kind == "compute":
        if loop.fetches is not None and step.chunk != rank:
            found.append(Access(step.chunk, "in", half, (0, step.tile), writes=False))
        if step.how in ("first", "add"):
            found.append(Access(step.chunk, "out", half, (0, step.tile), writes=True))
        elif step.how == "send":
            found.append(Access(step.chunk, "out", half, (rank, step.tile), writes=True))
        elif step.how == "finish":
            found.append(Access(rank, "out", half, (0, step.tile), writes=False))
    if step.kind == "merge":
        scatters = loop.delivers is not None and loop.results[loop.delivers].kind == "reduce_scatter"
        found.append(Access(rank, "out", half, (0, step.tile), writes=not scatters))
    if step.kind == "collect":
        section = step.chunk if step.peer == rank and step.chunk != rank else 0
        found.append(Access(step.peer, "out", half, (section, step.tile), writes=False))
    return found


@dataclass
class _Clocks:
    """Vector clocks of all ranks, what signals carry, and the last accesses to every tile of every buffer."""

    parts: int
    now: list[list[int]] = field(init=False)
    words: dict[tuple[int, int, int], list[tuple[int, tuple[int, ...]]]] = field(default_factory=dict)
    writes: dict[tuple[object, ...], tuple[int, tuple[int, ...], str]] = field(default_factory=dict)
    reads: dict[tuple[object, ...], dict[int, tuple[tuple[int, ...], str]]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.now = [[0] * self.parts for _ in range(self.parts)]

    def answered(self, rank: int, step: Step) -> bool:
        """Whether a wait is over; then the clock learns what the signal carried. Only the very signal that the wait is for counts:
        a later one would end it too, but a schedule that relies on that stands still at its last loop."""
        sent = [clock for value, clock in self.words.get((step.peer, rank, step.slot), ()) if value == step.value]
        if not sent:
            return False
        self.now[rank] = [max(a, b) for a, b in zip(self.now[rank], sent[0], strict=True)]
        return True

    def signalled(self, rank: int, step: Step) -> None:
        word = self.words.setdefault((rank, step.peer, step.slot), [])
        if word and word[-1][0] >= step.value:
            raise ProgramError(f"rank {rank} signals {step.value} in slot {step.slot} after {word[-1][0]}: signals must grow")
        word.append((step.value, tuple(self.now[rank])))

    def touched(self, rank: int, access: Access, what: str) -> None:
        """ProgramError when the access races with an earlier one."""
        self.now[rank][rank] += 1
        clock, key = self.now[rank], access[:4]
        earlier = [] if key not in self.writes else [self.writes[key]]
        if access.writes:
            earlier += [(who, *entry) for who, entry in self.reads.get(key, {}).items()]
        for who, then, did in earlier:
            if who != rank and then[who] > clock[who]:
                raise ProgramError(f"rank {rank} ({what}) and rank {who} ({did}) touch {access[:4]} in no order")
        entry = (tuple(clock), what)
        if access.writes:
            self.writes[key] = (rank, *entry)
            self.reads[key] = {}
        else:
            self.reads.setdefault(key, {})[rank] = entry


def check_schedule(
    loops: Sequence[TileLoop], programs: Sequence[Sequence[Sequence[Step]]] | None = None, *, halves: int = HALVES
) -> None:
    """Replay loops that follow each other on an axis. ProgramError for a wait that nothing answers, a race, a signal that shrinks,
    or a tile that is not computed and delivered exactly once.

    programs: per rank and epoch the steps, default those of ``steps``; halves: into how many parts a buffer is divided.
    """
    parts = loops[0].parts
    given = programs or [[steps(loop, rank, epoch) for epoch, loop in enumerate(loops)] for rank in range(parts)]
    for rank, epochs in enumerate(given):
        for loop, found in zip(loops, epochs, strict=True):
            _check_complete(loop, rank, found)
    clocks = _Clocks(parts)
    queues = [[(epoch, step) for epoch, found in enumerate(epochs) for step in found] for epochs in given]
    position = [0] * parts
    moved = True
    while moved:
        moved = False
        for rank, queue in enumerate(queues):
            while position[rank] < len(queue):
                epoch, step = queue[position[rank]]
                if step.kind == "wait" and not clocks.answered(rank, step):
                    break
                if step.kind == "signal":
                    clocks.signalled(rank, step)
                for access in accesses(loops[epoch], step, rank, epoch % halves):
                    clocks.touched(rank, access, f"loop {epoch}, {step.kind} of chunk {step.chunk}, tile {step.tile}")
                position[rank] += 1
                moved = True
    stuck = [(rank, queue[at]) for rank, (queue, at) in enumerate(zip(queues, position, strict=True)) if at < len(queue)]
    if stuck:
        rank, (epoch, step) = stuck[0]
        raise ProgramError(
            f"deadlock: rank {rank} waits in loop {epoch} for slot {step.slot} of rank {step.peer}, which never comes"
        )


def _check_complete(loop: TileLoop, rank: int, found: Sequence[Step]) -> None:
    everything = sorted((chunk, tile) for chunk in range(loop.parts) for tile in range(loop.tiles))
    if sorted((s.chunk, s.tile) for s in found if s.kind == "compute") != everything:
        raise ProgramError(f"rank {rank} does not compute every tile once")
    published = [s.tile for s in found if s.kind == "publish"]
    if published != (list(range(loop.tiles)) if loop.fetches is not None else []):
        raise ProgramError(f"rank {rank} does not publish every tile once")
    kind = None if loop.delivers is None else loop.results[loop.delivers].kind
    firsts = {(s.chunk, s.tile) for s in found if s.kind == "compute" and s.how == "first"}
    if kind in ("reduce_scatter", "all_reduce") and firsts != {((rank - 1) % loop.parts, tile) for tile in range(loop.tiles)}:
        raise ProgramError(f"rank {rank} begins other chunks than that of rank {(rank - 1) % loop.parts}")
    merged = [(s.chunk, s.tile) for s in found if s.kind == "merge"]
    if merged != ([(rank, tile) for tile in range(loop.tiles)] if loop.eager else []):
        raise ProgramError(f"rank {rank} does not add what has arrived of its own chunk once")
    collected = sorted((s.chunk, s.tile) for s in found if s.kind == "collect")
    wanted = {"all_reduce": everything, "all_to_all": [e for e in everything if e[0] != rank]}.get(kind or "", [])
    if collected != wanted:
        raise ProgramError(f"rank {rank} does not collect every tile once")
