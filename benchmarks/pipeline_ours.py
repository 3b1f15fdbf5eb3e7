"""hocket's pipelines of the demo's Llama on two ranks: the model cut at the same layers as for torch, costs traced in situ."""

from __future__ import annotations

import itertools
import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
import torch.fx as fx
from pipeline_peers import RANKS, layer_ranges
from torch import nn

from hocket.compiler.capture import capture
from hocket.compiler.contract import Context
from hocket.compiler.cost.cluster import Cluster
from hocket.compiler.demo.llama import Llama
from hocket.compiler.doors.pipeline.units import partition
from hocket.compiler.plan.pipeline.costs import LinkCosts, PipelineCosts, StageCosts
from hocket.compiler.plan.pipeline.stage_code import held_by, stage_code
from hocket.compiler.program import Phase, Program, RoleKind, copy_program, note
from hocket.compiler.rules.table import RuleTable
from hocket.compiler.stages import PartKind, Pipeline, StageProgram
from hocket.passes.backward_split import BackwardSplit
from hocket.passes.backward_split_costs import Costs
from hocket.passes.pipeline import cut_stages
from hocket.passes.pipeline_drafts import gradients_of
from hocket.passes.pipeline_place import place
from hocket.runtime.exchange import Exchange, exchange_bytes, is_available
from hocket.runtime.mesh import Mesh
from hocket.runtime.schedule.instruction import Op, Schedule
from hocket.runtime.schedule.links import GlooLink, Link, ShmLink
from hocket.runtime.schedule.run import PipelineRank, Stamp
from hocket.runtime.schedule.stage import Port, StageState, ValueSpec
from hocket.runtime.transports.shm import ShmTransport


@dataclass
class Cut:
    """A model cut into stages, and this rank's of them at work.

    tangents: names of those that are one; rows: of a micro-batch; forward: forward node -> stage.
    """

    pipeline: Pipeline
    states: dict[int, StageState]
    tangents: tuple[str, ...]
    rows: int = 1
    forward: Mapping[str, int] = field(default_factory=dict)

    def given(self, inputs: torch.Tensor, targets: torch.Tensor) -> list[dict[str, torch.Tensor]]:
        """Inputs of every micro-batch."""
        ones = dict.fromkeys(self.tangents, torch.ones(()))
        pairs = zip(inputs.split(self.rows), targets.split(self.rows), strict=True)
        return [{"args[0]": one, "args[1]": other, **ones} for one, other in pairs]

    @classmethod
    def of(cls, program: Program, forward: dict[str, int], model: nn.Module, mine: Sequence[int], *, inductor: bool = False) -> Cut:
        """This rank's stages of a captured step, ready to run. forward: forward node -> stage."""
        pipeline = cut_stages(program, forward)
        tensors = {Port("param", name): p.detach().clone() for name, p in model.named_parameters()}
        tensors |= {Port("buffer", name): b for name, b in model.named_buffers()}
        codes = {s: stage_code(pipeline.stages[s], products=True, inductor=inductor) for s in mine}
        states = {s: StageState(code, held_by(pipeline.stages[s], tensors)) for s, code in codes.items()}
        return cls(pipeline, states, tuple(program.signature.inputs_of(RoleKind.TANGENT)), forward=forward)


def cut_llama(
    model: Llama,
    example: tuple[torch.Tensor, torch.Tensor],
    stages: int,
    mine: Sequence[int],
    *,
    split: bool = True,
    inductor: bool = False,
) -> Cut:
    """Cut between layers, as evenly as can be; only this rank's stages are made ready.

    split: the backward, into I and W; inductor: compile every part.
    """
    program = capture(model, example)
    if split:
        program = BackwardSplit()(program, Context(Mesh.parse("d=1"), RuleTable(), Cluster.default()))
    stage_of_layer = {layer: stage for stage, layers in enumerate(layer_ranges(len(model.layers), stages)) for layer in layers}
    forward: dict[str, int] = {}
    for node in program.nodes:
        if node.op == "call_function" and note(node).phase is Phase.FORWARD:
            forward[node.name] = _stage(note(node).module, stage_of_layer, stages)
    return Cut.of(program, forward, model, mine, inductor=inductor)


def cut_evenly(model: nn.Module, example: tuple[torch.Tensor, torch.Tensor], stages: int, mine: Sequence[int]) -> Cut:
    """Any model, its backward split, cut where hocket's plan cuts it."""
    context = Context(Mesh.parse("d=1"), RuleTable(), Cluster.default())
    program = BackwardSplit()(capture(model, example), context)
    cut = Cut.of(program, partition(program, stages, Costs(context.cluster)), model, mine)
    cut.rows = example[0].shape[0]
    return cut


@dataclass(frozen=True)
class TracedCosts(Costs):
    """The planner's costs, scaled so that every stage of a cut costs what it was seen to cost. scale: node -> factor."""

    scale: Mapping[str, float] = field(default_factory=dict)

    def seconds(self, node: fx.Node) -> float:
        """Of one call."""
        return super().seconds(node) * self.scale.get(node.name, 1.0)


