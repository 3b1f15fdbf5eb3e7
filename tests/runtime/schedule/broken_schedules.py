"""Mutations that make a right schedule wrong, whatever they are applied to."""

import random
from collections.abc import Callable

from hocket.runtime.schedule.instruction import Instr, Op, Schedule

Mutation = Callable[[Schedule, random.Random], Schedule | None]
MOVES = (Op.SEND, Op.RECV, Op.COPY)


def rows(schedule: Schedule) -> list[list[Instr]]:
    return [list(row) for row in schedule.ranks]


def anywhere(schedule: Schedule, rng: random.Random) -> tuple[int, int]:
    places = [(rank, position) for rank, position, _ in schedule]
    return rng.choice(places)


def drop_one(schedule: Schedule, rng: random.Random) -> Schedule | None:
    ranks = rows(schedule)
    rank, position = anywhere(schedule, rng)
    del ranks[rank][position]
    return schedule.with_ranks(ranks)


def repeat_one(schedule: Schedule, rng: random.Random) -> Schedule | None:
    ranks = rows(schedule)
    rank, position = anywhere(schedule, rng)
    ranks[rank].insert(rng.randint(0, len(ranks[rank])), ranks[rank][position])
    return schedule.with_ranks(ranks)


def change_field(schedule: Schedule, rng: random.Random) -> Schedule | None:
    """Another stage, micro-batch, piece, tag or peer than the right one: somebody misses what was there."""
    ranks = rows(schedule)
    rank, position = anywhere(schedule, rng)
    instr = ranks[rank][position]
    field = rng.choice(("stage", "micro_batch", "piece") if instr.op not in (Op.SEND, Op.RECV) else ("tag", "peer", "micro_batch"))
    ranks[rank][position] = instr._replace(**{field: getattr(instr, field) + rng.choice((-3, -2, -1, 1, 2, 3))})
    if field == "piece" and instr.op not in (Op.W, Op.ACC, Op.F, Op.I, Op.B):
        return None
    return schedule.with_ranks(ranks)


def other_rank(schedule: Schedule, rng: random.Random) -> Schedule | None:
    if len(schedule.ranks) < 2:
        return None
    ranks = rows(schedule)
    rank, position = anywhere(schedule, rng)
    other = rng.choice([r for r in range(len(ranks)) if r != rank])
    ranks[other].insert(rng.randint(0, len(ranks[other])), ranks[rank].pop(position))
    return schedule.with_ranks(ranks)


def before_its_cause(schedule: Schedule, rng: random.Random) -> Schedule | None:
    """Backward before forward, weights before inputs, or a send before what it sends, on one rank."""
    ranks = rows(schedule)
    rank, position = anywhere(schedule, rng)
    instr = ranks[rank][position]
    causes = {Op.I: Op.F, Op.B: Op.F, Op.W: Op.I, Op.SEND: None}
    if instr.op not in causes:
        return None
    made = (Op.F,) if instr.flow == "activation" else (Op.I, Op.B)
    wanted = made if instr.op is Op.SEND else (causes[instr.op],)
    at = next(
        (i for i, x in enumerate(ranks[rank]) if (x.stage, x.micro_batch) == (instr.stage, instr.micro_batch) and x.op in wanted),
        None,
    )
    if at is None or at > position:
        return None
    ranks[rank].insert(rng.randint(0, at), ranks[rank].pop(position))
    return schedule.with_ranks(ranks)


def swap_gradients(schedule: Schedule, rng: random.Random) -> Schedule | None:
    """Two micro-batches add their gradient in the wrong order."""
    ranks = rows(schedule)
    rank = rng.randrange(len(ranks))
    adders = [i for i, instr in enumerate(ranks[rank]) if instr.op in (Op.W, Op.B)]
    pairs = [
        (i, j)
        for i in adders
        for j in adders
        if i < j and ranks[rank][i]._replace(micro_batch=0) == ranks[rank][j]._replace(micro_batch=0)
    ]
    if not pairs:
        return None
    i, j = rng.choice(pairs)
    ranks[rank][i], ranks[rank][j] = ranks[rank][j], ranks[rank][i]
    return schedule.with_ranks(ranks)


def cross_messages(schedule: Schedule, rng: random.Random) -> Schedule | None:
    """Two messages between the same ranks exchange their tags: shapes fit, values do not."""
    ranks = rows(schedule)
    rank = rng.randrange(len(ranks))
    sends = [i for i, instr in enumerate(ranks[rank]) if instr.op is Op.SEND]
    if len(sends) < 2:
        return None
    i, j = rng.sample(sends, 2)
    a, b = ranks[rank][i], ranks[rank][j]
    ranks[rank][i], ranks[rank][j] = a._replace(tag=b.tag), b._replace(tag=a.tag)
    return schedule.with_ranks(ranks)


def late_receive(schedule: Schedule, rng: random.Random) -> Schedule | None:
    """A receive posted after the instruction that reads its value."""
    ranks = rows(schedule)
    rank = rng.randrange(len(ranks))
    receives = [i for i, instr in enumerate(ranks[rank]) if instr.op is Op.RECV]
    if not receives:
        return None
    i = rng.choice(receives)
    receive = ranks[rank].pop(i)
    readers = (Op.F,) if receive.flow == "activation" else (Op.I, Op.B)
    reader = next(
        at
        for at, x in enumerate(ranks[rank])
        if x.op in readers and (x.stage, x.micro_batch) == (receive.stage, receive.micro_batch)
    )
    ranks[rank].insert(rng.randint(reader + 1, len(ranks[rank])), receive)
    return schedule.with_ranks(ranks)


MUTATIONS: tuple[Mutation, ...] = (
    drop_one,
    repeat_one,
    change_field,
    other_rank,
    before_its_cause,
    swap_gradients,
    cross_messages,
    late_receive,
)
