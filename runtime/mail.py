"""Messages from one rank to another through shared memory, in order, with tags; larger ones travel in several cells.

    cells       per ordered pair of ranks a ring: message after message, cell number k in place k % CELLS
    words       "posted" at the receiver, "taken" at the sender, each in its row of signals; a header in every cell

A message that finds room leaves at once, the rest while its rank waits for anything (``Exchange.movers``). What arrives before
anybody asked for it is kept.
"""

from __future__ import annotations

import mmap
from collections import deque
from dataclasses import dataclass

import torch

from .exchange import Exchange, extend, mail_place

CELLS = 32
CELL_BYTES = 512 << 10
POSTED_WORD, TAKEN_WORD = 512, 513
_HEADER = 4096
_RING = CELLS * (CELL_BYTES + _HEADER)


@dataclass(eq=False)
class Message:
    """One message. data: its bytes, flat; result: what the receiver gets; left: bytes still to move; tag: what it is called."""

    data: torch.Tensor
    result: torch.Tensor
    tag: int
    left: int
    moved: int = 0
    begun: bool = False

    @classmethod
    def of(cls, tensor: torch.Tensor, tag: int) -> Message:
        """A message with the bytes of a contiguous tensor."""
        data = tensor.view(-1).view(torch.uint8) if tensor.numel() else torch.empty(0, dtype=torch.uint8)
        return cls(data, tensor, tag, data.numel())

    @property
    def done(self) -> bool:
        """Whether all of it has left, or arrived."""
        return self.begun and not self.left


class Mailbox:
    """Both directions between this rank and a peer. Ranks and axes are numbers, indices are positions on the axis."""

    def __init__(self, exchange: Exchange, axis: int, own: tuple[int, int], peer: tuple[int, int]) -> None:
        """own, peer: (rank, index on the axis)."""
        self._exchange = exchange
        self._words = exchange.words
        self._peer = (peer[0],)
        mine, theirs = exchange.signal_word(own[0], axis, peer[1]), exchange.signal_word(peer[0], axis, own[1])
        self._they_posted, self._they_took = mine + POSTED_WORD, mine + TAKEN_WORD
        self._i_posted, self._i_took = theirs + POSTED_WORD, theirs + TAKEN_WORD
        self._places = [mail_place(exchange, axis, *pair, _RING) for pair in ((own[0], peer[0]), (peer[0], own[0]))]
        self._maps: list[mmap.mmap | None] = [None, None]
        self._cells: list[torch.Tensor] = [torch.empty(0), torch.empty(0)]
        self._posted = self._words[self._i_posted]
        self._taken = self._words[self._i_took]
        self.outbox: deque[Message] = deque()
        self.wanted: deque[Message] = deque()
        self._kept: deque[Message] = deque()
        self._arriving: Message | None = None

    def send(self, message: Message) -> Message:
        """Begin to send."""
        message.begun = True
        self.outbox.append(message)
        self.move()
        return message

    def receive(self, message: Message) -> Message:
        """Begin to receive. Raises ValueError when a message of another size has arrived under that tag."""
        for kept in self._kept:
            if kept.tag == message.tag:
                self._kept.remove(kept)
                _check(message, kept.data.numel())
                self._take_over(kept, message)
                return message
        self.wanted.append(message)
        self.move()
        return message

    def _take_over(self, kept: Message, message: Message) -> None:
        message.data[: kept.moved].copy_(kept.data[: kept.moved])
        message.moved, message.left, message.begun = kept.moved, kept.left, True
        if self._arriving is kept:
            self._arriving = message

    def move(self) -> None:
        """Send and receive as far as that goes without waiting."""
        while self.outbox and self._posted - self._words[self._they_took] < CELLS:
            self._post(self.outbox[0])
        while self._taken < self._words[self._they_posted]:
            self._take()

    def _ring(self, direction: int) -> tuple[memoryview, torch.Tensor]:
        mapping = self._maps[direction]
        if mapping is None:
            mapping = self._maps[direction] = extend(self._exchange, self._places[direction], _RING, reserve=False)
            self._cells[direction] = torch.frombuffer(mapping, dtype=torch.uint8)
        return memoryview(mapping).cast("q"), self._cells[direction]

    def _post(self, message: Message) -> None:
        words, cells = self._ring(0)
        start = self._posted % CELLS * (CELL_BYTES + _HEADER)
        size = min(message.left, CELL_BYTES)
        words[start // 8], words[start // 8 + 1], words[start // 8 + 2] = message.tag, message.data.numel(), size
        cells[start + _HEADER : start + _HEADER + size].copy_(message.data[message.moved : message.moved + size])
        message.moved += size
        message.left -= size
        if not message.left:
            self.outbox.popleft()
        self._exchange.fence()
        self._posted += 1
        self._words[self._i_posted] = self._posted
        self._exchange.notify(self._peer)

    def _take(self) -> None:
        words, cells = self._ring(1)
        start = self._taken % CELLS * (CELL_BYTES + _HEADER)
        tag, total, size = words[start // 8], words[start // 8 + 1], words[start // 8 + 2]
        message = self._arriving or self._begin(tag, total)
        message.data[message.moved : message.moved + size].copy_(cells[start + _HEADER : start + _HEADER + size])
        message.moved += size
        message.left -= size
        self._arriving = message if message.left else None
        self._taken += 1
        self._words[self._i_took] = self._taken
        self._exchange.notify(self._peer)

    def _begin(self, tag: int, total: int) -> Message:
        for message in self.wanted:
            if message.tag == tag:
                self.wanted.remove(message)
                _check(message, total)
                message.begun = True
                return message
        kept = Message(torch.empty(total, dtype=torch.uint8), torch.empty(0), tag, total, begun=True)
        self._kept.append(kept)
        return kept


def _check(message: Message, found: int) -> None:
    if message.data.numel() != found:
        raise ValueError(f"expected a message of {message.data.numel():,} bytes with tag {message.tag}, found one of {found:,}")
