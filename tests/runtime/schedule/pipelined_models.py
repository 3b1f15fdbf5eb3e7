"""Small models cut into stages, and what a plain sequential run of their micro-batches gives."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hocket.compiler.capture import capture
from hocket.compiler.contract import Context
from hocket.compiler.cost.cluster import Cluster
from hocket.compiler.plan.pipeline.stage_code import states_of
from hocket.compiler.program import Phase, Program, RoleKind, note
from hocket.compiler.rules.table import RuleTable
from hocket.compiler.stages import Pipeline
from hocket.passes.backward_split import BackwardSplit
from hocket.passes.pipeline import cut_stages
from hocket.runtime.mesh import Mesh
from hocket.runtime.schedule.stage import Port, StageState


class Residual(nn.Module):
    """A block with everything that goes wrong easily: a skip, a norm, a bias, a product that is used twice."""

    def __init__(self, width: int, norm: str = "layer") -> None:
        super().__init__()
        self.norm: nn.Module = nn.LayerNorm(width) if norm == "layer" else nn.BatchNorm1d(width)
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.up(self.norm(x)))
        return x + self.down(hidden * hidden)


class Chain(nn.Module):
    """Residual blocks and a scalar loss."""

    def __init__(self, depth: int, width: int = 8, norm: str = "layer") -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Residual(width, norm) for _ in range(depth))
        self.head = nn.Linear(width, 3)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return nn.functional.cross_entropy(self.head(x), y)


@dataclass
class Case:
    """A model, its program, and its pipeline."""

    model: nn.Module
    program: Program
    pipeline: Pipeline

    def tensors(self) -> dict[Port, Tensor]:
        """Everything the model holds, copied."""
        found = {Port("param", name): p.detach().clone() for name, p in self.model.named_parameters(remove_duplicate=False)}
        return found | {Port("buffer", name): b.detach().clone() for name, b in self.model.named_buffers()}

    def states(self, *, products: bool = False) -> list[StageState]:
        """Fresh stages."""
        return states_of(self.pipeline, self.tensors(), products=products)

    def given(self, batch: Sequence[Tensor]) -> dict[str, Tensor]:
        """A micro-batch's inputs."""
        found = {f"args[{i}]": tensor for i, tensor in enumerate(batch)}
        for role in self.program.signature.inputs:
            if role.kind is RoleKind.TANGENT:
                found[role.name] = torch.ones(())
            elif role.kind is RoleKind.SEED:
                found[role.name] = torch.tensor(len(batch))
        return found

    def accumulated(self, batches: Sequence[Sequence[Tensor]]) -> tuple[list[Tensor], dict[str, Tensor]]:
        """Losses and gradients of eager PyTorch, one micro-batch after the other."""
        self.model.zero_grad()
        losses = []
        for batch in batches:
            loss = self.model(*batch)
            loss.backward()
            losses.append(loss.detach())
        return losses, {name: p.grad.clone() for name, p in self.model.named_parameters() if p.grad is not None}


def cut(model: nn.Module, example: Sequence[Tensor], stages: int) -> Case:
    """Cut a model into stages of about as many calls each."""
    program = capture(model, tuple(example))
    split = BackwardSplit()(program, Context(Mesh.parse("d=1"), RuleTable(), Cluster.default()))
    calls = [n for n in split.nodes if n.op == "call_function" and note(n).phase is Phase.FORWARD]
    forward = {node.name: min(place * stages // len(calls), stages - 1) for place, node in enumerate(calls)}
    return Case(model, program, cut_stages(split, forward))


def batches(count: int, rows: Sequence[int] = (), width: int = 8) -> list[tuple[Tensor, Tensor]]:
    """Micro-batches of a chain."""
    generator = torch.Generator().manual_seed(count)
    sizes = rows or [4] * count
    return [(torch.randn(n, width, generator=generator), torch.randint(0, 3, (n,), generator=generator)) for n in sizes]
