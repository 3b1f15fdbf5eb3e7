"""A whole transformer block under tensor parallelism, forward and backward: with tile loops, and with collectives as they are."""

from __future__ import annotations

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
from hocket.compiler.plan.tactics import TensorParallel
from hocket.runtime.program import RankProgram

CLAIM = "transformer block, forward and backward, TP = 2"


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
    """fp32, and bf16 where the machine has a unit for it."""
    rows = []
    width, length = 256, 128
    for label, dtype in (("fp32", torch.float32), *([("bf16", torch.bfloat16)] if with_bf16 else [])):
        case = f"width {width}, 4 x {length} tokens, {label}"
        progress(f"block: {case}")
        model, x = Block(width, 8).to(dtype), torch.randn(4, length, width, dtype=dtype)
        program = hocket.capture(model, (x,))
        texts, inputs, loops = {}, [], 0
        for name, tactics in (("apart", [TensorParallel(AXIS)]), ("loops", [TensorParallel(AXIS), OverlapTiles()])):
            options = Options(ranks.mesh, tactics=tactics, level="off", cluster=cluster)
            compiled = compile_program(program, options)
            texts[name] = compiled.instructions.to_json()
            inputs = ports(compiled.instructions, ranks)
            loops = sum(d.applied and d.by == "tiles" for d in compiled.lowered.decisions)
        texts["gloo apart"] = texts["apart"]
        found = {n: Sample(tuple(v)) for n, v in ranks.within(5.0, repeats, "program", texts, inputs).items()}
        rows.append(versus(CLAIM, f"{case}: against gloo ({loops} loops)", found["loops"], "gloo", found["gloo apart"], 2.5))
        rows.append(versus(CLAIM, f"{case}: against shared memory", found["loops"], "shared memory", found["apart"], 1.15))
    return rows


def ports(program: RankProgram, ranks: Ranks) -> list[tuple[tuple[int, ...], str]]:
    """What rank 0 is given: local shapes and dtypes."""
    return [(local_shape(p.shape, tuple(map(parse_placement, p.layout)), ranks.mesh), p.dtype) for p in program.inputs]
