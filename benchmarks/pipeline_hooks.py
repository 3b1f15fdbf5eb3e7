"""Splitting a stage's backward: hocket's graph rewrite beside the autograd hooks of ``torch.distributed.pipelining``.

Every stage gets a floating-point input that needs a gradient, as an inner stage does. Times are CPU seconds of one thread; bytes
are those of the values that a micro-batch keeps alive, torch's counted by the C allocator.
"""

from __future__ import annotations

import ctypes
import dataclasses
import gc
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from common import Row, Sample, at_most, progress
from torch import Tensor, nn
from torch.distributed.pipelining._backward import stage_backward_input, stage_backward_weight

from hocket.compiler.capture import capture
from hocket.compiler.contract import Context
from hocket.compiler.cost.cluster import Cluster
from hocket.compiler.demo.llama import Llama, LlamaConfig
from hocket.compiler.plan.pipeline.stage_code import part_code
from hocket.compiler.program import Phase, Program, RoleKind, note
from hocket.compiler.rules.table import RuleTable
from hocket.compiler.stages import PartKind, StagePart
from hocket.passes.backward_split import BackwardSplit
from hocket.passes.pipeline import cut_stages
from hocket.runtime.communicator import SingleCommunicator
from hocket.runtime.mesh import Mesh

CLAIM = "splitting one stage's backward"
_PARTS = (PartKind.BACKWARD_INPUT, PartKind.BACKWARD_WEIGHT)


class Bottleneck(nn.Module):
    """ResNet's block of three convolutions with batch norm."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        inner = channels // 4
        sizes = ((channels, inner, 1), (inner, inner, 3), (inner, channels, 1))
        self.convs = nn.ModuleList(nn.Conv2d(i, o, k, padding=k // 2, bias=False) for i, o, k in sizes)
        self.norms = nn.ModuleList(nn.BatchNorm2d(o) for _, o, _ in sizes)

    def forward(self, x: Tensor) -> Tensor:
        """[rows, channels, height, width]."""
        y = x
        for i, (conv, norm) in enumerate(zip(self.convs, self.norms, strict=True)):
            y = norm(conv(y))
            y = F.relu(y) if i < 2 else y
        return F.relu(x + y)


class Cells(nn.Module):
    """An LSTM cell in a loop."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.cell = nn.LSTMCell(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """[rows, steps, width]."""
        h = c = torch.zeros_like(x[:, 0])
        found = []
        for t in range(x.shape[1]):
            h, c = self.cell(x[:, t], (h, c))
            found.append(h)
        return torch.stack(found, 1)


class Reused(nn.Module):
    """One norm and one linear layer, used three times."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """[rows, steps, width]."""
        for _ in range(3):
            x = x + self.linear(self.norm(x))
        return x


def stages(*, quick: bool) -> dict[str, Callable[[], tuple[nn.Module, Tensor]]]:
    """Name -> the stage and its input."""
    layers = 2 if quick else 4
    config = LlamaConfig(vocabulary=64, width=256, layers=layers, heads=4, kv_heads=4, hidden=688, context=256)
    return {
        f"Llama, {layers} layers of width 256": lambda: (LlamaBlocks(config), torch.randn(1, 256, 256)),
        f"ResNet, {layers} bottlenecks": lambda: (
            nn.Sequential(*(Bottleneck(64) for _ in range(layers))),
            torch.randn(8, 64, 28, 28),
        ),
        "LSTM cell, 16 steps of width 128": lambda: (Cells(128), torch.randn(8, 16, 128)),
        "norm and linear used 3 times": lambda: (Reused(256), torch.randn(4, 64, 256)),
    }


class LlamaBlocks(nn.Module):
    """The blocks of the demonstration's Llama, without embedding and head."""

    cos: Tensor
    sin: Tensor

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        whole = Llama(config)
        self.layers = whole.layers
        self.register_buffer("cos", whole.cos)
        self.register_buffer("sin", whole.sin)

    def forward(self, x: Tensor) -> Tensor:
        """[1, tokens, width]."""
        for layer in self.layers:
            x = layer(x, self.cos, self.sin)
        return x


def rows(*, quick: bool) -> list[Row]:
    """Time and memory of every stage."""
    found = []
    for name, make in stages(quick=quick).items():
        progress(f"splitting {name}")
        torch.manual_seed(0)
        module, x = make()
        found += _rows_of(name, module, x, 3 if quick else 9)
    return found


def _rows_of(name: str, module: nn.Module, x: Tensor, repeats: int) -> list[Row]:
    whole, split, hooks = Stage.of(module, x, split=False), Stage.of(module, x, split=True), Hooks(module, x)
    runs = {"whole": lambda: _cpu(whole.backward), "split": lambda: _cpu(split.backward), "eager": hooks.whole}
    torch_held = float("inf")
    try:
        hooks.halves()
        runs["halves"] = hooks.halves
        torch_held = hooks.held()
    except RuntimeError:
        progress("torch's split walks an autograd node twice and stops")
    times = _alternate(runs, repeats)
    ratio = Sample(tuple(a / b for a, b in zip(times["split"], times["whole"], strict=True)), "x")
    theirs = tuple(a / b for a, b in zip(times.get("halves", ()), times["eager"], strict=False))
    torch_ratio = Sample(theirs or (float("inf"),), "x")
    held = Sample((split.bytes_after(PartKind.BACKWARD_INPUT) / eager_bytes(module, x),), "x")
    rows = [
        at_most(CLAIM, f"(p1 + p2) / whole backward: {name} ({_beside(torch_ratio.median)})", ratio, 1.02),
        at_most(CLAIM, f"held from p1 to p2 / eager's activations: {name} ({_beside(torch_held)})", held, 0.75),
    ]
    peers = [{"torch's hooks": figure} if "halves" in runs else {} for figure in (torch_ratio.median, torch_held)]
    goals = {} if "halves" in runs else {"goal": "", "met": None}  # there is nothing to be better than
    return [dataclasses.replace(row, peers=peer, **goals) for row, peer in zip(rows, peers, strict=True)]


