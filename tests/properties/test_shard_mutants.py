"""Bugs planted in lowered programs are caught by running all ranks, and blamed on the right node."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.fx as fx
from torch import nn

from hocket.compiler.capture import capture
from hocket.compiler.cost.cost import Cost
from hocket.compiler.errors import HocketError
from hocket.compiler.layout import Partial, Replicate, coordinate, local_offset
from hocket.compiler.layout import Shard as Cut
from hocket.compiler.plan.plan import Certificate, NodePlan, Plan
from hocket.compiler.program import Program, annotate, copy_program, note, tensor_inputs
from hocket.compiler.rules.rule import Rule
from hocket.compiler.verify.blame import blame, relative_error
from hocket.compiler.verify.lockstep import run_global, run_ranks
from hocket.passes.shard import Shard
from hocket.runtime.mesh import Mesh
from hocket.testing.random_plans import context, random_inputs, rules_of

aten = torch.ops.aten
c10d = torch.ops._c10d_functional
MESH = Mesh.parse("tp=2")


def _data_parallel(program: Program) -> Plan:
    """Inputs cut over the batch, parameters whole, the rule that moves least, gradients leave whole."""
    nodes: dict[str, NodePlan] = {}
    for node in program.nodes:
        if node.op == "placeholder":
            role = note(node).role
            nodes[node.name] = NodePlan((), ((Cut(0) if role and role.kind in ("input", "tangent") else Replicate(),),))
        elif node.op == "call_function":
            made = [nodes[argument.name].outputs[0] for argument in tensor_inputs(node)]

            def moved(rule: Rule, made: list[object] = made) -> tuple[float, bool]:
                pairs = list(zip(made, rule.inputs, strict=True))
                if any(isinstance(want, Partial) and have != (want,) for have, want in pairs):
                    return float("inf"), True
                return sum(1.0 if have != (Replicate(),) else 0.1 for have, want in pairs if have != (want,)), rule.is_replicate

            best = min(rules_of(node, 2), key=moved)
            nodes[node.name] = NodePlan(tuple((p,) for p in best.inputs), tuple((p,) if p else None for p in best.outputs))
    whole = [None if result is None else (Replicate(),) for result in program.results]
    results = tuple((Cut(0),) if i == 0 else layout for i, layout in enumerate(whole))
    return Plan(MESH, nodes, results, Cost(), Certificate(0.0, 0.0, "by hand"))


@pytest.fixture(scope="module")
def programs() -> tuple[Program, Program]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4))
    program = capture(model, (torch.randn(5, 6),))
    return program, Shard()(program, context(_data_parallel(program)))


def _first(program: Program, target: object) -> fx.Node:
    return next(node for node in program.nodes if node.target is target)


def _lose_a_reduction(program: Program) -> None:
    node = _first(program, c10d.all_reduce.default)
    wait = next(iter(node.users))
    wait.replace_all_uses_with(node.args[0])  # type: ignore[arg-type]
    annotate(node.args[0], layouts=((Replicate(),),))  # type: ignore[arg-type]


def _reduce_twice(program: Program) -> None:
    wait = next(iter(_first(program, c10d.all_reduce.default).users))
    with program.graph.graph.inserting_after(wait):
        again = program.graph.graph.call_function(c10d.all_reduce.default, (wait, "sum", "tp"))
    again.meta.update(wait.meta)
    wait.replace_all_uses_with(again, delete_user_cb=lambda user: user is not again)


def _reduce_by_maximum(program: Program) -> None:
    _first(program, c10d.all_reduce.default).update_arg(1, "max")


def _scale_the_wrong_way(program: Program) -> None:
    _first(program, c10d.all_reduce.default).update_arg(1, "avg")


def _skip_the_last_bias(program: Program) -> None:
    node = [node for node in program.nodes if node.target is aten.addmm.default][-1]
    node.args = (node.args[0], node.args[1], node.args[2])
    node.kwargs = {"beta": 0}


MUTANTS: list[Callable[[Program], None]] = [
    _lose_a_reduction,
    _reduce_twice,
    _reduce_by_maximum,
    _scale_the_wrong_way,
    _skip_the_last_bias,
]


def _is_caught(program: Program, lowered: Program) -> bool:
    inputs = random_inputs(program, 3)
    want = run_global(program, inputs, torch.float64).outputs
    try:
        have = run_ranks(lowered, inputs, dtype=torch.float64).outputs
    except HocketError:
        return True
    return any(relative_error(want[role], have[role]) > 1e-9 for role in want)


def test_data_parallelism_reduces_every_gradient_exactly_once(programs: tuple[Program, Program]) -> None:
    program, lowered = programs
    reductions = [node for node in lowered.nodes if node.target is c10d.all_reduce.default]
    gradients = [role for role in program.signature.outputs if role.kind == "gradient"]
    assert len(reductions) == len(gradients) == 4
    assert not _is_caught(program, lowered)
    assert blame(program, lowered, random_inputs(program, 3)) is None


@pytest.mark.parametrize("plant", MUTANTS)
def test_a_planted_bug_is_caught_and_blamed(plant: Callable[[Program], None], programs: tuple[Program, Program]) -> None:
    program, lowered = programs
    mutant, _ = copy_program(lowered)
    plant(mutant)
    assert _is_caught(program, mutant)
    found = blame(program, mutant, random_inputs(program, 3))
    assert found is not None
    assert found.error > 1e-5
    assert found.original in str(found)
    assert "Linear" in found.source
    assert "the first node whose value differs" in str(found)


def test_a_slice_from_the_wrong_offset_is_caught_where_it_is_made() -> None:
    program = capture(_Double(), (torch.randn(6, 4),), train=False)
    call = next(node for node in program.nodes if node.op == "call_function")
    source = program.placeholders[0].name
    nodes = {
        source: NodePlan((), ((Replicate(),),)),
        call.name: NodePlan(((Cut(0),),) * len(tensor_inputs(call)), ((Cut(0),),)),
    }
    lowered = Shard()(program, context(Plan(MESH, nodes, ((Cut(0),),), Cost(), Certificate(0.0, 0.0, "by hand"))))
    assert not _is_caught(program, lowered)
    for change in (lambda node: node.update_arg(2, 0), lambda node: node.update_arg(0, 4)):
        mutant, _ = copy_program(lowered)
        change(_first(mutant, local_offset))
        assert _is_caught(program, mutant)
        found = blame(program, mutant, random_inputs(program, 3))
        assert found is not None
        assert found.original == source, "the wrong slice is to blame, not its consumer"
    assert any(node.target is coordinate for node in lowered.nodes)


class _Double(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + x