def cut_by_traces(cut: Cut, costs: PipelineCosts, model: nn.Module, mine: Sequence[int]) -> Cut:
    """The same program in as many stages of equal work, by what the stages of ``cut`` were seen to cost; also inside of layers."""
    program, plain = cut.pipeline.program, Costs(Cluster.default())
    copy, _ = copy_program(program)
    stages = place(copy, cut.forward, gradients_of(copy)).stages
    predicted = [sum(plain.seconds(node) for node in stages if stages[node] == stage.stage) for stage in cut.pipeline.stages]
    factors = [seen.work / believed for seen, believed in zip(costs.stages, predicted, strict=True)]
    scaled = TracedCosts(Cluster.default(), {node.name: factors[stage] for node, stage in stages.items()})
    return Cut.of(program, partition(program, len(factors), scaled), model, mine)


def _stage(module: str, stage_of_layer: dict[int, int], stages: int) -> int:
    words = module.split(".")
    if words[0] == "layers":
        return stage_of_layer[int(words[1])]
    return 0 if words[0] == "embedding" else stages - 1


def placement(name: str) -> tuple[int, ...]:
    """Stage -> rank."""
    return {"straight": (0, 1), "loop": (0, 1, 0, 1), "v": (0, 1, 1, 0), "own v": (0, 1, 1, 0), "wave": (0, 1, 1, 0, 0, 1, 1, 0)}[
        name
    ]


def run(schedule: Schedule, cut: Cut, link: Link, stamps: list[Stamp] | None = None) -> PipelineRank:
    """This rank's end of a schedule."""
    rank = dist.get_rank()
    return PipelineRank(schedule, rank, {s: cut.states[s] for s in schedule.stages_of(rank)}, link, stamps=stamps)


def new_link(path: str) -> Link:
    """Shared memory where ranks can use it, else gloo. path: of an empty file that both ranks map."""
    if not is_available(torch.device("cpu")):
        return GlooLink((0, 1))
    mesh = Mesh.parse(f"pp={RANKS}")
    file = os.open(path, os.O_RDWR)
    if dist.get_rank() == 0:
        os.ftruncate(file, exchange_bytes(mesh))
    dist.barrier()
    return ShmLink(ShmTransport(Exchange(file, mesh, dist.get_rank()), 120.0), "pp")


def link_costs(link: Link, size: int, repeats: int = 60) -> LinkCosts:
    """Processor time and latency of a message of that many bytes, from a ping-pong."""
    rank, other = dist.get_rank(), 1 - dist.get_rank()
    data, spec = torch.zeros(size // 4), (ValueSpec("data", (size // 4,), torch.float32, (1,)),)
    whole, sending = [], []
    for turn in range(repeats):
        link.post(turn, other, spec)
        dist.barrier()
        start = time.perf_counter()
        for sender in (0, 1):
            if rank == sender:
                link.send(turn, other, spec, [data])
                sending.append(time.perf_counter() - start if rank == 0 else 0.0)
            else:
                link.take(turn)
        whole.append((time.perf_counter() - start) / 2)
    link.finish()
    found = torch.tensor([statistics.median(whole), statistics.median(sending)], dtype=torch.float64)
    dist.broadcast(found, 0)
    one_way, send = float(found[0]), float(found[1])
    return LinkCosts(send=send, receive=max(0.0, one_way - send))


LONGEST_GAP = 1e-3
"""Seconds between two instructions that count as the work of the loop; more is the end of a step."""


def traced_costs(
    cut: Cut, stamps: Sequence[Stamp], link: LinkCosts, average: Callable[[Sequence[float]], float] = statistics.median
) -> PipelineCosts:
    """Costs of every stage from what ran in place, shared between the ranks.

    An average of each instruction of each stage, with what the loop takes until the next one. The median is typical; the mean adds
    up to the step, where other work disturbs some instructions.
    """
    mine: dict[tuple[str, int, int], list[float]] = {}
    for (instr, _, start, stop), following in itertools.zip_longest(stamps, stamps[1:]):
        gap = max(0.0, following.ready - stop) if following is not None else 0.0  # a weight gradient may run while another waits
        if instr.op in (Op.F, Op.I, Op.W, Op.B):
            seconds = stop - start + (gap if gap < LONGEST_GAP else 0.0)
            mine.setdefault((instr.op.value, instr.stage, instr.piece), []).append(seconds)
    everyone: list[dict[tuple[str, int, int], float]] = [{} for _ in range(RANKS)]
    dist.all_gather_object(everyone, {key: average(values) for key, values in mine.items()})
    seconds_of = everyone[0] | everyone[1]
    return PipelineCosts(tuple(_stage_costs(stage, seconds_of) for stage in cut.pipeline.stages), link)


def _stage_costs(stage: StageProgram, seconds: dict[tuple[str, int, int], float]) -> StageCosts:
    s, pieces = stage.stage, max(1, len(stage.of(PartKind.BACKWARD_WEIGHT)))
    held = float(sum(value.bytes for value in stage.held_after(PartKind.BACKWARD_INPUT)))
    return StageCosts(
        forward=seconds["F", s, 0],
        backward_input=seconds.get(("I", s, 0), 0.0),
        backward_weight=tuple(seconds.get(("W", s, k), 0.0) for k in range(pieces)),
        backward=seconds.get(("B", s, 0)),
        activation=float(sum(value.bytes for value in stage.held_after(PartKind.FORWARD))),
        held=(held / pieces,) * pieces,
    )
