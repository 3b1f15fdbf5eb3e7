"""Whole joint graphs: a model equals itself under torch's decompositions, fused kernels equal their definitions, mutants differ."""

from __future__ import annotations

import math

import pytest
import torch
import torch.fx as fx
import torch.nn.functional as F
from torch import nn
from torch._decomp import core_aten_decompositions
from torch.fx.experimental.proxy_tensor import make_fx

from hocket.compiler.capture import capture
from hocket.compiler.program import Program, copy_program
from hocket.compiler.verify.ring.algebra import Algebra
from hocket.compiler.verify.ring.arithmetic import ring_of
from hocket.compiler.verify.ring.compare import compare
from hocket.compiler.verify.ring.eager import RingArray
from hocket.compiler.verify.ring.equality import same
from hocket.compiler.verify.ring.evaluate import apply
from hocket.compiler.verify.ring.value import RingTensor

aten = torch.ops.aten


class Block(nn.Module):
    """Embedding, RMS norm, rotary attention with shared key/value heads, SwiGLU, cross entropy."""

    def __init__(self, fused: bool) -> None:
        super().__init__()
        self.fused = fused
        self.table = nn.Embedding(16, 8)
        self.gain = nn.Parameter(torch.ones(8))
        self.qkv, self.out = nn.Linear(8, 16), nn.Linear(8, 8)
        self.gate, self.up, self.down = nn.Linear(8, 12), nn.Linear(8, 12), nn.Linear(12, 8)
        self.head = nn.Linear(8, 16)

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        if self.fused:
            return F.scaled_dot_product_attention(q, k, v, is_causal=True)
        scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
        hidden = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool).triu(1)
        return scores.masked_fill(hidden, -math.inf).softmax(-1) @ v

    def forward(self, ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        x = self.table(ids)
        h = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5) * self.gain
        q, k, v = (t.unflatten(-1, (-1, 2)).transpose(1, 2) for t in self.qkv(h).split([8, 4, 4], -1))
        k, v = k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)
        x = x + self.out(self.attend(q, k, v).transpose(1, 2).flatten(2))
        x = x + self.down(F.silu(self.gate(x)) * self.up(x))
        return F.cross_entropy(self.head(x).flatten(0, 1), labels.flatten())


class Experts(nn.Module):
    """Layer norm, a top-2 router, GELU experts, a balance loss and a z loss."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.router = nn.LayerNorm(6), nn.Linear(6, 4, bias=False)
        self.first, self.second = nn.Parameter(torch.randn(4, 6, 5)), nn.Parameter(torch.randn(4, 5, 6))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.norm(x)
        logits = self.router(h)
        p = logits.softmax(-1)
        weights, chosen = p.topk(2, -1)
        weights = weights / weights.sum(-1, keepdim=True)
        gate = torch.zeros_like(p).scatter(1, chosen, weights)
        hidden = F.gelu(torch.einsum("td,edf->etf", h, self.first))
        y = torch.einsum("etf,efd,te->td", hidden, self.second, gate)
        share = torch.zeros_like(p).scatter(1, chosen, 1.0).mean(0)
        return (x + y).square().mean() + 0.01 * (share * p.mean(0)).sum() + 0.001 * logits.logsumexp(-1).pow(2).mean()


class Residual(nn.Module):
    """Convolutions (grouped, strided), batch norm with running statistics, pooling, a residual."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.inner, self.second = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.depth, self.head = nn.Conv2d(4, 4, 3, stride=2, padding=1, groups=4), nn.Linear(4, 5)

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        x = F.max_pool2d(F.relu(self.norm(self.stem(x))), 2)
        x = F.relu(x + self.second(self.inner(x)))
        return F.cross_entropy(self.head(F.adaptive_avg_pool2d(self.depth(x), 1).flatten(1)), labels)


def model_and_inputs(name: str) -> tuple[nn.Module, tuple[torch.Tensor, ...]]:
    torch.manual_seed(1)
    ids = torch.randint(0, 16, (2, 5))
    if name == "experts":
        return Experts(), (torch.randn(7, 6),)
    if name == "residual":
        return Residual(), (torch.randn(3, 3, 8, 8), torch.tensor([0, 2, 4]))
    return Block(fused=name == "fused block"), (ids, ids)


MODELS = ("block", "fused block", "experts", "residual")


def decomposed(program: Program) -> Program:
    """The same graph with torch's core decompositions, but for the attention kernels (torch decomposes only their forward)."""
    table = {op: rule for op, rule in core_aten_decompositions().items() if "scaled_dot_product" not in str(op)}
    graph = make_fx(lambda *inputs: fx.Interpreter(program.graph).run(*inputs), decomposition_table=table, tracing_mode="fake")(
        *[torch.zeros_like(node.meta["val"], device="cpu") for node in program.placeholders]
    )
    present = iter(node for node in graph.graph.nodes if node.op == "output")
    assert next(present) is not None
    return program.replace(graph=graph)


