"""What every transport must do, as one program that all ranks of an axis run, and what they must find."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from hocket.runtime.transports.transport import SLOTS, Capability, Transport, TransportError, TransportTimeout

ROWS, WIDTH, EPOCHS = 2, 3, 4


def conformance(t: Transport, axis: str = "d", device: str = "cpu", *, timed: bool = True) -> dict[str, Any]:
    """Everything that the protocol promises; the facts of one rank, as plain data. timed: whether waits have time limits."""
    members = t.mesh.group(axis, t.rank)
    parts, own = len(members), members.index(t.rank)
    facts: dict[str, Any] = {"own": own, "parts": parts}
    facts["sums"] = _puts(t, axis, device, parts, own)
    facts["bf16"] = _half(t, axis, device, parts, own)
    facts["messages"] = _messages(t, axis, device, parts, own)
    facts["views"] = _views(t, axis, device, parts, own)
    facts["errors"] = _errors(t, axis, parts, own) if timed else None
    return facts


def _puts(t: Transport, axis: str, device: str, parts: int, own: int) -> list[float]:
    """Every rank writes rows of every copy, adds to one of them, and signals; the sums of what has arrived, by epoch."""
    buffer = t.symmetric("rows", (ROWS * parts, WIDTH), torch.float32, axis)
    sums = [float(buffer.local.sum())]
    t.barrier(axis)  # a quicker rank would put already
    for epoch in range(1, EPOCHS):
        for peer in range(parts):
            t.put(buffer, peer, torch.full((ROWS, WIDTH), float(epoch * (own + 1)), device=device), row=ROWS * own)
            t.accumulate(buffer, peer, torch.ones(1, WIDTH, device=device), row=ROWS * own + 1) if peer == own else None
            t.signal(peer, own, epoch, axis)
        for peer in range(parts):
            t.wait(peer, peer, epoch, axis)
            assert t.test(peer, peer, epoch, axis)
        sums.append(float(buffer.local.sum()))
        t.barrier(axis)
    got = t.get(buffer, (own + 1) % parts, torch.empty(ROWS, WIDTH, device=device), row=0)
    sums.append(float(got[0, 0]))
    t.barrier(axis)
    t.release(buffer)
    return sums


def _half(t: Transport, axis: str, device: str, parts: int, own: int) -> list[float]:
    """Sums of a dtype that few networks add; everybody's turn comes alone."""
    buffer = t.symmetric("half", (4,), torch.bfloat16, axis)
    for turn in range(parts):
        if turn == own:
            t.accumulate(buffer, 0, torch.full((2,), 1.5 + own, dtype=torch.bfloat16, device=device), row=1)
            t.signal(0, SLOTS - 1, 1, axis)
        if own == 0:
            t.wait(turn, SLOTS - 1, 1, axis)
        t.barrier(axis)
    found = buffer.local.float().tolist()
    t.barrier(axis)
    t.release(buffer)
    return found


def _messages(t: Transport, axis: str, device: str, parts: int, own: int) -> list[float]:
    to, of = (own + 1) % parts, (own - 1) % parts
    sending = [t.isend(torch.full((5,), 10.0 * own + tag, device=device), to, tag, axis) for tag in (0, 1, 1)]
    arrived = [t.irecv(torch.empty(5, device=device), of, tag, axis) for tag in (1, 0, 1)]
    found = [float(one.wait()[4]) for one in arrived]
    for one in sending:
        one.wait()
    return found


def _views(t: Transport, axis: str, device: str, parts: int, own: int) -> list[float]:
    """What a product wrote into a peer's copy through a view is there after the signal."""
    buffer = t.symmetric("view", (2, 2), torch.float32, axis)
    if Capability.REMOTE_VIEW not in t.capabilities:
        with pytest.raises(TransportError, match="'view'"):
            buffer.at((own + 1) % parts)
        t.release(buffer)
        return []
    to, of = (own + 1) % parts, (own - 1) % parts
    torch.mm(torch.full((2, 2), own + 1.0, device=device), torch.eye(2, device=device), out=buffer.at(to))
    t.signal(to, 7, 1, axis)
    t.wait(of, 7, 1, axis)
    found = buffer.local.flatten().tolist()
    t.barrier(axis)
    t.release(buffer)
    return found


def _errors(t: Transport, axis: str, parts: int, own: int) -> list[tuple[str, str]]:
    """Every failure is one named error, and nobody is left standing."""
    found = []
    actions: list[Callable[[], object]] = [
        lambda: t.wait((own + 1) % parts, 9, 1, axis, timeout=0.05),
        lambda: t.signal((own + 1) % parts, SLOTS, 1, axis),
        lambda: t.symmetric("other", (1 + own,), torch.float32, axis),
    ]
    for action in actions:
        try:
            action()
        except TransportError as error:
            found.append((type(error).__name__, str(error)))
    return found


def check(facts: list[dict[str, Any]]) -> None:
    """What the ranks of one axis must have found, in the order of their indices."""
    parts = len(facts)
    for own, found in enumerate(facts):
        assert (found["own"], found["parts"]) == (own, parts)
        total = WIDTH * ROWS * parts * (parts + 1) / 2
        assert found["sums"] == [0.0, *(epoch * total + WIDTH for epoch in range(1, EPOCHS)), float(EPOCHS - 1)]
        assert found["bf16"] == ([0.0, *[sum(1.5 + r for r in range(parts))] * 2, 0.0] if own == 0 else [0.0] * 4)
        of = (own - 1) % parts
        assert found["messages"] == [10.0 * of + 1, 10.0 * of, 10.0 * of + 1]
        assert found["views"] in ([], [of + 1.0] * 4)
        if found["errors"] is None:
            continue
        (late, late_text), (slot, slot_text), (spec, spec_text) = found["errors"]
        assert late == TransportTimeout.__name__
        assert f"slot {9}" in late_text
        assert slot == spec == TransportError.__name__
        assert "slot" in slot_text
        assert "another buffer" in spec_text or "makes" in spec_text
