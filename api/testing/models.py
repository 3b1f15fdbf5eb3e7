"""Small models on which checkers are measured: the kinds of layers that parallel programs are made of, at tiny sizes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..compiler.capture import capture
from ..compiler.contract import Context
from ..compiler.cost.cluster import Cluster
from ..compiler.plan.planner import plan
from ..compiler.plan.tactics import DataParallel, SequenceParallel, Tactic, TensorParallel, Zero
from ..compiler.program import Program
from ..compiler.rules.table import RuleTable
from ..passes.shard import Shard
from ..runtime.mesh import Mesh

BATCH, SEQUENCE, WIDTH, HEADS, WORDS = 4, 6, 8, 4, 12


class Perceptron(nn.Module):
    """Two linear layers, a LayerNorm and a squared error."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        """Scalar loss of [batch, width] inputs."""
        return F.mse_loss(x + self.down(torch.tanh(self.up(self.norm(x)))), target)


class Attention(nn.Module):
    """Causal self-attention with biases."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        """[batch, sequence, width] to the same."""
        batch, sequence, width = x.shape
        q, k, v = (m(x).view(batch, sequence, HEADS, -1).transpose(1, 2) for m in (self.q, self.k, self.v))
        scores = q @ k.transpose(-1, -2) / (width // HEADS) ** 0.5
        hidden = torch.ones(sequence, sequence, dtype=torch.bool).triu(1)
        mixed = scores.masked_fill(hidden, float("-inf")).softmax(-1) @ v
        return x + self.out(mixed.transpose(1, 2).reshape(batch, sequence, width))  # type: ignore[no-any-return]


class RootMeanSquare(nn.Module):
    """RMSNorm."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        """x / sqrt(mean x^2 + eps)."""
        return self.weight * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5))


class Llama(nn.Module):
    """One layer: embedding, RMSNorm, rotary attention, SwiGLU, cross entropy."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(WORDS, WIDTH), nn.Linear(WIDTH, WORDS, bias=False)
        self.norm1, self.norm2, self.norm3 = RootMeanSquare(), RootMeanSquare(), RootMeanSquare()
        self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(4))
        self.gate, self.up = (nn.Linear(WIDTH, 2 * WIDTH, bias=False) for _ in range(2))
        self.down = nn.Linear(2 * WIDTH, WIDTH, bias=False)

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """Mean cross entropy of [batch, sequence] tokens."""
        x = self.embed(tokens)
        x = x + self._attend(self.norm1(x))
        h = self.norm2(x)
        x = x + self.down(F.silu(self.gate(h)) * self.up(h))
        logits = self.head(self.norm3(x))
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())

    def _attend(self, x: Tensor) -> Tensor:
        batch, sequence, width = x.shape
        q, k, v = (m(x).view(batch, sequence, HEADS, -1).transpose(1, 2) for m in (self.q, self.k, self.v))
        mixed = F.scaled_dot_product_attention(self._turn(q), self._turn(k), v, is_causal=True)
        return self.o(mixed.transpose(1, 2).reshape(batch, sequence, width))  # type: ignore[no-any-return]

    @staticmethod
    def _turn(x: Tensor) -> Tensor:
        half = x.shape[-1] // 2
        angle = torch.arange(x.shape[-2], dtype=x.dtype)[:, None] / 10 ** torch.arange(half, dtype=x.dtype)
        first, second = x[..., :half], x[..., half:]
        cos, sin = angle.cos(), angle.sin()
        return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)


class Experts(nn.Module):
    """A soft mixture of experts with an auxiliary loss on the router."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(WIDTH, 4)
        self.up = nn.Parameter(torch.randn(4, WIDTH, WIDTH) / 3)
        self.down = nn.Parameter(torch.randn(4, WIDTH, WIDTH) / 3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """[tokens, width] to the same, and the auxiliary loss."""
        weights = self.router(x).softmax(-1)
        hidden = F.gelu(torch.einsum("td,edf->etf", x, self.up), approximate="tanh")
        mixed = torch.einsum("etf,efd,te->td", hidden, self.down, weights)
        return mixed, (weights.mean(0).square().sum() + self.router(x).logsumexp(-1).square().mean())


class Convolution(nn.Module):
    """Convolution, BatchNorm in training mode, ReLU, pooling, classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.out = nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        """[batch, 2, 4, 4] to [batch, 3]."""
        return self.out(F.relu(self.norm(self.conv(x))).mean((2, 3)))  # type: ignore[no-any-return]


def _tokens() -> Tensor:
    return torch.randint(0, WORDS, (BATCH, SEQUENCE))


Case = tuple[type[nn.Module], tuple[Any, ...], str, Sequence[Tactic]]

CASES: dict[str, Case] = {
    "perceptron, data parallel": (Perceptron, (torch.randn(BATCH, WIDTH), torch.randn(BATCH, WIDTH)), "dp=2", [DataParallel("dp")]),
    "perceptron, ZeRO-3": (Perceptron, (torch.randn(BATCH, WIDTH), torch.randn(BATCH, WIDTH)), "dp=2", [Zero("dp", stage=3)]),
    "attention, tensor parallel": (Attention, (torch.randn(2, SEQUENCE, WIDTH),), "tp=2", [TensorParallel("tp")]),
    "attention, sequence parallel": (Attention, (torch.randn(2, SEQUENCE, WIDTH),), "tp=2", [SequenceParallel("tp")]),
    "llama, tensor parallel": (Llama, (_tokens(), _tokens()), "tp=2", [TensorParallel("tp")]),
    "llama, data and tensor parallel": (Llama, (_tokens(), _tokens()), "dp=2,tp=2", [DataParallel("dp"), TensorParallel("tp")]),
    "experts, data parallel": (Experts, (torch.randn(8, WIDTH),), "dp=2", [DataParallel("dp")]),
    "experts, tensor parallel": (Experts, (torch.randn(8, WIDTH),), "tp=2", [TensorParallel("tp")]),
    "convolution, data parallel": (Convolution, (torch.randn(BATCH, 2, 4, 4),), "dp=2", [DataParallel("dp")]),
}
"""Name -> (model, arguments, mesh, tactics)."""

TABLE = RuleTable(None)


def lowered(case: str, *, outputs: str = "any") -> tuple[Program, Program]:
    """(program, program lowered by the case's plan). outputs: "any", or "replicate" where every rank is to hold all of them."""
    model, args, mesh_text, tactics = CASES[case]
    torch.manual_seed(0)
    program = capture(model(), args)
    mesh, cluster = Mesh.parse(mesh_text), Cluster.default()
    chosen = plan(program, mesh, TABLE, cluster, tactics, outputs=outputs, gradients="like-params")
    return program, Shard()(program, Context(mesh, TABLE, cluster, chosen))
