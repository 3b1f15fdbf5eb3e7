"""Schedules in which a rank holds several stages (chunks).

    interleaved   rank r holds stages r, r+p, r+2p ... (Megatron, arXiv 2104.04473)
    zb-v          rank r holds stages r and 2p-1-r: a V; no bubble where f = i = w (arXiv 2401.10241, section 6)
    v-half        the V with half the activation memory (arXiv 2405.15362)
    dualpipe-v    the V with forwards and backwards of both chunks in turns (DeepSeek's DualPipe folded in two)

A chunk costs the v-th part of a rank's work, so the bubble of the first forwards shrinks to (p-1) f / v.
"""

from __future__ import annotations

import itertools
from collections import Counter, deque
from collections.abc import Iterator

from ....runtime.errors import InputError
from ....runtime.schedule.instruction import Instr, Op
from .closed_forms import Order


def loop_placement(ranks: int, chunks: int) -> tuple[int, ...]:
    """Stage -> rank, going round."""
    return tuple(stage % ranks for stage in range(ranks * chunks))


def v_placement(ranks: int) -> tuple[int, ...]:
    """Stage -> rank, there and back."""
    return (*range(ranks), *reversed(range(ranks)))


def interleaved(ranks: int, micro_batches: int, chunks: int = 2) -> Order:
    """Micro-batches in rounds of p, a round through one chunk after the other. InputError unless p divides m."""
    if micro_batches % ranks:
        raise InputError(
            f"interleaved 1F1B needs a multiple of {ranks} micro-batches, found {micro_batches}; use {ranks}, {2 * ranks}, ..."
        )
    total = chunks * micro_batches
    order: Order = []
    for rank in range(ranks):
        warm = min(total, (chunks - 1) * ranks + 2 * (ranks - 1 - rank))
        forward = [_in_round(k, rank, ranks, chunks, Op.F) for k in range(total)]
        backward = [_in_round(k, rank, ranks, chunks, Op.B) for k in range(total)]
        row = forward[:warm]
        for f, b in zip(forward[warm:], backward, strict=False):
            row += [f, b]
        order.append(row + backward[total - warm :])
    return order


def _in_round(k: int, rank: int, ranks: int, chunks: int, op: Op) -> Instr:
    """The k-th forward (or backward) of a rank."""
    round_, within = divmod(k, ranks * chunks)
    chunk, place = divmod(within, ranks)
    if op is Op.B:
        chunk = chunks - 1 - chunk
    return Instr(op, chunk * ranks + rank, round_ * ranks + place)


class _Row:
    """A rank's list under construction, with the next micro-batch of each (op, chunk)."""

    def __init__(self, rank: int, ranks: int, micro_batches: int) -> None:
        self.instructions: list[Instr] = []
        self.stage = (rank, 2 * ranks - 1 - rank)
        self.next: Counter[tuple[Op, int]] = Counter()
        self.waiting: deque[tuple[int, int]] = deque()
        self.micro_batches = micro_batches

    def add(self, op: Op, chunk: int) -> None:
        """The next micro-batch of an op; numbers past the last one only count."""
        m = self.next[op, chunk]
        self.next[op, chunk] += 1
        if m < self.micro_batches:
            self.instructions.append(Instr(op, self.stage[chunk], m))
        if op is Op.I:
            self.waiting.append((chunk, m))
        elif op is Op.B:
            self.next[Op.I, chunk] += 1
            self.next[Op.W, chunk] += 1

    def backward(self, chunk: int) -> None:
        """I and its W."""
        self.add(Op.I, chunk)
        self.add(Op.W, chunk)

    def whole(self, chunk: int) -> None:
        """B of the next micro-batch that has had no I."""
        m = self.next[Op.I, chunk]
        self.instructions.append(Instr(Op.B, self.stage[chunk], m))
        self.next[Op.I, chunk] += 1
        self.next[Op.W, chunk] += 1

    def oldest_weight(self) -> None:
        """W of the oldest I that has none yet, if any."""
        if self.waiting:
            chunk, m = self.waiting.popleft()
            self.instructions.append(Instr(Op.W, self.stage[chunk], m))
            self.next[Op.W, chunk] += 1


def zb_v(ranks: int, micro_batches: int) -> Order:
    """Forwards down and up the V, then F I W of both chunks in turns; for m < 2p-1 the longer schedule, thinned out."""
    count = max(2 * ranks - 1, micro_batches)
    order: Order = []
    for rank in range(ranks):
        row = _Row(rank, ranks, micro_batches)
        for _ in range(2 * (ranks - rank) - 1):
            row.add(Op.F, 0)
        for _ in range(rank):
            row.add(Op.F, 1)
            row.add(Op.F, 0)
        for _ in range(ranks - rank):
            row.add(Op.F, 1)
            row.backward(1)
        while row.next[Op.F, 1] < row.next[Op.F, 0] or row.next[Op.F, 0] < count:
            if row.next[Op.F, 0] < count:
                row.add(Op.F, 0)
            row.backward(0)
            row.add(Op.F, 1)
            row.backward(1)
        for _ in range(rank):
            row.add(Op.I, 0)
            row.add(Op.I, 1)
        for _ in range(ranks - rank):
            row.backward(0)
        for chunk in (1, 0):
            while row.next[Op.W, chunk] < row.next[Op.I, chunk]:
                row.add(Op.W, chunk)
        order.append(row.instructions)
    return order


