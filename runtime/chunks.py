"""Collectives as chunks that pass through the slots of an ``Exchange``: what each rank puts in, and how the others take it out."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from .exchange import CONSUMED, POSTED, SLOT_BYTES, SLOTS, TAGS, Exchange

_MOST_VIEWS = 4096


class ExchangeError(ConnectionError):
    """Ranks met in different collectives, or one did not come in time."""


@dataclass(eq=False)
class Transfer:
    """A collective under way.

    source: (pieces, n), what this rank gives, one row per receiver or a single row for all; target: (n,) to combine into, or
    (members, n) to lay side by side; combine: None to lay side by side; width: elements of a row in one chunk; first: number of
    its first chunk; result: what the caller gets, once ``left`` chunks are taken.
    """

    source: torch.Tensor
    target: torch.Tensor
    combine: Callable[..., torch.Tensor] | None
    result: torch.Tensor
    tag: int
    average: int = 0
    width: int = 0
    chunks: int = 0
    first: int = 0
    left: int = 0

    def __post_init__(self) -> None:
        rows, length = self.source.shape
        self.width = max(1, min(length, SLOT_BYTES // self.source.element_size() // rows))
        self.chunks = self.left = max(1, -(-length // self.width))

    def span(self, chunk: int) -> tuple[int, int]:
        """Elements of a row that a chunk holds: start and number."""
        start = (chunk - self.first) * self.width
        return start, min(self.width, self.source.shape[1] - start)


class Channel:
    """A group of ranks along one axis. What is issued goes through ``outbox`` into slots, and through ``inbox`` out of them."""

    def __init__(self, exchange: Exchange, axis: int, members: tuple[int, ...]) -> None:
        self.exchange, self.axis, self.members = exchange, axis, members
        self.others = tuple(member for member in members if member != exchange.rank)
        self.outbox: deque[Transfer] = deque()
        self.inbox: deque[Transfer] = deque()
        self._own = members.index(exchange.rank)
        self._words = exchange.words
        self._line = exchange.progress_word(exchange.rank, axis)
        self._lines = tuple(exchange.progress_word(member, axis) for member in members)
        self._other_lines = tuple(exchange.progress_word(member, axis) for member in self.others)
        self._views: dict[tuple[Any, ...], torch.Tensor] = {}
        self._published = self._taken = self._issued = 0

    def issue(self, transfer: Transfer) -> None:
        """Begin a collective: publish what there is room for, and take what has come meanwhile."""
        transfer.first = self._issued
        self._issued += transfer.chunks
        self.outbox.append(transfer)
        self.inbox.append(transfer)
        self.publish()
        if len(self.inbox) > 1:
            self.move()

    def move(self) -> None:
        """Take and publish as far as that goes without waiting."""
        if not self.inbox:
            return
        while self.take() | (bool(self.outbox) and self.publish()):
            pass

    def publish(self) -> bool:
        """Put chunks into slots as long as there is room; whether there was any."""
        words, line = self._words, self._line
        moved = False
        while self.outbox and self._has_room():
            transfer, chunk = self.outbox[0], self._published
            start, length = transfer.span(chunk)
            rows = transfer.source.shape[0]
            source = transfer.source if transfer.chunks == 1 else transfer.source.narrow(1, start, length)
            self._view(self.exchange.rank, chunk, transfer.source.dtype, (rows, length), 0).copy_(source)
            self.exchange.fence()
            words[line + TAGS + chunk % SLOTS] = transfer.tag
            words[line + POSTED] = self._published = chunk + 1
            self.exchange.notify(self.others)
            if chunk + 1 == transfer.first + transfer.chunks:
                self.outbox.popleft()
            moved = True
        return moved

    def _has_room(self) -> bool:
        oldest = self._published - SLOTS
        return oldest < 0 or all(self._words[line + CONSUMED] > oldest for line in self._lines)

    def take(self) -> bool:
        """Take chunks that everybody has posted; whether there were any."""
        moved = False
        while self.inbox and self._taken < self._published and self._all_posted():
            transfer, chunk = self.inbox[0], self._taken
            self._check(transfer, chunk)
            self._combine(transfer, chunk)
            self._words[self._line + CONSUMED] = self._taken = chunk + 1
            self.exchange.notify(self.others)
            transfer.left -= 1
            if not transfer.left:
                self.inbox.popleft()
                if transfer.average:
                    transfer.result.div_(transfer.average)
            moved = True
        return moved

    def _all_posted(self) -> bool:
        taken = self._taken
        return all(self._words[line + POSTED] > taken for line in self._other_lines)

    def _combine(self, transfer: Transfer, chunk: int) -> None:
        start, length = transfer.span(chunk)
        skip = self._own * length if transfer.source.shape[0] > 1 else 0
        dtype = transfer.source.dtype
        given = [self._view(member, chunk, dtype, (length,), skip) for member in self.members]
        if transfer.combine is None:
            for row, piece in zip(transfer.target, given, strict=True):
                row.narrow(0, start, length).copy_(piece)
            return
        into = transfer.target if transfer.chunks == 1 else transfer.target.narrow(0, start, length)
        transfer.combine(given[0], given[1], out=into)
        for piece in given[2:]:
            transfer.combine(into, piece, out=into)

    def _view(self, rank: int, chunk: int, dtype: torch.dtype, shape: tuple[int, ...], skip: int) -> torch.Tensor:
        """Part of a slot. Programs use the same few sizes again and again, so views are kept."""
        key = (rank, chunk % SLOTS, dtype, shape, skip)
        found = self._views.get(key)
        if found is None:
            if len(self._views) >= _MOST_VIEWS:
                self._views.clear()
            stride = (1,) if len(shape) == 1 else (shape[1], 1)
            found = self._views[key] = self.exchange.slot(rank, self.axis, chunk, dtype, shape=shape, stride=stride, skip=skip)
        return found

    def _check(self, transfer: Transfer, chunk: int) -> None:
        for member, line in zip(self.others, self._other_lines, strict=True):
            if self._words[line + TAGS + chunk % SLOTS] != transfer.tag:
                raise ExchangeError(
                    f"rank {member} sent a piece of another collective, shape or dtype than rank {self.exchange.rank}"
                )
