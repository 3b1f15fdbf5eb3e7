"""The five figures of a planned program, as numbers and as expressions."""

import dataclasses

import pytest
import sympy
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hocket.compiler.cost.cluster import Cluster
from hocket.compiler.cost.estimate import estimate
from hocket.compiler.cost.symbols import named_products, symbols
from hocket.compiler.cost.transfer import TransferPrices
from hocket.compiler.layout import Partial, Replicate, Shard
from hocket.compiler.plan.plan import NodePlan
from hocket.compiler.plan.view import view_program
from hocket.compiler.program import Note, Program, Role, RoleKind, Signature, annotate
from hocket.runtime.mesh import Mesh

aten = torch.ops.aten
R, P, S0, S1 = Replicate(), Partial("sum"), Shard(0), Shard(1)


def mlp(batch=6, width=32, hidden=48):
    """x -> relu(x a) b, with x of the user."""
    from torch.fx.experimental.proxy_tensor import make_fx

    def run(x, a, b):
        h = aten.relu.default(aten.mm.default(x, a))
        return (aten.mm.default(h, b),)

    graph = make_fx(run)(torch.ones(batch, width), torch.ones(width, hidden), torch.ones(hidden, width))
    roles = [Role(RoleKind.INPUT, "x"), Role(RoleKind.PARAM, "a"), Role(RoleKind.PARAM, "b")]
    placeholders = iter(roles)
    for node in graph.graph.nodes:
        node.meta["hocket"] = Note()
        if node.op == "placeholder":
            annotate(node, role=next(placeholders))
    return Program(graph, Signature(tuple(roles), (Role(RoleKind.OUTPUT, "y"),)), sizes={"B": batch})


def planned(program, batch, column, row, product):
    """Megatron's plan: the first weight cut by columns, the second by rows."""
    names = [n.name for n in program.nodes if n.op != "output"]
    plans = [
        NodePlan((), (batch,)),
        NodePlan((), (column,)),
        NodePlan((), (row,)),
        NodePlan((batch, column), (product,)),
        NodePlan((product,), (product,)),
        NodePlan((product, row), ((P,),)),
    ]
    return dict(zip(names, plans, strict=True))


def test_megatron_figures_are_those_of_the_formulas():
    program, mesh = mlp(), Mesh.parse("tp=2")
    nodes = planned(program, (R,), (S1,), (S0,), (S1,))
    view = view_program(program, gradients_like_parameters=False)
    found = estimate(view, nodes, [(R,)], TransferPrices(mesh, Cluster.default()))
    assert found.flops == 2 * (2 * 6 * 32 * 24)
    assert found.bytes_on_wire == 2 * (1 / 2) * 6 * 32 * 4
    x, weight, hidden, y = 6 * 32 * 4, 32 * 24 * 4, 6 * 24 * 4, 6 * 32 * 4
    assert found.bytes_moved == (x + weight + hidden) + 2 * hidden + (hidden + weight + y)
    # fullest: inputs, relu's result with the product that it is used in, and the sum beside its parts
    assert found.peak_bytes == x + 2 * weight + max(2 * hidden, hidden + y, y + y)


def test_a_view_keeps_its_base_alive_and_costs_nothing():
    from torch.fx.experimental.proxy_tensor import make_fx

    def run(x):
        h = aten.relu.default(x)
        v = aten.t.default(h)
        other = aten.relu.default(x)
        return (aten.add.Tensor(v, other),)

    graph = make_fx(run)(torch.ones(8, 8))
    role = Role(RoleKind.INPUT, "x")
    program = Program(graph, Signature((role,), (Role(RoleKind.OUTPUT, "y"),)))
    layouts = {n.name: NodePlan(tuple((R,) for _ in n.all_input_nodes), ((R,),)) for n in program.nodes if n.op != "output"}
    view = view_program(program, gradients_like_parameters=False)
    found = estimate(view, layouts, [(R,)], TransferPrices(Mesh.parse("d=1"), Cluster.default()))
    assert found.peak_bytes == 4 * 8 * 8 * 4  # x, h (held by its view), other, and the result
    assert found.bytes_moved == (2 + 2 + 3) * 8 * 8 * 4


@given(st.sampled_from((6, 10, 34)), st.sampled_from(("tp=2", "tp=3", "tp=4")), st.booleans())
@settings(max_examples=15, deadline=None)
def test_symbolic_figures_become_the_numeric_ones(batch, mesh, cut_batch):
    program, mesh = mlp(batch), Mesh.parse(mesh)
    if cut_batch:
        nodes = planned(program, (S0,), (R,), (R,), (S0,))
        nodes[list(nodes)[-1]] = dataclasses.replace(nodes[list(nodes)[-1]], outputs=((S0,),))
    else:
        nodes = planned(program, (R,), (S1,), (S0,), (S1,))
    view, prices = view_program(program, gradients_like_parameters=False), TransferPrices(mesh, Cluster.default())
    numbers = estimate(view, nodes, [(R,)], prices)
    expressions = estimate(view, nodes, [(R,)], prices, symbolic=True)
    batch_symbol = symbols(program.sizes)["B"]
    for field in dataclasses.fields(numbers):
        expression = sympy.sympify(getattr(expressions, field.name))
        assert expression.free_symbols == {batch_symbol}, field.name
        assert float(expression.subs(batch_symbol, batch)) == pytest.approx(float(getattr(numbers, field.name)), rel=1e-6), (
            field.name
        )


def test_symbolic_figures_hold_at_other_sizes():
    mesh = Mesh.parse("tp=2")
    figures = {}
    for batch in (6, 600):
        program = mlp(batch)
        view = view_program(program, gradients_like_parameters=False)
        nodes = planned(program, (R,), (S1,), (S0,), (S1,))
        prices = TransferPrices(mesh, Cluster.default())
        figures[batch] = (estimate(view, nodes, [(R,)], prices), estimate(view, nodes, [(R,)], prices, symbolic=True))
    at = {symbols({"B": 6})["B"]: 600}
    small_as_large, large = figures[6][1], figures[600][0]
    assert float(small_as_large.flops.subs(at)) == large.flops
    assert float(small_as_large.bytes_on_wire.subs(at)) == large.bytes_on_wire
    assert float(small_as_large.seconds.subs(at)) == pytest.approx(large.seconds)


def test_ambiguous_sizes_stay_numbers():
    found = named_products({"B": 4, "S": 4, "D": 3})
    assert found[4] is None
    assert found[3] == symbols({"D": 3})["D"]
    assert found[12] is None
    assert 1 not in named_products({"B": 1})