def dualpipe_v(ranks: int, micro_batches: int) -> Order:
    """InputError with fewer than 2p micro-batches."""
    if micro_batches < 2 * ranks:
        raise InputError(f"dualpipe-v needs at least {2 * ranks} micro-batches for {ranks} ranks, found {micro_batches}")
    return [_dualpipe_row(_Row(rank, ranks, micro_batches), rank, ranks) for rank in range(ranks)]


def _dualpipe_row(row: _Row, rank: int, ranks: int) -> list[Instr]:
    after = ranks - rank - 1
    for _ in range(2 * after):
        row.add(Op.F, 0)
    for _ in range(rank + 1):
        row.add(Op.F, 0)
        row.add(Op.F, 1)
    for _ in range(after):
        row.add(Op.I, 1)
        row.oldest_weight()
        row.add(Op.F, 1)
    for _ in range(row.micro_batches - 2 * ranks + rank + 1):
        row.add(Op.F, 0)
        row.whole(1)
        row.add(Op.F, 1)
        row.whole(0)
    for _ in range(after):
        row.whole(1)
        row.add(Op.F, 1)
        row.whole(0)
    split = False
    for step in range(rank + 1):
        for chunk in (1, 0):
            split = split or (chunk == 1 and step == (rank + 1) // 2 and rank % 2 == 1)
            split = split or (chunk == 0 and step == (rank + 1) // 2 and rank % 2 == 0)
            row.add(Op.I, chunk) if split else row.whole(chunk)
    for _ in range(after):
        row.oldest_weight()
        row.add(Op.I, 0)
    while row.waiting:
        row.oldest_weight()
    return row.instructions


def v_half(ranks: int, micro_batches: int) -> Order:
    """A building block repeated every six steps, of the shortest life of activations that does not collide with itself."""
    block = _building_block(ranks)
    order: Order = []
    for rank in range(ranks):
        timed = [
            (start + 6 * m, Instr(op, rank if chunk == 0 else 2 * ranks - 1 - rank, m))
            for m in range(micro_batches)
            for (op, chunk), start in block[rank].items()
        ]
        order.append([instr for _, instr in sorted(timed, key=lambda entry: entry[0])])
    return order


Block = list[dict[tuple[Op, int], int]]


def _building_block(ranks: int) -> Block:
    """Starts of the six passes of one micro-batch on each rank, all of one step, distinct modulo six on every rank.

    Steps of 2 (1) down the V and 1 (2) up, for forwards and backwards: all passes of a rank then move alike modulo three, so that
    they collide on no rank, and an activation lives for half as long as in 1F1B. The turns wait as little as they can.
    """
    best: tuple[tuple[int, int], Block] | None = None
    for down, up in ((2, 1), (1, 2)):
        for turns in itertools.product(range(1, 7), repeat=3):
            block = _place(ranks, down, up, turns)
            if block is not None:
                score = (max(map(_alive, block)), max(row[Op.W, 0] for row in block))
                if best is None or score < best[0]:
                    best = (score, block)
    assert best is not None, "passes that move alike modulo three always find turns that keep them apart"
    return best[1]


def _alive(row: dict[tuple[Op, int], int]) -> int:
    """Most activations alive at once on a rank that repeats its block every six steps."""
    return max(sum((now - row[Op.F, chunk]) // 6 - (now - row[Op.W, chunk] - 1) // 6 for chunk in (0, 1)) for now in range(6))


def _place(ranks: int, down: int, up: int, turns: tuple[int, ...]) -> Block | None:
    starts: Block = [{} for _ in range(ranks)]
    now = 0
    for (op, chunk), path, step, turn in _passes(ranks, down, up, turns):
        for place, rank in enumerate(path):
            now += step if place else turn
            starts[rank][op, chunk] = now
    for row in starts:
        if len({start % 6 for start in row.values()}) < 4:
            return None
        for chunk in (1, 0):
            taken = {start % 6 for start in row.values()}
            first = row[Op.I, chunk] + 1
            row[Op.W, chunk] = next(t for t in range(first, first + 6) if t % 6 not in taken)
    return starts


def _passes(ranks: int, down: int, up: int, turns: tuple[int, ...]) -> Iterator[tuple[tuple[Op, int], list[int], int, int]]:
    there, back = list(range(ranks)), list(range(ranks))[::-1]
    yield (Op.F, 0), there, down, 0
    yield (Op.F, 1), back, up, turns[0]
    yield (Op.I, 1), there, down, turns[1]
    yield (Op.I, 0), back, up, turns[2]
