"""What stages do once a step: who makes which update, what they share, and what they cannot."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.fx as fx
from torch import nn

from hocket.compiler.capture.front import Example
from hocket.compiler.capture.step import scalar_loss, with_updates
from hocket.compiler.capture.trace import Aim
from hocket.compiler.contract import Context
from hocket.compiler.cost.cluster import Cluster
from hocket.compiler.errors import InputError
from hocket.compiler.passmanager import run_passes
from hocket.compiler.program import Phase, Program, RoleKind, annotate, copy_program, note
from hocket.compiler.rules.table import RuleTable
from hocket.compiler.stages import PartKind, StagePart
from hocket.passes.backward_split import BackwardSplit
from hocket.passes.pipeline import CutStages, cut_stages
from hocket.runtime.mesh import Mesh

CONTEXT = Context(Mesh.parse("pp=2"), RuleTable(), Cluster.default())


def step(clip_norm: float | None) -> tuple[Program, dict[str, int]]:
    """Two layers with momentum, and which stage each node of the forward is at: one layer each."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    aim = Aim(train=True, loss_of=lambda result: scalar_loss(result.square().mean(), None))
    captured = Example.of(model, (torch.randn(3, 4),), {}).capture(aim)
    program = with_updates(captured, model, optimizer, clip_norm=clip_norm, keep_gradients=True)
    program, _ = run_passes(program, (BackwardSplit(worth=0),), CONTEXT, level="off")
    calls = [node for node in program.nodes if node.op == "call_function" and note(node).phase is Phase.FORWARD]
    late = next(place for place, node in enumerate(calls) if "2.weight" in {_parameter(s) for s in node.all_input_nodes})
    return program, {node.name: int(place >= late) for place, node in enumerate(calls)}


def _parameter(node: fx.Node) -> str:
    role = note(node).role
    return role.name if role is not None and role.kind is RoleKind.PARAM else ""


def part(program: Program, forward: dict[str, int], kind: PartKind, stage: int) -> StagePart | None:
    found = cut_stages(program, forward).stages[stage].of(kind)
    return found[0] if found else None


def names(roles: tuple[object, ...]) -> set[str]:
    return {str(role) for role in roles}


def test_every_stage_updates_its_own_parameters_and_states() -> None:
    program, forward = step(None)
    for stage, layer in ((0, "0"), (1, "2")):
        own = part(program, forward, PartKind.OPTIMIZER, stage)
        assert own is not None
        wanted = {f"update:{layer}.weight", f"update:{layer}.bias"}
        wanted |= {f"update:momentum_buffer:{layer}.weight", f"update:momentum_buffer:{layer}.bias"}
        assert names(own.program.signature.outputs) == wanted
        assert part(program, forward, PartKind.SHARE, stage) is None


def test_a_common_norm_is_made_by_every_stage_from_the_scalars_of_all_and_is_proven() -> None:
    program, forward = step(0.5)
    shared = set()
    for stage in (0, 1):
        share, own = part(program, forward, PartKind.SHARE, stage), part(program, forward, PartKind.OPTIMIZER, stage)
        assert share is not None
        assert own is not None
        assert all(node is not None and node.meta["val"].numel() == 1 for node in share.program.results)
        shared |= names(share.program.signature.outputs)
    assert len(shared) == 3, "a scalar for each parameter; what comes first in the sum is added up at once"
    for stage in (0, 1):
        own = part(program, forward, PartKind.OPTIMIZER, stage)
        assert own is not None
        assert shared <= names(own.program.signature.inputs)
    _, (record,) = run_passes(program, (CutStages(forward),), CONTEXT)
    assert str(record.verdict.status) == "equal"


def elementwise(graph: fx.Graph, mine: fx.Node, other: fx.Node) -> fx.Node:
    return graph.call_function(torch.ops.aten.add.Tensor, (mine, other))


def through_a_tensor(graph: fx.Graph, mine: fx.Node, other: fx.Node) -> fx.Node:
    doubled = graph.call_function(torch.ops.aten.neg.default, (other,))
    doubled.meta.update(other.meta)
    annotate(doubled, role=None, phase=Phase.OPTIMIZER)
    return graph.call_function(torch.ops.aten.add.Tensor, (mine, doubled))


@pytest.mark.parametrize("couple", [elementwise, through_a_tensor])
def test_an_optimizer_that_reads_gradients_of_another_stage_is_refused(
    couple: Callable[[fx.Graph, fx.Node, fx.Node], fx.Node],
) -> None:
    program, forward = step(None)
    coupled, _ = copy_program(program)
    gradients = {
        role.name: node
        for role, node in zip(coupled.signature.outputs, coupled.results, strict=True)
        if role.kind is RoleKind.GRADIENT and node is not None
    }
    mine, other = gradients["0.weight"], gradients["2.weight"]
    readers = [user for user in mine.users if note(user).phase is Phase.OPTIMIZER]
    graph = coupled.graph.graph
    with graph.inserting_before(readers[0]):
        both = couple(graph, mine, other)
    both.meta.update(mine.meta)
    annotate(both, role=None, phase=Phase.OPTIMIZER)
    for reader in readers:
        reader.replace_input_with(mine, both)
    with pytest.raises(InputError, match="share scalars of their gradients, not the gradients"):
        cut_stages(coupled, forward)
