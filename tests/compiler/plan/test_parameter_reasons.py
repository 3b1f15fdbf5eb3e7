"""Why a parameter lies where it does: who ruled placements out, and what the cheapest of those would have cost."""

import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from planning import CLUSTER, TinyRules, program_of, role, seconds_of

from hocket.compiler.cost.transfer import TransferPrices
from hocket.compiler.layout import Replicate, Shard
from hocket.compiler.plan.plan import NodePlan
from hocket.compiler.plan.planner import plan
from hocket.compiler.plan.tactics import DataParallel, TensorParallel
from hocket.compiler.plan.view import view_program
from hocket.compiler.program import annotate
from hocket.runtime.mesh import Mesh

MESH = Mesh.parse("d=2")


def two_products():
    """relu(x @ v) @ w with the gradient-like product of the backward, each op with a line and a module."""
    x, v, w = torch.randn(8, 6), torch.randn(6, 4), torch.randn(4, 2)
    inputs = [(role("input", "x"), x), (role("param", "v"), v), (role("param", "w"), w)]
    program = program_of(lambda x, v, w: (torch.relu(x @ v) @ w,), inputs, [role("output", "y")], {"B": 8})
    for number, node in enumerate(program.nodes):
        if node.op == "call_function":
            annotate(node, source=f"model.py:{number} op", module=f"layers.{number}")
    return program


def reason_of(program, name, **options):
    found = plan(program, MESH, TinyRules(), CLUSTER, **options)
    node = next(
        n for n, r in zip(program.placeholders, program.signature.inputs, strict=True) if r.name == name and r.kind == "param"
    )
    return found, next(d for d in found.decisions if d.node == node.name)


def test_a_tactic_that_fixes_a_parameter_is_named_with_the_cheapest_alternative():
    _, decision = reason_of(two_products(), "w", tactics=[DataParallel("d")])
    # the product of the cut batch wants the whole weight: one all_gather that receives half of 4 x 2 float32,
    # 1e-7 s to start an op, 2e-7 s of latency, and 16 bytes at 3e-9 s
    assert decision.reason == (
        "w: R on d, fixed by DataParallel(axis='d'); without that the cheapest, S(0), would take 3.48e-07 s a step more and 16 "
        "bytes a rank less with everything else as planned"
    )


def test_a_constraint_is_named_as_the_user_wrote_it():
    _, decision = reason_of(two_products(), "v", constraints={"v": "d:S(0)"})
    assert "S(0) on d, fixed by constraint 'v': d:S(0); without that the cheapest, " in decision.reason


def test_what_nobody_ruled_out_is_compared_with_the_next_best_only():
    _, decision = reason_of(two_products(), "w")
    assert "better than" in decision.reason
    assert "fixed by" not in decision.reason
    assert "without that" not in decision.reason


def test_a_parameter_is_placed_where_it_is_first_used():
    _, decision = reason_of(two_products(), "w", tactics=[TensorParallel("d")])
    assert decision.source == "model.py:5 op, in layers.5"


@settings(max_examples=20, deadline=None)
@given(v=st.sampled_from(["R", "S(0)", "S(1)"]), w=st.sampled_from(["R", "S(0)", "S(1)"]))
def test_the_alternative_costs_what_the_cost_model_says_of_the_changed_plan(v, w):
    program = two_products()
    found, decision = reason_of(program, "v", constraints={"v": f"d:{v}", "w": f"d:{w}"})
    said = re.search(r"cheapest, (\S+), would take (?:([\d.e-]+) s a step (more|less)|as many s a step)", decision.reason)
    assert said is not None
    view, prices = view_program(program, gradients_like_parameters=False), TransferPrices(MESH, CLUSTER)
    node = program.placeholders[1]

    def seconds(placement):
        nodes = {**found.nodes, node.name: NodePlan((), ((placement,),), ("port",))}
        return seconds_of(view, nodes, found.results, prices)

    before = seconds(found.nodes[node.name].outputs[0][0])
    changes = {str(p): seconds(p) - before for p in (Replicate(), Shard(0), Shard(1)) if (p,) != found.nodes[node.name].outputs[0]}
    expected = min(changes.values())
    told = float(said[2]) * (1 if said[3] == "more" else -1) if said[2] else 0.0
    assert told == pytest.approx(expected, rel=1e-2, abs=1e-12)
