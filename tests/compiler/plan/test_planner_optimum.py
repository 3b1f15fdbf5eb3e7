"""The one-axis plan is the best of all plans; costs and certificates agree with the cost model written down independently."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from planning import CLUSTER, TinyRules, brute_force, program_of, role, seconds_of

from hocket.compiler.cost.transfer import TransferPrices
from hocket.compiler.errors import PlanError
from hocket.compiler.plan.planner import plan
from hocket.compiler.plan.view import view_program
from hocket.runtime.mesh import Mesh

aten = torch.ops.aten


@st.composite
def functions(draw):
    """A function of (x, w) as a list of (op, argument indices); later ops may use any earlier value, repeats included."""
    ops = []
    for i in range(draw(st.integers(1, 3))):
        name = draw(st.sampled_from(("mm", "mm", "add", "mul", "t", "relu")))
        arity = 2 if name in ("mm", "add", "mul") else 1
        ops.append((name, [draw(st.integers(0, i + 1)) for _ in range(arity)]))
    return ops


def compiled(ops, size, kind="output"):
    def run(x, w):
        values = [x, w]
        for name, arguments in ops:
            overload = getattr(aten, name)
            values.append(getattr(overload, "Tensor" if name in ("add", "mul") else "default")(*(values[a] for a in arguments)))
        return (values[-1], values[-2]) if len(ops) > 1 else (values[-1],)

    roles = [role(kind, "w"), role("output", "y")][: min(2, len(ops))]
    inputs = [(role("input", "x"), torch.ones(size, size)), (role("param", "w"), torch.ones(size, size))]
    return program_of(run, inputs, roles)


@given(functions(), st.sampled_from((16, 30)), st.sampled_from(("any", "like-params")))
@settings(max_examples=20, deadline=None)
def test_one_axis_plans_are_optimal(ops, size, gradients):
    program, mesh = compiled(ops, size, "gradient"), Mesh.parse("d=2")
    prices = TransferPrices(mesh, CLUSTER)
    found = plan(program, mesh, TinyRules(), CLUSTER, gradients=gradients)
    least = brute_force(program, TinyRules(), prices, gradients=gradients)
    assert found.cost.seconds == pytest.approx(least, abs=1e-9)
    assert found.certificate.gap == 0
    assert found.certificate.method == "elimination"


@given(functions(), st.sampled_from(("a=2,b=2", "a=2,b=4", "a=2,b=1,c=2")))
@settings(max_examples=12, deadline=None)
def test_several_axes_have_honest_certificates(ops, mesh):
    program, mesh = compiled(ops, 32), Mesh.parse(mesh)
    found = plan(program, mesh, TinyRules(), CLUSTER)
    view = view_program(program, gradients_like_parameters=False)
    assert found.cost.seconds == pytest.approx(seconds_of(view, found.nodes, found.results, TransferPrices(mesh, CLUSTER)))
    assert 0 <= found.certificate.lower_bound <= found.certificate.objective == found.cost.seconds
    one = plan(program, Mesh.parse("d=1"), TinyRules(), CLUSTER)
    assert found.cost.seconds <= one.cost.seconds + 1e-9


def test_a_value_wanted_twice_is_moved_once():
    def run(x, w):
        y = aten.mm.default(x, w)
        return aten.relu.default(y), aten.mul.Tensor(y, y)

    inputs = [(role("input", "x"), torch.ones(64, 64)), (role("param", "w"), torch.ones(64, 64))]
    program = program_of(run, inputs, [role("output", "a"), role("output", "b")])
    # the product leaves partial sums; both users need the sum
    found = plan(program, Mesh.parse("d=2"), TinyRules(), CLUSTER, constraints={"x": "d:S(1)", "w": "d:S(0)"}, outputs="replicate")
    sums = [d for d in found.decisions if "bytes on the wire" in d.reason and d.node.startswith("mm")]
    assert len(sums) == 1


def test_plans_are_the_same_every_time():
    program = compiled([("mm", [0, 1]), ("add", [2, 2]), ("mm", [3, 1])], 32)
    first, second = (plan(program, Mesh.parse("a=2,b=2"), TinyRules(), CLUSTER) for _ in range(2))
    assert first == second


def test_more_expensive_wires_never_make_a_cheaper_plan():
    program = compiled([("mm", [0, 1]), ("relu", [2]), ("mm", [3, 1])], 32)
    seconds = []
    for factor in (0.0, 0.1, 1.0, 10.0, 1000.0):
        lines = {kind: dataclasses.replace(line, beta=line.beta * factor) for kind, line in CLUSTER.collectives.items()}
        cluster = dataclasses.replace(CLUSTER, collectives=lines)
        seconds.append(plan(program, Mesh.parse("d=2"), TinyRules(), cluster, outputs="replicate").cost.seconds)
    assert seconds == sorted(seconds)
    assert seconds[0] < seconds[-1]


def test_a_memory_limit_cuts_parameters_or_says_what_is_the_least():
    def run(x, w):
        return (aten.mm.default(x, w),)

    inputs = [(role("input", "x"), torch.ones(2, 64)), (role("param", "w"), torch.ones(64, 64))]
    program = program_of(run, inputs, [role("output", "y")])
    free = plan(program, Mesh.parse("d=4"), TinyRules(), CLUSTER)
    limited = plan(program, Mesh.parse("d=4"), TinyRules(), CLUSTER, memory_limit=64 * 64 * 4 // 2)
    assert limited.cost.peak_bytes <= 64 * 64 * 4 // 2
    assert limited.certificate.lower_bound <= free.cost.seconds <= limited.cost.seconds
    with pytest.raises(PlanError, match=r"memory_limit is 100 bytes a rank, but the least .* is \d+"):
        plan(program, Mesh.parse("d=4"), TinyRules(), CLUSTER, memory_limit=100)


def test_an_op_without_a_rule_is_whole_and_says_what_that_costs():
    def run(x, w):
        return (aten.mm.default(aten.tanh.default(x), w),)

    inputs = [(role("input", "x"), torch.ones(64, 64)), (role("param", "w"), torch.ones(64, 64))]
    found = plan(program_of(run, inputs, [role("output", "y")]), Mesh.parse("d=2"), TinyRules(), CLUSTER)
    (decision,) = [d for d in found.decisions if d.node == "tanh" and not d.applied]
    assert "no rule for aten.tanh.default; every rank of d computes all of it" in decision.reason
    assert decision.gain == pytest.approx(-(2 * 64 * 64 * 4 / 1e9) / 2)
