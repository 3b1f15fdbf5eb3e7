"""Gradients of few and of many rows under data parallelism: added up over ranks, or made of gathered factors."""

from __future__ import annotations

import torch
from common import Row, Sample, progress
from tiles_ranks import AXIS, Ranks
from tiles_step import ports
from torch import nn

import hocket
from hocket.compiler.cost.cluster import Cluster
from hocket.compiler.doors.hall import Compiled, Options, compile_program
from hocket.compiler.plan.tactics import DataParallel
from hocket.compiler.program import Program
from hocket.passes.swaps.swap import SwapProducts
from hocket.runtime.mesh import Mesh
from hocket.runtime.transports.transport import LinkCost

CLAIM = "gradients as sums or as factors, data parallel, 2 ranks"
WIDTH = 512
LINK = LinkCost(2e-5, 1e-9)


def swap_rows(ranks: Ranks, cluster: Cluster, repeats: int, *, quick: bool) -> list[Row]:
    """A step of two layers on a link of 1 GB/s and in shared memory: what the pass chooses beside both ways, forced."""
    rows = []
    for tokens in (32, 1024) if quick else (32, 128, 512, 2048):
        model = nn.Sequential(nn.Linear(WIDTH, WIDTH, bias=False), nn.ReLU(), nn.Linear(WIDTH, WIDTH, bias=False))
        program = hocket.capture(model, (torch.randn(tokens, WIDTH),))
        for where, prefix, costs in (("link of 1 GB/s", "link ", cluster.over(LINK)), ("shared memory", "", cluster)):
            progress(f"{tokens} rows, {where}")
            made = {"sums": _compiled(program, ranks.mesh, costs, 1e9), "factors": _compiled(program, ranks.mesh, costs, -1e9)}
            decisions = _decisions(_compiled(program, ranks.mesh, costs, 0.03))
            swapped = sum(d.applied for d in decisions)
            if swapped not in (0, len(decisions)):
                made["both"] = _compiled(program, ranks.mesh, costs, 0.03)
            texts = {prefix + name: one.instructions.to_json() for name, one in made.items()}
            line = (LINK.alpha, LINK.beta)
            timed = ranks.times("program", texts, ports(made["sums"].instructions, ranks), repeats, line)
            found = {name.removeprefix("link "): Sample(tuple(values)) for name, values in timed.items()}
            chosen = "both" if "both" in found else "factors" if swapped else "sums"
            best = min(found, key=lambda name: found[name].median)
            times = ", ".join(f"{name} {sample}" for name, sample in found.items())
            text = f"{times}; chosen: {chosen}, {found[chosen].median / found[best].median - 1:.1%} above the best"
            ratio = found["sums"].median / found[chosen].median
            rows.append(
                Row(CLAIM, f"{tokens} rows, 2 x {WIDTH} x {WIDTH}, {where}", found[chosen].median, "s", {}, ratio, text=text)
            )
    return rows


def _compiled(program: Program, mesh: Mesh, cluster: Cluster, least_gain: float) -> Compiled:
    tactics = [DataParallel(AXIS), hocket.Rewrites(after=(SwapProducts(least_gain=least_gain),))]
    return compile_program(program, Options(mesh, tactics=tactics, level="off", cluster=cluster))


def _decisions(made: Compiled) -> list[hocket.Decision]:
    return [d for d in made.lowered.decisions if d.by == SwapProducts.name and "factors" in d.reason]