def _beside(figure: float) -> str:
    return "torch's hooks crash" if figure == float("inf") else f"torch's hooks {figure:.2f}x"


def _alternate(runs: dict[str, Callable[[], float]], repeats: int) -> dict[str, list[float]]:
    found: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():
        run()
    for _ in range(repeats):
        for name, run in runs.items():
            found[name].append(min(run(), run()))
    return found


@dataclass
class Stage:
    """One stage's parts, ready to run, and the values of one micro-batch."""

    parts: list[StagePart]
    runs: list[Callable[[list[Tensor]], Any]]
    given: dict[Any, Tensor]
    held: dict[PartKind, int]

    @classmethod
    def of(cls, module: nn.Module, x: Tensor, *, split: bool) -> Stage:
        """The only stage of a pipeline."""
        program = capture(module, (x.requires_grad_(),))
        if split:
            program = BackwardSplit()(program, Context(Mesh.parse("d=1"), RuleTable(), Cluster.default()))
        (stage,) = cut_stages(program, _all_in_one(program)).stages
        given = {role: tensor.detach() for role, tensor in _held(program, module).items()}
        for role, node in zip(program.signature.inputs, program.placeholders, strict=True):
            if role.kind is RoleKind.INPUT:
                given[role] = x.detach()
            elif role.kind is RoleKind.TANGENT:
                given[role] = torch.randn(node.meta["val"].shape)
        parts = [part for part in stage.parts if part.kind in (PartKind.FORWARD, *_PARTS)]
        runs = [part_code(part, SingleCommunicator()).run for part in parts]
        held = {kind: sum(v.bytes for v in stage.held_after(kind)) for kind in (PartKind.FORWARD, *_PARTS) if stage.of(kind)}
        made = cls(parts, runs, given, held)
        made._run(0)
        return made

    def backward(self) -> None:
        """I and W, or the whole backward."""
        for index in range(1, len(self.parts)):
            self._run(index)

    def bytes_after(self, kind: PartKind) -> int:
        """Held for one micro-batch."""
        return self.held[kind]

    def _run(self, index: int) -> None:
        program = self.parts[index].program
        results = self.runs[index]([self.given[role] for role in program.signature.inputs])
        self.given.update(
            (role, v) for role, v in zip(program.signature.outputs, results, strict=True) if role.kind is RoleKind.VALUE
        )


def _all_in_one(program: Program) -> dict[str, int]:
    return {node.name: 0 for node in program.nodes if node.op == "call_function" and note(node).phase is Phase.FORWARD}


def _held(program: Program, module: nn.Module) -> dict[Any, Tensor]:
    tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    own = {role: tensors[role.name] for role in program.signature.inputs if role.name in tensors}
    return {**own, **{r: program.constants[r.name] for r in program.signature.inputs if r.kind is RoleKind.CONSTANT}}


def eager_bytes(module: nn.Module, x: Tensor) -> int:
    """Bytes of what eager autograd saves for a backward, parameters left out, each memory once."""
    own = {tensor.untyped_storage().data_ptr() for tensor in (*module.parameters(), *module.buffers())}
    saved: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = module(x.detach().requires_grad_())
    del result
    return sum(saved.values())


@dataclass
class Hooks:
    """The same stage by ``torch.distributed.pipelining``."""

    module: nn.Module
    x: Tensor

    def held(self, count: int = 4) -> float:
        """Bytes that a micro-batch keeps between the halves, over those of its activations."""
        for parameter in self.module.parameters():
            parameter.grad = torch.zeros_like(parameter)
        start = _allocated()
        forwards = [self._forward() for _ in range(count)]
        after_forward = _allocated()
        groups = []
        while forwards:
            x, y, tangent = forwards.pop(0)
            groups.append(self._first(x, y, tangent)[1])
            x.grad = None
            del x, y, tangent
        after_first = _allocated()
        del groups
        return (after_first - start) / max(after_forward - start, 1)

    def _forward(self) -> tuple[Tensor, Tensor, Tensor]:
        x = self.x.detach().clone().requires_grad_()
        y = self.module(x)
        return x, y, torch.randn_like(y)

    def whole(self) -> float:
        """CPU seconds of eager's whole backward."""
        x, y, tangent = self._forward()
        return _cpu(lambda: torch.autograd.grad([y], [x, *self.module.parameters()], [tangent]))

    def halves(self) -> float:
        """CPU seconds of both halves. RuntimeError for a module that is used twice."""
        x, y, tangent = self._forward()

        def both() -> None:
            _, groups = self._first(x, y, tangent)
            stage_backward_weight(self.module.parameters(), groups)

        return _cpu(both)

    def _first(self, x: Tensor, y: Tensor, tangent: Tensor) -> Any:
        return stage_backward_input([y], [tangent], [x], self.module.parameters())


def _cpu(run: Callable[[], object]) -> float:
    start = time.process_time()
    run()
    return time.process_time() - start


class _Info(ctypes.Structure):
    _names = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost"
    _fields_ = [(name, ctypes.c_size_t) for name in _names.split()]


def _allocated() -> int:
    """Bytes that the C allocator has given out."""
    gc.collect()
    library = ctypes.CDLL("libc.so.6")
    library.mallinfo2.restype = _Info
    info = library.mallinfo2()
    return int(info.uordblks + info.hblkhd)
