"""The well-known parallelisms come out of one solver, with the collectives and the bytes of their papers."""

from collections import Counter

import pytest
import torch

from hocket.compiler.capture import capture
from hocket.compiler.cost.cluster import Cluster
from hocket.compiler.cost.estimate import redistributions
from hocket.compiler.demo.llama import Llama, LlamaConfig
from hocket.compiler.layout import Replicate, Shard
from hocket.compiler.plan.planner import plan
from hocket.compiler.plan.tactics import DataParallel, SequenceParallel, TensorParallel, Zero
from hocket.compiler.plan.view import view_program
from hocket.compiler.program import RoleKind
from hocket.compiler.redistribute import StepKind, steps, wire_bytes
from hocket.compiler.rules.table import RuleTable
from hocket.runtime.mesh import Mesh

LAYERS, B, S, D = 2, 4, 32, 64


@pytest.fixture(scope="module")
def table():
    return RuleTable(cache_dir=None, validate=False)


@pytest.fixture(scope="module")
def program():
    torch.manual_seed(0)
    model = Llama(LlamaConfig(vocabulary=96, width=D, layers=LAYERS, heads=8, kv_heads=4, hidden=112, context=S))
    return capture(model, (torch.randint(0, 96, (B, S)),))


def planned(program, table, mesh, tactics, **options):
    return plan(program, Mesh.parse(mesh), table, Cluster.default(), tactics, **options)


def moved(program, found):
    """[(value name, its shape, its use as a result, kind, target, bytes)] of every collective."""
    view = view_program(program, gradients_like_parameters=False)
    rows = []
    for move in redistributions(view, found.nodes, found.results):
        value = view.values[move.value]
        maker = view.sites[value.maker[0]]
        for step in steps(move.source, move.target):
            if step.kind is not StepKind.SLICE:
                size = wire_bytes(step, value.type.shape, value.type.itemsize, found.mesh)
                rows.append((maker, value.type.shape, value.from_input, step.kind, step.target, size))
    return rows


def placements(program, found, kind):
    """name -> layout of the inputs of one kind."""
    nodes = program.placeholders
    return {name: found.nodes[nodes[i].name].outputs[0] for name, i in program.signature.inputs_of(kind).items()}


def parameter_bytes(program):
    nodes = program.placeholders
    return sum(nodes[i].meta["val"].numel() * 4 for i in program.signature.inputs_of(RoleKind.PARAM).values())


@pytest.mark.parametrize("ranks", [2, 4])
def test_data_parallel_sums_every_gradient_once(program, table, ranks):
    found = planned(program, table, f"dp={ranks}", [DataParallel("dp")], gradients="like-params")
    assert set(placements(program, found, RoleKind.PARAM).values()) == {(Replicate(),)}
    assert set(placements(program, found, RoleKind.INPUT).values()) == {(Shard(0),)}
    assert {kind for *_, kind, _, _ in moved(program, found)} == {StepKind.ALL_REDUCE}
    assert found.cost.bytes_on_wire == pytest.approx(2 * (ranks - 1) / ranks * parameter_bytes(program))
    assert found.certificate.gap == 0


def test_zero_three_gathers_parameters_and_scatters_gradients(program, table):
    found = planned(program, table, "dp=4", [Zero("dp", stage=3)])
    assert all(isinstance(layout[0], Shard) for layout in placements(program, found, RoleKind.PARAM).values())
    rows = moved(program, found)
    weights = [row for row in rows if not row[2]]
    assert {kind for *_, kind, _, _ in weights} == {StepKind.ALL_GATHER}
    big = [row for row in rows if row[2] and len(row[1]) > 1]
    assert {kind for *_, kind, _, _ in big} == {StepKind.REDUCE_SCATTER}
    assert sum(row[-1] for row in big) == pytest.approx(3 / 4 * parameter_bytes(program))


def test_tensor_parallel_reduces_four_times_a_layer(program, table):
    found = planned(program, table, "tp=2", [TensorParallel("tp")])
    weights = placements(program, found, RoleKind.PARAM)
    for layer in range(LAYERS):
        for name in ("attention.q", "attention.k", "attention.v", "feed_forward.gate", "feed_forward.up"):
            assert weights[f"layers.{layer}.{name}.weight"] == (Shard(0),)
        for name in ("attention.o", "feed_forward.down"):
            assert weights[f"layers.{layer}.{name}.weight"] == (Shard(1),)
    assert all(layout == (Replicate(),) for name, layout in weights.items() if "norm" in name)
    in_layers = [row for row in moved(program, found) if row[0].node is not None and row[3] is StepKind.ALL_REDUCE]
    activation = B * S * D * 4
    whole = [row for row in in_layers if row[-1] == activation]  # 2 (p - 1) / p of the tensor with two ranks
    assert len(whole) in (4 * LAYERS, 4 * LAYERS + 1)  # one more where the head is cut along its inputs or outputs
    assert not any(kind in (StepKind.REDUCE_SCATTER, StepKind.ALL_TO_ALL) for *_, kind, _, _ in moved(program, found))


def test_sequence_parallel_scatters_and_gathers_along_the_sequence(program, table):
    found = planned(program, table, "tp=2", [SequenceParallel("tp")])
    kinds = Counter((kind, target) for _, shape, fresh, kind, target, _ in moved(program, found) if fresh and len(shape) > 1)
    assert kinds[(StepKind.REDUCE_SCATTER, Shard(1))] >= 4 * LAYERS
    assert not any(kind is StepKind.ALL_REDUCE for kind, _ in kinds)
    tensor = planned(program, table, "tp=2", [TensorParallel("tp")])
    assert found.cost.peak_bytes < tensor.cost.peak_bytes


def test_two_tactics_share_a_mesh(program, table):
    found = planned(program, table, "dp=2,tp=2", [DataParallel("dp"), TensorParallel("tp")])
    weights = placements(program, found, RoleKind.PARAM)
    assert weights["layers.0.attention.q.weight"] == (Replicate(), Shard(0))
    assert weights["layers.1.feed_forward.down.weight"] == (Replicate(), Shard(1))
    assert set(placements(program, found, RoleKind.INPUT).values()) == {(Shard(0), Replicate())}
    assert 0 < found.certificate.lower_bound <= found.certificate.objective


def test_auto_is_no_worse_than_any_tactic(program, table):
    auto = planned(program, table, "d=2", "auto")
    assert auto.certificate.gap == 0
    for tactic in (DataParallel("d"), TensorParallel("d"), SequenceParallel("d"), Zero("d")):
        assert auto.cost.seconds <= planned(program, table, "d=2", [tactic]).cost.seconds + 1e-9


def test_every_parameter_has_its_reason(program, table):
    found = planned(program, table, "tp=2", [TensorParallel("tp")])
    reasons = {d.node: d.reason for d in found.decisions}
    for name, i in program.signature.inputs_of(RoleKind.PARAM).items():
        assert reasons[program.placeholders[i].name].startswith(name)
    assert any("all_reduce on tp" in d.reason and d.gain < 0 and d.source for d in found.decisions)
