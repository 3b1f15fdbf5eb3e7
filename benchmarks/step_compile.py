"""Claim 2, in one process: lowering a large graph, and simulating many ranks in lockstep beside torch's LocalTensorMode."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
import torch.fx as fx
from common import Row, Sample, at_most, cpu_seconds, progress, versus
from step_model import Case
from torch import Tensor, nn
from torch.distributed._local_tensor import LocalTensor, LocalTensorMode

from hocket.compiler.capture import capture
from hocket.compiler.contract import Context
from hocket.compiler.doors.hall import Compiled, Options, compile_program
from hocket.compiler.plan.planner import plan
from hocket.compiler.plan.tactics import TensorParallel
from hocket.passes.shard import Shard
from hocket.runtime.executors.lockstep import LockstepExecutor, lockstep_executor
from hocket.runtime.mesh import Mesh
from hocket.runtime.pieces import cut

LOWERING, SIMULATION = "lowering", "lockstep simulation"
NODES = 8000
PEER = "LocalTensorMode"


def rows(*, quick: bool) -> list[Row]:
    """Measure everything; all figures are CPU time, since the work has one thread."""
    progress("compile: lowering a large graph")
    nodes, seconds = lowering(NODES // 4 if quick else NODES, 1 if quick else 3)
    progress("compile: simulating 64 ranks")
    ours, theirs, size = simulation(64, 3 if quick else 7)
    scaled = Sample(tuple(value / nodes * NODES for value in seconds.values))
    return [
        at_most(LOWERING, f"shard pass, scaled to {NODES} nodes from a graph of {nodes} (CPU time)", scaled, 2.0),
        versus(SIMULATION, f"64 ranks, {size} nodes (CPU time) vs {PEER}", ours, PEER, theirs, 4.0),
    ]


def lowering(nodes: int, repeats: int) -> tuple[int, Sample]:
    """CPU seconds of the shard pass on a captured training step with at least that many nodes, and how many it has."""
    case = Case(width=64, hidden=128, layers=nodes // 230 + 1, batch=4, length=16)
    program = capture(case.model(), case.data(), {}, train=True)
    options = Options(Mesh.parse("d=2"), tactics=[TensorParallel("d")])
    chosen = plan(program, options.mesh, options.rules, options.cluster, options.tactics)
    context = Context(options.mesh, options.rules, options.cluster, chosen)
    return len(list(program.graph.graph.nodes)), cpu_seconds(lambda: Shard()(program, context), repeats)


class Layers(nn.Module):
    """Residual feed-forward blocks."""

    def __init__(self, width: int, hidden: int, layers: int) -> None:
        super().__init__()
        self.up = nn.ModuleList(nn.Linear(width, hidden) for _ in range(layers))
        self.down = nn.ModuleList(nn.Linear(hidden, width) for _ in range(layers))

    def forward(self, x: Tensor) -> Tensor:
        for up, down in zip(self.up, self.down, strict=True):
            x = x + down(nn.functional.gelu(up(x)))
        return x.square().mean()


def simulation(ranks: int, repeats: int) -> tuple[Sample, Sample, int]:
    """CPU seconds of a forward and backward of a tensor-parallel model on all ranks, ours and the peer's, and its nodes."""
    torch.manual_seed(0)
    model, x = Layers(64, 8 * ranks, 8), torch.randn(64, 64)
    program = capture(model, (x,), {}, train=True)
    compiled = compile_program(program, Options(Mesh.parse(f"d={ranks}"), tactics=[TensorParallel("d")], level="off"))
    values = _values(model, x, compiled)
    ours, expected = _lockstep(compiled, values, repeats)
    theirs, found = _local_tensors(compiled, values, repeats)
    for a, b in zip(expected, found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    return ours, theirs, len(list(compiled.lowered.graph.graph.nodes))


def _values(model: nn.Module, x: Tensor, compiled: Compiled) -> list[list[Tensor]]:
    """Per input of the program, its piece on every rank."""
    named = dict(model.named_parameters())
    pieces = []
    for port in compiled.instructions.inputs:
        whole = {"param": lambda: named[port.name].detach(), "input": lambda: x}.get(port.kind, lambda: torch.ones(port.shape))()  # noqa: B023
        pieces.append([piece.contiguous() for piece in cut(whole, port.layout, compiled.instructions.mesh)])
    return pieces


def _lockstep(compiled: Compiled, values: list[list[Tensor]], repeats: int) -> tuple[Sample, list[Tensor]]:
    """Our executor; also the results of rank 0, gradients after the loss."""
    program = compiled.instructions
    executor = lockstep_executor(program)
    assert isinstance(executor, LockstepExecutor), "ranks of an SPMD program run the same instructions"
    rows = [[pieces[rank] for pieces in values] for rank in range(program.mesh.size)]
    first, *later = program.segments

    def run() -> list[Tensor]:
        frame = executor.open([[row[i] if i in first.inputs else None for i in range(len(row))] for row in rows])
        results = list(executor.run(frame, first.name)[0])
        for segment in later:
            results += executor.run(frame, segment.name, [[row[i] for i in segment.inputs] for row in rows])[0]
        frame.close()
        return [result for result in results if result is not None]

    with torch.no_grad():
        return cpu_seconds(run, repeats), run()


def _local_tensors(compiled: Compiled, values: list[list[Tensor]], repeats: int) -> tuple[Sample, list[Tensor]]:
    """The lowered graph itself, called under torch's mode."""
    ranks = compiled.instructions.mesh.size
    with _fake_world(ranks) as group, torch.no_grad(), LocalTensorMode(ranks):
        graph = _renamed(compiled.lowered.graph, "d", group)
        arguments = [LocalTensor(dict(enumerate(pieces))) for pieces in values]

        def run() -> list[Tensor]:
            return [result._local_tensors[0] for result in graph(*arguments) if result is not None]

        return cpu_seconds(run, repeats), run()


def _renamed(graph: fx.GraphModule, axis: str, group: str) -> fx.GraphModule:
    """A copy whose collectives name a process group instead of a mesh axis."""
    renamed = copy.deepcopy(graph)
    for node in renamed.graph.nodes:
        if node.op == "call_function" and getattr(node.target, "namespace", "") == "_c10d_functional":
            node.args = tuple(group if argument == axis else argument for argument in node.args)
    renamed.recompile()
    return renamed


@contextmanager
def _fake_world(ranks: int) -> Iterator[str]:
    """A process group in name only, which LocalTensorMode asks for."""
    warnings.filterwarnings("ignore", module="torch.distributed")
    dist.init_process_group("fake", rank=0, world_size=ranks)
    try:
        assert dist.group.WORLD is not None
        yield dist.group.WORLD.group_name
    finally:
        dist.destroy_process_group()
