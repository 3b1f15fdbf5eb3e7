"""A whole transformer block under tensor parallelism, forward and backward: with tile loops, and with collectives as they are."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from common import Row, Sample, progress, versus
from tiles_ranks import AXIS, Ranks
from torch import Tensor, nn

import hocket
from hocket.compiler.cost.cluster import Cluster
from hocket.compiler.doors.hall import Options, compile_program
from hocket.compiler.doors.overlap import OverlapTiles
from hocket.compiler.layout import local_shape, parse_placement
from hocket.compiler.plan.tactics import RewriteTactic, SequenceParallel, Tactic, TensorParallel
from hocket.compiler.program import Program
from hocket.runtime.program import RankProgram
from hocket.runtime.transports.transport import LinkCost

CLAIM = "transformer block, forward and backward, TP = 2"
WIDTH, LENGTH = 256, 128


class Block(nn.Module):
    """Attention and MLP with residuals."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.first, self.second = nn.LayerNorm(width), nn.LayerNorm(width)
        self.q, self.k, self.v, self.o = (nn.Linear(width, width, bias=False) for _ in range(4))
        self.up, self.down = nn.Linear(width, 4 * width, bias=False), nn.Linear(4 * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        size = (*x.shape[:2], self.heads, -1)
        q, k, v = (f(h).view(size).transpose(1, 2) for f in (self.q, self.k, self.v))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(x.shape)
        x = x + self.o(mixed)
        return x + self.down(F.gelu(self.up(self.second(x))))


def step_rows(ranks: Ranks, cluster: Cluster, repeats: int, *, with_bf16: bool) -> list[Row]:
    """fp32, and bf16 where the machine has a unit for it; Megatron's tensor parallelism, without and with that of the sequence."""
    rows = []
    for label, dtype in (("fp32", torch.float32), *([("bf16", torch.bfloat16)] if with_bf16 else [])):
        for name, tactic in (("", TensorParallel(AXIS)), (" and sequence", SequenceParallel(AXIS))):
            case = f"width {WIDTH}, 4 x {LENGTH} tokens, {label}{name}"
            progress(f"block: {case}")
            block = Captured.of(dtype)
            texts, loops = {}, 0
            texts["apart"], _, inputs = block.compiled(ranks, cluster, [tactic])
            texts["loops"], loops, _ = block.compiled(ranks, cluster, [tactic, OverlapTiles()])
            texts["gloo apart"] = texts["apart"]
            found = {n: Sample(tuple(v)) for n, v in ranks.within(5.0, repeats, "program", texts, inputs).items()}
            rows.append(versus(CLAIM, f"{case}: against gloo ({loops} loops)", found["loops"], "gloo", found["gloo apart"], 2.5))
            rows.append(versus(CLAIM, f"{case}: against shared memory", found["loops"], "shared memory", found["apart"], 1.15))
    return rows


def linked_rows(ranks: Ranks, cluster: Cluster, repeats: int, *, quick: bool) -> list[Row]:
    """The same block over an emulated link whose collectives take ``rho`` times as long as the computation. What is hidden: of what
    the link adds to the step on a link that takes no time."""
    block, rows = Captured.of(torch.float32), []
    apart, _, inputs = block.compiled(ranks, cluster, [TensorParallel(AXIS)])
    alone = statistics.median(ranks.times("program", {"link": apart}, inputs, 5, (0.0, 0.0))["link"])
    nbytes = 4.0 * 4 * LENGTH * WIDTH * 4  # two all-reduces forward, two backward, of the activations
    for rho in (0.5,) if quick else (0.25, 0.5, 1.0):
        line = (2e-5, max(0.0, rho * alone - 8 * 2e-5) / nbytes)
        over = cluster.over(LinkCost(*line))
        progress(f"block over an emulated link, wire / compute = {rho}")
        ways = {
            "order": OverlapTiles(least_gain=1e9),
            "halves": OverlapTiles(least_gain=1e9, nano_batch=True),
            "loops": OverlapTiles(),
            "halves and loops": OverlapTiles(nano_batch=True),
        }
        texts, loops = {"link apart": apart}, 0
        for name, tactic in ways.items():
            texts[f"link {name}"], count, _ = block.compiled(ranks, over, [TensorParallel(AXIS), tactic])
            loops = count if name == "loops" else loops
        found = {n.removeprefix("link "): Sample(tuple(v)) for n, v in ranks.times("program", texts, inputs, repeats, line).items()}
        before = found["apart"].median
        hidden = {name: (before - found[name].median) / (before - alone) for name in ways}
        text = ", ".join(f"{name} {share:.2f}" for name, share in hidden.items())
        best = max(hidden, key=hidden.__getitem__)
        times = f"{before * 1e3:.1f} -> {found[best].median * 1e3:.1f} ms"
        text = f"{text} hidden; {times} ({best}; {loops} loops; {alone * 1e3:.1f} without a link)"
        ratio = before / found[best].median
        rows.append(
            Row("transformer block over an emulated link", f"wire / compute = {rho}", hidden[best], "", {}, ratio, text=text)
        )
    return rows


@dataclass(frozen=True)
class Captured:
    """The block as a program."""

    program: Program

    @classmethod
    def of(cls, dtype: torch.dtype) -> Captured:
        """Capture it, forward and backward."""
        return cls(hocket.capture(Block(WIDTH, 8).to(dtype), (torch.randn(4, LENGTH, WIDTH, dtype=dtype),)))

    def compiled(
        self, ranks: Ranks, cluster: Cluster, tactics: Sequence[Tactic | RewriteTactic]
    ) -> tuple[str, int, list[tuple[tuple[int, ...], str]]]:
        """The instruction list, its number of loops, and what rank 0 is given."""
        made = compile_program(self.program, Options(ranks.mesh, tactics=tactics, level="off", cluster=cluster))
        loops = sum(d.applied and d.by == "tiles" for d in made.lowered.decisions)
        return made.instructions.to_json(), loops, ports(made.instructions, ranks)


def ports(program: RankProgram, ranks: Ranks) -> list[tuple[tuple[int, ...], str]]:
    """What rank 0 is given: local shapes and dtypes."""
    return [(local_shape(p.shape, tuple(map(parse_placement, p.layout)), ranks.mesh), p.dtype) for p in program.inputs]
