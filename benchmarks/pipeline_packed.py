"""What leaving padding out of per-token work saves: one forward of an encoder on padded and on packed tokens, one thread."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from common import Row, Sample, progress, versus
from torch import Tensor, nn

from hocket.compiler.capture import capture
from hocket.compiler.contract import Context
from hocket.compiler.cost.cluster import Cluster
from hocket.compiler.plan.pipeline.stage_code import held_by, part_code
from hocket.compiler.program import Program
from hocket.compiler.rules.table import RuleTable
from hocket.passes.packed_tokens import PackedTokens
from hocket.passes.pipeline import cut_stages
from hocket.runtime.communicator import SingleCommunicator
from hocket.runtime.mesh import Mesh
from hocket.runtime.schedule.serve import StageCall, stage_calls
from hocket.runtime.schedule.stage import Port, StageCode, StageState

ROWS, LENGTH, WIDTH = 16, 128, 256
MASK = "kwargs['mask']"
SHARES = (0.25, 0.5, 0.75)


class Encoder(nn.Module):
    """Two blocks of attention and feed-forward."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(WIDTH, 4, 4 * WIDTH, 0.0, F.gelu, batch_first=True) for _ in range(2)
        )

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """[rows, positions, width]; mask [rows, positions]."""
        seen = torch.zeros(mask.shape).masked_fill(mask == 0, float("-inf"))
        for block in self.blocks:
            x = block(x, src_key_padding_mask=seen)
        return x


def rows(*, quick: bool) -> list[Row]:
    """For several shares of valid tokens."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model, found = Encoder().requires_grad_(requires_grad=False), []
    x, context = torch.randn(ROWS, LENGTH, WIDTH), Context(Mesh.parse("d=1"), RuleTable(), Cluster.default())
    program = capture(model, (x,), {"mask": torch.ones(ROWS, LENGTH, dtype=torch.long)})
    padded = _call(program, model)
    for share in SHARES:
        progress(f"packed tokens, {share:.0%} valid")
        lengths = torch.full((ROWS, 1), int(share * LENGTH))
        mask = (torch.arange(LENGTH) < lengths).long()
        packed = _call(PackedTokens(MASK, int(mask.sum()))(program, context), model)
        given = {"args[0]": x, MASK: mask}
        times = _alternate({"padded": partial(padded, given), "packed": partial(packed, given)}, 3 if quick else 9)
        case = f"encoder of width {WIDTH}, {ROWS} x {LENGTH} tokens, {share:.0%} valid"
        found.append(versus("packed tokens", case, times["packed"], "padded", times["padded"]))
    return found


def _alternate(runs: dict[str, Callable[[], object]], repeats: int) -> dict[str, Sample]:
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats + 1):
        for name, run in runs.items():
            start = time.process_time()
            run()
            seconds[name].append(time.process_time() - start)
    return {name: Sample(tuple(values[1:])) for name, values in seconds.items()}


def _call(program: Program, model: nn.Module) -> StageCall:
    (stage,) = cut_stages(program, {}).stages
    forward = part_code(stage.parts[0], SingleCommunicator())
    tensors = {Port("param", name): p for name, p in model.named_parameters()}
    (call,) = stage_calls([StageState(StageCode(0, forward), held_by(stage, tensors))])
    return call
