"""Tracing repeated blocks once gives the graph of ordinary tracing; what cannot be copied is traced in full."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from capture_reference import assert_like_eager
from torch import nn
from torch.utils.checkpoint import checkpoint

from hocket.compiler.capture.front import Example
from hocket.compiler.capture.trace import Aim
from hocket.compiler.program import Program, Region, note


def both(model: nn.Module, *args: Any, train: bool = True, **kwargs: Any) -> tuple[Program, Program]:
    """The program traced with regions, and without."""
    found = [Example.of(model, args, kwargs).capture(Aim(train=train, regions=regions)) for regions in (True, False)]
    return found[0], found[1]


def copied(program: Program) -> list[str]:
    return [d.node for d in program.decisions if d.by == "capture" and d.applied and "copied from one trace" in d.reason]


def assert_identical(with_regions: Program, plain: Program) -> None:
    """Same ops, arguments, values and notes, node by node; names may be numbered differently."""
    assert with_regions.signature == plain.signature
    twin: dict[Any, Any] = {}
    for a, b in zip(with_regions.nodes, plain.nodes, strict=True):
        twin[a] = b
        assert a.op == b.op
        assert a.op == "placeholder" or a.target == b.target
        assert str(torch.fx.node.map_arg((a.args, a.kwargs), twin.__getitem__)) == str((b.args, b.kwargs))
        assert dataclasses.replace(note(a), origin="") == dataclasses.replace(note(b), origin="")
        if a.op != "output":
            for x, y in zip(
                torch.utils._pytree.tree_leaves(a.meta["val"]), torch.utils._pytree.tree_leaves(b.meta["val"]), strict=True
            ):
                assert (x.shape, x.stride(), x.dtype) == (y.shape, y.stride(), y.dtype)


class Attention(nn.Module):
    def __init__(self, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.qkv = nn.Linear(16, 48, bias=False)
        self.out = nn.Linear(16, 16)

    def forward(self, x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(x * scale).view(2, 6, 3, 4, 4).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(y.transpose(1, 2).reshape(2, 6, 16))


class Block(nn.Module):
    def __init__(self, layer: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(16)
        self.attention = Attention(layer)
        self.register_buffer("gain", torch.rand(16))

    def forward(self, x: torch.Tensor, *, rotary: tuple[torch.Tensor, int] | None = None) -> tuple[torch.Tensor, None]:
        assert rotary is not None
        return x + self.attention(self.norm(x) * self.gain, rotary[0]), None


class Stack(nn.Module):
    def __init__(self, depth: int = 4, block: Callable[[int], nn.Module] = Block, end: str = "") -> None:
        super().__init__()
        self.embedding = nn.Embedding(10, 16)
        self.layers = nn.ModuleList(block(i) for i in range(depth))
        self.head = nn.Linear(16, 10)
        self.end = end
        self.register_buffer("scale", torch.rand(16))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embedding(ids)
        for layer in self.layers:
            x, _ = layer(x, rotary=(self.scale, 3))
        return x.mean(1) if self.end == "mean" else x.sum() if self.end == "sum" else self.head(x)


IDS = torch.arange(12).remainder(10).view(2, 6)


@pytest.mark.parametrize("end", ["", "mean", "sum"])
@pytest.mark.parametrize("train", [True, False])
def test_the_graph_is_that_of_ordinary_tracing(end: str, train: bool) -> None:
    torch.manual_seed(0)
    with_regions, plain = both(Stack(end=end), IDS, train=train)
    assert copied(with_regions) == ["layers.*"]
    assert copied(plain) == []
    assert_identical(with_regions, plain)


@pytest.mark.parametrize("end", ["", "mean", "sum"])
def test_numbers_equal_eager(end: str) -> None:
    torch.manual_seed(0)
    assert copied(assert_like_eager(Stack(end=end), (IDS,))) == ["layers.*"]


def test_regions_are_noted_in_both_directions() -> None:
    program, _ = both(Stack(), IDS)
    regions = {note(node).region for node in program.nodes if note(node).phase != "forward"}
    assert regions - {None} == {Region("layers.*", copy) for copy in range(4)}
    assert {note(n).module for n in program.nodes if note(n).region == Region("layers.*", 2)} <= {
        *("layers.2", "layers.2.norm", "layers.2.attention", "layers.2.attention.qkv", "layers.2.attention.out")
    }


class ReadsItsLayer(Attention):
    def forward(self, x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        return super().forward(x, scale) * (self.layer + 1)


class Draws(Attention):
    def forward(self, x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        return F.dropout(super().forward(x, scale), 0.5)


class InPlace(Attention):
    def forward(self, x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        return super().forward(x, scale).relu_()


class Counts(Attention):
    def forward(self, x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        self.calls = getattr(self, "calls", 0) + 1
        return super().forward(x, scale)


class Closes(Attention):
    def forward(self, x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        return super().forward(x, scale) * torch.tensor(2.0)


class Checkpoints(Attention):
    def forward(self, x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        return checkpoint(super().forward, x, scale, use_reentrant=False)


def block_with(kind: type[nn.Module]) -> Callable[[int], nn.Module]:
    def make(layer: int) -> nn.Module:
        block = Block(layer)
        block.attention = kind(layer)
        return block

    return make


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (ReadsItsLayer, "differs between copies"),
        (Draws, "random numbers"),
        (InPlace, "in place"),
        (Counts, "Python state"),
        (Closes, "neither its own nor an argument"),
    ],
)
def test_an_unsafe_block_is_traced_in_full_and_says_why(kind: type[nn.Module], reason: str) -> None:
    torch.manual_seed(0)
    with_regions, plain = both(Stack(block=block_with(kind)), IDS)
    assert copied(with_regions) == []
    assert any(reason in d.reason for d in with_regions.decisions if not d.applied)
    assert_identical(with_regions, plain)


def test_a_block_that_checkpoints_inside_is_copied_with_its_recomputation() -> None:
    torch.manual_seed(0)
    model = Stack(block=block_with(Checkpoints))
    with_regions, plain = both(model, IDS)
    assert_identical(with_regions, plain)
    assert_like_eager(model, (IDS,))


def test_blocks_under_a_checkpoint_are_traced_in_full() -> None:
    class Outside(Stack):
        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            x = self.embedding(ids)
            for layer in self.layers:
                x, _ = checkpoint(layer, x, rotary=(self.scale, 3), use_reentrant=False)
            return self.head(x)

    torch.manual_seed(0)
    program = assert_like_eager(Outside(), (IDS,))
    assert copied(program) == []


def test_a_hook_on_one_block_keeps_only_that_block_apart() -> None:
    torch.manual_seed(0)
    model = Stack()
    model.layers[1].register_forward_hook(lambda module, inputs, output: (output[0] * 2, None))
    program = assert_like_eager(model, (IDS,))
    assert copied(program) == ["layers.*"]
    assert "3 calls of 3 blocks" in next(d.reason for d in program.decisions if d.node == "layers.*")


def test_shared_and_frozen_parameters() -> None:
    torch.manual_seed(0)
    model = Stack()
    model.layers[1].attention.out.weight = model.layers[0].attention.out.weight
    assert_like_eager(model, (IDS,))
    model = Stack()
    model.embedding.weight.requires_grad_(False)
    model.layers[2].norm.weight.requires_grad_(False)
    program = assert_like_eager(model, (IDS,))
    assert copied(program) == ["layers.*"]


def test_blocks_called_twice_skipped_and_branching() -> None:
    class Odd(Stack):
        def forward(self, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            x = self.embedding(ids)
            seen = []
            for layer in (self.layers[0], self.layers[2], self.layers[0]):
                x, _ = layer(x, rotary=(self.scale, 3))
                seen.append(x)
            side, _ = self.layers[1](seen[0], rotary=(self.scale, 3))
            return self.head(x) + self.head(side), torch.stack(seen)

    torch.manual_seed(0)
    assert_like_eager(Odd(), (IDS,))


def test_a_sequential_of_plain_blocks() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), *(nn.Sequential(nn.Linear(16, 16), nn.Tanh()) for _ in range(3)), nn.Linear(16, 2))
    with_regions, plain = both(model, torch.randn(4, 8))
    assert copied(with_regions) == ["*"]
    assert_identical(with_regions, plain)


def test_the_model_is_left_as_found() -> None:
    model = Stack()
    before = [dict(module.__dict__) for module in model.modules()]
    both(model, IDS)
    assert [dict(module.__dict__) for module in model.modules()] == before


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert"])
def test_public_models_are_copied_and_identical(name: str) -> None:
    pytest.importorskip("transformers")
    from test_capture_models import build

    torch.manual_seed(0)
    model, args, kwargs = build(name)
    with_regions, plain = both(model, *args, **kwargs)
    assert copied(with_regions), [d.reason for d in with_regions.decisions]
    assert_identical(with_regions, plain)


@pytest.mark.slow
def test_depth_costs_little() -> None:
    def seconds(depth: int) -> float:
        model = Stack(depth)
        start = time.process_time()
        Example.of(model, (IDS,), {}).capture(Aim(train=True))
        return time.process_time() - start

    seconds(4)
    plain = Stack(16)
    start = time.process_time()
    Example.of(plain, (IDS,), {}).capture(Aim(train=True, regions=False))
    assert seconds(48) < time.process_time() - start