@pytest.mark.parametrize("name", MODELS)
def test_a_joint_graph_equals_its_decomposition(name: str) -> None:
    model, args = model_and_inputs(name)
    program = capture(model, args)
    other = decomposed(program)
    assert {str(node.target) for node in other.nodes} != {str(node.target) for node in program.nodes}
    verdict = compare(program, other, seeds=2)
    assert verdict.equal, str(verdict)


def test_attention_written_out_equals_the_fused_kernel_with_all_gradients() -> None:
    (written, args), (fused, _) = model_and_inputs("block"), model_and_inputs("fused block")
    verdict = compare(capture(written, args), capture(fused, args))
    assert verdict.equal, str(verdict)


SWAPS = {
    aten.add.Tensor: aten.sub.Tensor,
    aten.silu.default: aten.sigmoid.default,
    aten.rsqrt.default: aten.sqrt.default,
    aten.maximum.default: aten.minimum.default,
    aten.relu.default: aten.neg.default,
}


def mutants(program: Program) -> list[tuple[str, Program]]:
    found = []
    for index, node in enumerate(program.nodes):
        if node.op != "call_function":
            continue
        copy, _ = copy_program(program)
        twin = copy.nodes[index]
        if node.target in SWAPS and all(isinstance(a, fx.Node) and a.meta["val"].is_floating_point() for a in node.args):
            twin.target = SWAPS[node.target]
        elif node.target in (aten.mul.Tensor, aten.add.Tensor) and isinstance(node.args[1], float):
            twin.args = (twin.args[0], twin.args[1] * 1.001)
        elif node.target is aten.transpose.int and node.meta["val"].shape[-1] == node.meta["val"].shape[-2]:
            twin.replace_all_uses_with(twin.args[0])
        else:
            continue
        copy.graph.recompile()
        found.append((node.format_node() or node.name, copy))
    return found


@pytest.mark.parametrize("name", MODELS)
def test_mutants_of_joint_graphs_are_killed(name: str) -> None:
    model, args = model_and_inputs(name)
    program = capture(model, args)
    chosen = mutants(program)[:: 3 if "block" in name else 1]
    alive = [text for text, mutant in chosen if compare(program, mutant, seeds=1, rings=[1559]).equal]
    assert len(chosen) >= 3
    assert not alive


def test_a_loss_can_be_differentiated_eagerly_over_the_ring() -> None:
    algebra = Algebra(ring_of(1559))
    generator = torch.Generator().manual_seed(0)
    x = RingArray(RingTensor(algebra.ring.random((3, 4), generator)), algebra, requires_grad=True)
    (x.exp() * x).sum().backward()
    assert isinstance(x.grad, RingArray)
    detached = x.ring_value
    expected = algebra.mul(algebra.exp(detached), algebra.add(detached, 1))
    assert same(algebra, x.grad.ring_value, expected)


def test_gpu_attention_kernels_mean_the_same_as_the_cpu_kernel() -> None:
    algebra = Algebra(ring_of(1559))
    generator = torch.Generator().manual_seed(0)
    q, k, v, g = (RingTensor(algebra.ring.random((2, heads, 3, 4), generator)) for heads in (4, 2, 2, 4))
    cpu = aten._scaled_dot_product_flash_attention_for_cpu
    out, lse = apply(algebra, cpu.default, (q, k, v, 0.0, True), {})
    grads = apply(algebra, aten._scaled_dot_product_flash_attention_for_cpu_backward.default, (g, q, k, v, out, lse, 0.0, True), {})
    state, none = torch.zeros(()).long(), None
    flash = apply(algebra, aten._scaled_dot_product_flash_attention.default, (q, k, v, 0.0, True), {})
    efficient = apply(algebra, aten._scaled_dot_product_efficient_attention.default, (q, k, v, none, True, 0.0, True), {})
    cudnn = apply(algebra, aten._scaled_dot_product_cudnn_attention.default, (q, k, v, none, True, 0.0, True), {})
    assert all(same(algebra, out, other[0]) for other in (flash, efficient, cudnn))
    assert efficient[1].shape == (2, 4, 32)
    assert cudnn[1].shape == (2, 4, 3, 1)
    flash_grads = apply(
        algebra,
        aten._scaled_dot_product_flash_attention_backward.default,
        (g, q, k, v, flash[0], flash[1], none, none, 3, 3, 0.0, True, state, state),
        {},
    )
    efficient_grads = apply(
        algebra,
        aten._scaled_dot_product_efficient_attention_backward.default,
        (g, q, k, v, none, efficient[0], efficient[1], state, state, 0.0, [True, True, True, False], True),
        {},
    )
    cudnn_grads = apply(
        algebra,
        aten._scaled_dot_product_cudnn_attention_backward.default,
        (g, q, k, v, cudnn[0], cudnn[1], state, state, none, none, none, 3, 3, 0.0, True),
        {},
    )
    for other in (flash_grads, efficient_grads, cudnn_grads):
        assert all(same(algebra, a, b) for a, b in zip(grads, other, strict=False))
