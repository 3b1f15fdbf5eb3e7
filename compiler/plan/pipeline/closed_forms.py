"""Schedules with one stage per rank, as their papers draw them. Time flows in equal steps; ranks wait where they must.

p ranks, m micro-batches, forward f, input gradient i, weight gradient w (in seconds); with a flush the steps take

    naive          p (f+i+w) for m = 1                       naive-2bp   p (f+i) + w
    gpipe          (m+p-1) (f+i+w)                           gpipe-2bp   (m+p-1) (f+i) + m w
    1f1b           (m+p-1) (f+i+w)                           1f1b-2bp    (2p-1) (f+i) + w for m = p
    zb-h1          m (f+i+w) + (p-1) (f+i-w)                 zb-h2       m (f+i+w) + (p-1) f for f = i = w, m >= 2p-1

GPipe (arXiv 1811.06965), 1F1B (PipeDream, SOSP 2019; Megatron, arXiv 2104.04473), 2BP (arXiv 2405.18047: no weight gradient until
the last forward, then one after each input gradient), zero bubble H1 and H2 (arXiv 2401.10241).
"""

from __future__ import annotations

from ....runtime.schedule.instruction import Instr, Op

Order = list[list[Instr]]
"""Compute instructions of each rank."""


def naive(ranks: int, micro_batches: int, *, split: bool = False) -> Order:
    """One micro-batch at a time passes through all stages and back."""
    order: Order = []
    for rank in range(ranks):
        row: list[Instr] = []
        for m in range(micro_batches):
            row.append(Instr(Op.F, rank, m))
            row += [Instr(Op.I, rank, m), Instr(Op.W, rank, m)] if split else [Instr(Op.B, rank, m)]
        order.append(row)
    return order


def gpipe(ranks: int, micro_batches: int, *, split: bool = False) -> Order:
    """All forwards, then all backwards."""
    order: Order = []
    for rank in range(ranks):
        row = [Instr(Op.F, rank, m) for m in range(micro_batches)]
        row += [Instr(Op.I if split else Op.B, rank, m) for m in range(micro_batches)]
        order.append(row + ([Instr(Op.W, rank, m) for m in range(micro_batches)] if split else []))
    return order


def one_f_one_b(ranks: int, micro_batches: int, *, split: bool = False) -> Order:
    """p - r forwards, then backward and forward in turns, then the remaining backwards (with 2BP: each followed by a W)."""
    order: Order = []
    backward = Op.I if split else Op.B
    for rank in range(ranks):
        warm = min(ranks - rank, micro_batches)
        row = [Instr(Op.F, rank, m) for m in range(warm)]
        for m in range(micro_batches - warm):
            row += [Instr(backward, rank, m), Instr(Op.F, rank, m + warm)]
        for weights, m in enumerate(range(micro_batches - warm, micro_batches)):
            row.append(Instr(backward, rank, m))
            row += [Instr(Op.W, rank, weights)] if split else []
        order.append(row + ([Instr(Op.W, rank, m) for m in range(warm, micro_batches)] if split else []))
    return order


def zb_h1(ranks: int, micro_batches: int) -> Order:
    """The memory of 1F1B; weight gradients lag by r micro-batches on rank r and fill the end."""
    return _zero_bubble(ranks, micro_batches, warm=1, lag=1)


def zb_h2(ranks: int, micro_batches: int) -> Order:
    """Twice the forwards in flight: no bubble but the first forwards', for equal costs."""
    return _zero_bubble(ranks, micro_batches, warm=2, lag=2)


def _zero_bubble(ranks: int, micro_batches: int, warm: int, lag: int) -> Order:
    """warm * (p-1-r) forwards, then (F, I) pairs, each with the W of ``lag * r`` micro-batches ago."""
    order: Order = []
    for rank in range(ranks):
        ahead = min(warm * (ranks - 1 - rank), micro_batches)
        row = [Instr(Op.F, rank, m) for m in range(ahead)]
        for m in range(micro_batches):
            row += [Instr(Op.F, rank, m + ahead)] if m + ahead < micro_batches else []
            row.append(Instr(Op.I, rank, m))
            row += [Instr(Op.W, rank, m - lag * rank)] if m >= lag * rank else []
        done = max(0, micro_batches - lag * rank)
        order.append(row + [Instr(Op.W, rank, m) for m in range(done, micro_batches)])
    return order


def forwards_only(ranks: int, micro_batches: int) -> Order:
    """Inference: every rank runs its stage for one micro-batch after the other."""
    return [[Instr(Op.F, rank, m) for m in range(micro_batches)] for rank in range(ranks)]
