"""Letters through shared memory: in order, whatever their length, and nobody sleeps through one."""

import mmap
import os
import queue
import random
import threading

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hocket.runtime import mailbox, wire
from hocket.runtime.mailbox import LONGEST, SLOTS, Inbox, Outbox, Watch
from hocket.runtime.monitor import PAGE_BYTES
from hocket.runtime.wire import Op, Packet

PATIENCE = 20.0


def letter(number: int, length: int) -> bytes:
    return wire.encode(Packet(Op.FORWARD, 7, number, 3, bytes(i % 251 for i in range(length))))


class Turns:
    """Two threads take turns, access by access, in a given order; one that waits for the other gives its turns away."""

    def __init__(self, order: list[bool]) -> None:
        self.order = iter(order)
        self.changed = threading.Condition()
        self.away: set[str] = set()
        self.next = "rank"

    def take(self, who: str) -> None:
        other = {"rank": "controller", "controller": "rank"}[who]
        with self.changed:
            assert self.changed.wait_for(lambda: self.next == who or other in self.away, PATIENCE)
            self.next = "rank" if next(self.order, self.next != "rank") else "controller"
            self.changed.notify_all()

    def leave(self, who: str) -> None:
        with self.changed:
            self.away.add(who)
            self.changed.notify_all()

    def enter(self, who: str) -> None:
        with self.changed:
            self.away.discard(who)


class Paced:
    """The words of a page, one access a turn."""

    def __init__(self, words: memoryview, turns: Turns, who: str) -> None:
        self.words, self.turns, self.who = words, turns, who

    def __getitem__(self, index: int) -> int:
        self.turns.take(self.who)
        return self.words[index]

    def __setitem__(self, index: int, value: int) -> None:
        self.turns.take(self.who)
        self.words[index] = value


class Line:
    """A socket between the two threads."""

    def __init__(self, turns: Turns) -> None:
        self.turns = turns
        self.sent: queue.Queue[bytes] = queue.Queue()

    def receive(self) -> tuple[Packet, list[int]]:
        self.turns.leave("rank")
        data = self.sent.get(timeout=PATIENCE)  # Empty: it slept through a letter
        self.turns.enter("rank")
        return wire.decode(data), []


def conversation(order: list[bool], lengths: list[int], outbox_type: type[Outbox] = Outbox) -> list[Packet]:
    """What a rank reads of letters of these lengths when the two sides interleave in this order."""
    page = mmap.mmap(-1, PAGE_BYTES)
    turns = Turns(order)
    line = Line(turns)
    outbox, inbox = outbox_type(page), Inbox(page, line, None)
    outbox._words = Paced(outbox._words, turns, "controller")
    inbox._words = Paced(inbox._words, turns, "rank")
    found: list[Packet] = []

    def rank() -> None:
        try:
            found.extend(inbox.receive()[0] for _ in lengths)
        except queue.Empty:
            pass
        finally:
            turns.leave("rank")

    reader = threading.Thread(target=rank)
    reader.start()
    for number, length in enumerate(lengths, 1):
        parcel = outbox.put(number, letter(number, length), by_socket=False)
        if parcel is not None:
            line.sent.put(parcel)
    turns.leave("controller")
    reader.join(3 * PATIENCE)
    return found


@settings(deadline=None, max_examples=150)
@given(st.lists(st.booleans(), max_size=80), st.lists(st.sampled_from([0, 40, LONGEST, 5000]), min_size=1, max_size=5))
def test_no_interleaving_loses_a_letter_or_sleeps_through_one(order, lengths):
    expected = [wire.decode(letter(number, length)) for number, length in enumerate(lengths, 1)]
    assert conversation(order, lengths) == expected


class Hasty(Outbox):
    """Looks whether the rank sleeps before it writes the letter."""

    def put(self, number: int, letter: bytes, *, by_socket: bool) -> bytes | None:
        asleep = self._words[mailbox._RANK_SLEEPS]
        super().put(number, letter, by_socket=by_socket)
        return mailbox._DOORBELL if asleep else None


def test_the_interleavings_find_a_lost_wake_up(monkeypatch):
    monkeypatch.setattr(f"{__name__}.PATIENCE", 1.0)
    draw = random.Random(0)
    orders = ([draw.random() < 0.5 for _ in range(40)] for _ in range(200))
    assert any(not conversation(order, [40], Hasty) for order in orders)


@pytest.mark.parametrize(("watch", "by_memory"), [(None, True), (Watch(), True), (Watch(), False)])
def test_letters_and_parcels_arrive_in_order_through_a_real_socket(watch, by_memory):
    page = mmap.mmap(-1, PAGE_BYTES)
    ours, theirs = wire.pair()
    outbox, inbox = Outbox(page, by_memory=by_memory), Inbox(page, wire.Inbox(theirs), watch, by_memory=by_memory)
    lengths = [0, 8, LONGEST + 1, 3000, 16, 16, LONGEST - wire.HEADER.size, 1] * 30
    found = []
    reader = threading.Thread(target=lambda: found.extend(inbox.receive() for _ in lengths))
    reader.start()
    for number, length in enumerate(lengths, 1):
        while outbox.is_full(number):
            os.sched_yield()
        with open(os.devnull) as file:
            descriptors = (file.fileno(),) if length == 3000 else ()
            parcel = outbox.put(number, letter(number, length), by_socket=bool(descriptors))
            if parcel is not None:
                wire.send_encoded(ours, parcel, descriptors)
    reader.join(PATIENCE)
    assert [packet for packet, _ in found] == [wire.decode(letter(n, length)) for n, length in enumerate(lengths, 1)]
    assert [len(descriptors) for _, descriptors in found] == [int(length == 3000) for length in lengths]
    for _, descriptors in found:
        wire.close_all(descriptors)
    ours.close()
    theirs.close()


def test_a_full_box_says_so_until_a_letter_is_taken_out():
    page = mmap.mmap(-1, PAGE_BYTES)
    ours, theirs = wire.pair()
    outbox, inbox = Outbox(page), Inbox(page, wire.Inbox(theirs), None)
    for number in range(1, SLOTS + 1):
        assert not outbox.is_full(number)
        outbox.put(number, letter(number, 0), by_socket=False)
    assert outbox.is_full(SLOTS + 1)
    assert inbox.receive()[0].sequence == 1
    assert not outbox.is_full(SLOTS + 1)
    assert outbox.is_full(SLOTS + 2)
    ours.close()
    theirs.close()


def test_the_end_of_the_controller_reaches_a_sleeping_rank():
    page = mmap.mmap(-1, PAGE_BYTES)
    ours, theirs = wire.pair()
    inbox = Inbox(page, wire.Inbox(theirs), None)
    ours.close()
    with pytest.raises(wire.Closed):
        inbox.receive()
    theirs.close()


def test_done_is_told_to_a_sleeping_controller_only():
    page = mmap.mmap(-1, PAGE_BYTES)
    ours, theirs = wire.pair()
    outbox, inbox = Outbox(page), Inbox(page, wire.Inbox(theirs), None)
    assert not inbox.finish(1)
    assert outbox.done() == 1
    outbox.sleep(1)
    assert inbox.finish(2)
    outbox.sleep(0)
    assert not inbox.finish(3)
    assert outbox.done() == 3
    ours.close()
    theirs.close()


def test_where_writes_may_be_seen_out_of_order_nothing_is_read_from_the_page():
    page = mmap.mmap(-1, PAGE_BYTES)
    ours, theirs = wire.pair()
    outbox, inbox = Outbox(page, by_memory=False), Inbox(page, wire.Inbox(theirs), None, by_memory=False)
    written = bytes(page)
    parcel = outbox.put(1, letter(1, 8), by_socket=False)
    assert bytes(page) == written
    wire.send_encoded(ours, parcel)
    assert inbox.receive()[0] == wire.decode(letter(1, 8))
    assert inbox.finish(1), "the answer must go by the socket too"
    ours.close()
    theirs.close()


def test_waits_are_watched_for_long_while_they_are_short(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(mailbox.time, "monotonic", lambda: clock[0])
    watch = Watch()
    looked = []
    for waited in (1e-3, 1e-3, 5e-3, 5e-3, 1e-4, 0.0):
        looked.append(watch.begin() - clock[0])
        clock[0] += waited
        watch.end()
    assert looked == pytest.approx([Watch.MOMENT, Watch.LONG, Watch.LONG, Watch.MOMENT, Watch.MOMENT, Watch.LONG])
